"""Warns a user at a terminal before a certificate expires, at most once a day for each.

An empty file has the day of the last check as its modification time. On that day we do not parse the
certificate again, which would take a third of the time of a `pjw get`.
"""

import os
import sys
import time
from contextlib import suppress
from typing import Final

from pjw.certs.files import load_client_credentials, read_path
from pjw.cli.exits import say
from pjw.client.expiry import ends_of
from pjw.client.settings import ClientSettings
from pjw.errors import PjwError

# the environment variable that turns the warning off
VARIABLE: Final = "PJW_EXPIRY_WARNING"
OFF: Final = "off"
DAY_SECONDS: Final = 86_400


def warn_of_ends(settings: ClientSettings) -> None:
    """Warn on stderr, if it is a terminal, of each certificate that expires soon."""
    if not sys.stderr.isatty() or os.environ.get(VARIABLE) == OFF:
        return
    # an error here does not matter to the command, or the command meets it itself a moment later
    with suppress(PjwError, OSError):
        stamp = _stamp(settings.client_crt)
        if stamp is None or not _is_of_today(stamp):
            files = settings.ca_crt, settings.client_crt, settings.client_key
            for words in ends_of(load_client_credentials(*files)):
                say(f"warning: {words} ({VARIABLE}={OFF} hides this)")
            if stamp is not None:
                _touch(stamp)


def _stamp(client_crt: str) -> str | None:
    """Return the path of the empty file for a certificate, in the user's directory for program state."""
    import hashlib

    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if not os.path.isabs(home):
        # A user without a home directory: we warn each time. The XDG Base Directory Specification has
        # programs ignore a relative XDG_STATE_HOME.
        return None
    digest = hashlib.sha256(read_path(client_crt, "certificate")).hexdigest()
    return os.path.join(home, "pjw", f"expiry-{digest[:32]}")


def _is_of_today(stamp: str) -> bool:
    try:
        # a time in the future comes from a clock that was set back since
        return 0 <= time.time() - os.stat(stamp).st_mtime < DAY_SECONDS
    except FileNotFoundError:
        return False


def _touch(stamp: str) -> None:
    os.makedirs(os.path.dirname(stamp), mode=0o700, exist_ok=True)
    os.close(os.open(stamp, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.utime(stamp)
