"""The client of a command: its settings, its warnings about certificates, and jobs by id or name."""

import gc
import os
import sys
import time
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pjw.certs.files import load_client_credentials, read_path
from pjw.cli.exits import say
from pjw.client import config
from pjw.client.config import ClientSettings, ends_of
from pjw.errors import ConfigError, JobStateError, PjwError

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient
    from pjw.client.sync import Client

# The server and the certificates of a command: its options, before all that `pjw.client.config` reads.


def find_settings(arguments: Namespace) -> ClientSettings:
    """Gather the settings. Raises ConfigError that says which is missing and how to give it."""
    # pjw warns in its own way (cli/connection.py)
    config.log.disabled = True
    options = {key: getattr(arguments, key) for key in config.KEYS}
    return config.find_settings(getattr(arguments, "context", None), options)


def options_of(arguments: Namespace) -> list[str]:
    """Return the same options again, for another pjw that is to find the same settings."""
    given = {key: getattr(arguments, key, None) for key in ("context", *config.KEYS)}
    return [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]


# A job as it is typed: its id, or its name.
JobName = int | str


def connect(arguments: Namespace) -> "Client":
    """Make a client with the settings found; a context manager. Raises ConfigError."""
    settings = find_settings(arguments)
    warn_of_ends(settings)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    return _client_class()(settings.server, *files, all_clients=arguments.all)


def connect_async(arguments: Namespace) -> "AsyncClient":
    """Make the same client for asyncio; an asynchronous context manager."""
    from pjw.client.aio import AsyncClient

    settings = find_settings(arguments)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    return AsyncClient(settings.server, *files)


def job_name(text: str) -> JobName:
    """Parse the name of a job, as a `type` of argparse: a number is an id, `17_5` an element."""
    # int() alone would take "1_0", " 1 " and digits of other scripts
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdecimal() and len(digits) <= 100:
        return int(text)
    # the client imports them in any case
    from pjw.arrays import Element
    from pjw.model import is_name

    if Element.of(text) is not None:
        return text

    if not is_name(text):
        raise ArgumentTypeError(f"{text[:40]!r} is neither a job's id, which is a whole number, nor its name")
    return text


def server(text: str) -> str:
    """Parse HOST:PORT of a server, as a `type` of argparse."""
    from pjw.given import server_address

    try:
        return server_address(text)
    except ConfigError as error:
        raise ArgumentTypeError(f"{error}; {error.hint}") from None


def resolve(client: "Client", job: JobName) -> JobName:
    """Return the client's reference to a job: its id, or an element as it is.

    Raises JobNotFoundError for a name that no job has.
    """
    if isinstance(job, int) or job[:1].isdecimal():
        return job
    return client.find(job).id


def resolve_id(client: "Client", job: JobName) -> int:
    """Return the id of a job or of an element. Raises JobStateError for an element without one (yet)."""
    found = resolve(client, job)
    if isinstance(found, int):
        return found
    element = client.get(found)
    if not element.id:
        raise JobStateError(f"element {found} has not been started")
    return element.id


def _client_class() -> "type[Client]":
    """Import the client, and gRPC with it: `pjw --help` need not wait for that."""
    # Imported objects stay. A search for garbage in them, at every 700 objects or once at the end, takes a
    # tenth of a whole `pjw get`: hence they are frozen as well.
    gc.disable()
    try:
        from pjw.client.sync import Client
    finally:
        gc.freeze()
        gc.enable()
    return Client


# Warns a user at a terminal before a certificate expires, at most once a day for each.
#
# An empty file has the day of the last check as its modification time. On that day we do not parse the
# certificate again, which would take a third of the time of a `pjw get`.

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
