"""The values that describe jobs, frozen, each checking itself. No I/O.

The files divide them by subject. Each name is found here, whichever file has it.
"""

from pjw.model.job import *  # noqa: F403  all of it
from pjw.model.limits import *  # noqa: F403
from pjw.model.offers import *  # noqa: F403
from pjw.model.spec import *  # noqa: F403
