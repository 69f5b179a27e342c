"""Warns before the client's certificate or the server's authority expires: after that no call gets through.

A program gets the warning as a line in its log, from the logger `pjw.client.expiry`. The command line warns
in its own way (cli/expiry.py), and turns this logger off.
"""

import logging
from collections.abc import Iterator
from typing import Final

from pjw.certs.files import ClientCredentials

log: Final = logging.getLogger(__name__)

# the certificates that we have checked for the log
_told: Final[set[bytes]] = set()


def ends_of(credentials: ClientCredentials) -> Iterator[str]:
    """Yield a sentence for each of a client's certificates that expires soon: when, and the remedy."""
    # this import takes a third of the time of a `pjw get`
    from pjw.certs.checks import describe_time, ends_soon, first_end

    for what, pem in (
        ("client certificate", credentials.crt_pem),
        ("certificate of the server's authority", credentials.ca_pem),
    ):
        try:
            end = first_end(pem)
        except ValueError:
            # the connection will report the fault of this certificate
            continue
        if ends_soon(end):
            yield (
                f"the {what} expires on {describe_time(end)}, and then pjw cannot connect:"
                " ask your operator for a new bundle"
            )


def log_ends(credentials: ClientCredentials) -> None:
    """Log a warning for each certificate that expires soon, once in the life of this process."""
    if not log.isEnabledFor(logging.WARNING) or credentials.crt_pem in _told:
        return
    _told.add(credentials.crt_pem)
    for words in ends_of(credentials):
        log.warning("%s", words)
