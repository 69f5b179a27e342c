"""The client, when a command needs it, and jobs by id or name."""

import gc
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from pjw.cli.expiry import warn_of_ends
from pjw.cli.settings import find_settings
from pjw.errors import ConfigError, JobStateError

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient
    from pjw.client.sync import Client

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
    from pjw.certs.address import server_address

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
