"""The version of pjw."""

import os
from typing import Final

# not pjw's: a client may have only pjw-client
_PREFIX: Final = "pjw_client-"
_SUFFIX: Final = ".dist-info"


def version() -> str:
    """Return the version of the package, from the name of its dist-info directory.

    PyPA's "Recording installed projects" specifies that name. importlib.metadata gives the same version, but
    its import takes as long as all of `pjw --help`. It is used only where there is no such directory.
    """
    for name in os.listdir(os.path.dirname(os.path.dirname(__file__))):
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            return name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    from importlib import metadata

    return metadata.version("pjw-client")
