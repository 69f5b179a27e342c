"""Warns in the log before a certificate of the server expires: at the start, at a reload, and once a day."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from pjw.certs.checks import EXPIRES_SOON, describe_time
from pjw.certs.files import ServerCredentials

DAY_SECONDS: Final = 86_400

log: Final = logging.getLogger(__name__)


def first_end(pem: bytes) -> datetime:
    """When the first certificate of a file to expire does so."""
    return min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(pem))


def warn_of_ends(credentials: ServerCredentials) -> None:
    """Warn of each certificate of the server that expires within two weeks, or has expired."""
    now = datetime.now(UTC)
    for what, pem in (("server's certificate", credentials.crt_pem), ("authority", credentials.ca_pem)):
        end = first_end(pem)
        if end - now < EXPIRES_SOON:
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
