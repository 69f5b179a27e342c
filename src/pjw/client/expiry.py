"""Warns before the client's certificate or its authority expires: then no call gets through any more.

A program hears of it by a line in its log, from the logger `pjw.client.expiry`; `pjw` has its own way
(cli/expiry.py), and turns that logger off.
"""

import logging
from collections.abc import Iterator
from typing import Final

from pjw.certs.files import ClientCredentials

log: Final = logging.getLogger(__name__)

# the certificates that the log has been told of
_told: Final[set[bytes]] = set()


def ends_of(credentials: ClientCredentials) -> Iterator[str]:
    """In words, what of a client's certificates expires soon, and what to do about it."""
    # for `pjw` this import is a third of a call
    from pjw.certs.checks import describe_time, ends_soon, first_end

    for what, pem in (
        ("client certificate", credentials.crt_pem),
        ("certificate of the server's authority", credentials.ca_pem),
    ):
        try:
            end = first_end(pem)
        except ValueError:
            # whoever connects with it is told what is wrong
            continue
        if ends_soon(end):
            yield (
                f"the {what} expires on {describe_time(end)}, and then pjw cannot connect:"
                " ask your operator for a new bundle"
            )


def log_ends(credentials: ClientCredentials) -> None:
    """Log a warning of each, once in the life of this process."""
    if not log.isEnabledFor(logging.WARNING) or credentials.crt_pem in _told:
        return
    _told.add(credentials.crt_pem)
    for words in ends_of(credentials):
        log.warning("%s", words)
