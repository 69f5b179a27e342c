"""Reports of pjwd-egress about the connections of jobs to names on the network.

pjwd-egress is a process of the launcher's, which connects for jobs. The launcher tells it their listeners,
and it reports each connection to us by a socket of our own.
"""

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from pjw.errors import PjwError
from pjw.worker.launcher_client import LauncherClient

# The results of a connection. CONNECTED; NOT_ALLOWED: its job has not asked for the name; PRIVATE: the name
# leads to an address that no job may reach; UNRESOLVED, UNREACHABLE; INVALID: no request that a proxy takes;
# SLOW: the request did not come in time; BUSY: the job, its client or all jobs have too many.
RESULTS: Final = (
    *("connected", "not_allowed", "private", "unresolved", "unreachable", "invalid", "slow", "busy"),
)
_REPORT_BYTES_MAX: Final = 2048
# Others have their turn after this many.
_REPORTS_AT_ONCE: Final = 64
# So many connections of a client are written down at once, and so many a second from then on: a job that is
# refused again and again must not fill the disk with lines.
_LINES_AT_ONCE: Final = 200
_LINES_PER_SECOND: Final = 10.0
# An allowance is kept for each client with jobs; the sender of reports is not taken at its word.
_CLIENTS_MAX: Final = 4096

log: Final = logging.getLogger("pjw.egress")


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection of a job: its target, and its result, one of RESULTS."""

    job_id: int
    client_name: str
    host: str
    port: int
    result: str
    # the number of the client's connections before it that were counted, and not written down
    left_out: int = 0


class _Allowance:
    """The lines of the log that a client may have now."""

    def __init__(self, now: float) -> None:
        self._lines = float(_LINES_AT_ONCE)
        self._counted = now
        self.left_out = 0

    def take(self, now: float) -> bool:
        """Take a line from the allowance; return whether there was one."""
        self._lines = min(_LINES_AT_ONCE, self._lines + (now - self._counted) * _LINES_PER_SECOND)
        self._counted = now
        if self._lines < 1:
            self.left_out += 1
            return False
        self._lines -= 1
        return True


class Connections:
    """The reports of pjwd-egress about connections: counted, and within bounds logged and passed on."""

    def __init__(self) -> None:
        self.counts: Final[Counter[str]] = Counter(dict.fromkeys(RESULTS, 0))
        # called with each connection
        self.told: Final[list[Callable[[Connection], None]]] = []
        self._allowances: Final[dict[str, _Allowance]] = {}
        self._socket: socket.socket | None = None

    async def begin(self, launcher: LauncherClient) -> None:
        """Have the launcher start pjwd-egress; without that jobs have no network, and all else goes on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._on_reports)
        try:
            await launcher.request_egress(theirs.detach())
        except PjwError as error:
            log.error("jobs reach no names on the network: %s", error)

    def close(self) -> None:
        """Hear no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _on_reports(self) -> None:
        for _ in range(_REPORTS_AT_ONCE):
            if self._socket is None:
                return
            try:
                data = self._socket.recv(_REPORT_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                # launcher and pjwd-egress have both gone; the first is noticed by others
                self.close()
                return
            # the sender deals with the internet, so it is not taken at its word
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                self._tell(_connection_of(data))

    def _tell(self, connection: Connection) -> None:
        self.counts[connection.result] += 1
        now = asyncio.get_running_loop().time()
        if len(self._allowances) > _CLIENTS_MAX:
            self._allowances.clear()
        allowance = self._allowances.setdefault(connection.client_name, _Allowance(now))
        if not allowance.take(now):
            return
        connection = replace(connection, left_out=allowance.left_out)
        allowance.left_out = 0
        log.info(
            "connection of job %d of %s to %s port %d: %s%s",
            connection.job_id,
            connection.client_name,
            connection.host or "(nowhere)",
            connection.port,
            connection.result,
            f"; {connection.left_out} before it were not written down" if connection.left_out else "",
        )
        for tell in self.told:
            tell(connection)


def _connection_of(data: bytes) -> Connection:
    """Parse a report. Raises ValueError, TypeError or KeyError for anything else."""
    said = json.loads(data.decode())
    found = Connection(said["job"], said["client"], said["host"], said["port"], said["result"])
    numbers = all(type(each) is int and 0 <= each < 2**63 for each in (found.job_id, found.port))
    texts = all(
        isinstance(said[name], str) and said[name].isprintable() for name in ("client", "host", "result")
    )
    if not numbers or not texts or found.result not in RESULTS:
        raise ValueError("no report of a connection")
    return found
