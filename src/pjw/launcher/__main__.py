"""Start the launcher: fix the descriptors, then answer until the other end closes.

Descriptors: 0-2 as given by pjwd (null, null, diagnostics), 3 the requests; nothing else.
"""

import os
import resource
import signal
import socket
import sys
import traceback
from types import TracebackType
from typing import Final

from pjw.errors import PjwError, describe_errno
from pjw.launcher.dispatch import Launcher
from pjw.launcher.processes import say
from pjw.process import open_standard_descriptors, set_for_service

REQUESTS_FD: Final = 3


def main() -> int:
    """Serve the worker at the other end of descriptor 3; return the exit code."""
    open_standard_descriptors()
    os.closerange(REQUESTS_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    set_for_service()
    # A job costs the launcher two descriptors while it runs.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Ctrl-C in a terminal reaches the whole foreground group; the launcher ends when its
    # worker does, and not before it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So does the hang-up of the terminal, which requests a reload of the server.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _say_bug
    requests = socket.socket(fileno=REQUESTS_FD)
    requests.set_inheritable(False)
    try:
        Launcher(requests).run()
    except PjwError as error:
        say(str(error))
        return 1
    except OSError as error:
        # An error without which it cannot go on, as when a child cannot be watched: the next launcher finds
        # all jobs.
        say(describe_errno(error.errno or 0))
        return 1
    return 0


def _say_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("a bug:\n" + "".join(traceback.format_exception(kind, error, trace)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
