"""Warns in the log before a certificate of the server expires: at the start, at a reload, and once a day."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from pjw.certs.checks import describe_time, ends_soon, first_end
from pjw.certs.files import ServerCredentials

DAY_SECONDS: Final = 86_400

log: Final = logging.getLogger(__name__)


def warn_of_ends(credentials: ServerCredentials) -> None:
    """Warn of each certificate of the server that expires within two weeks, or has expired."""
    for what, pem in (("server's certificate", credentials.crt_pem), ("authority", credentials.ca_pem)):
        end = first_end(pem)
        if ends_soon(end):
            log.warning(
                "the %s expires on %s, and then nobody can connect: renew it (pjwd certs renew), and reload",
                what,
                describe_time(end),
            )


async def warn_each_day(credentials: Callable[[], ServerCredentials]) -> None:
    """Call warn_of_ends once a day, for as long as the server runs."""
    while True:
        warn_of_ends(credentials())
        await asyncio.sleep(DAY_SECONDS)
