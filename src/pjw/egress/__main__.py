"""Start pjwd-egress: give up root, then accept for jobs until the launcher is gone.

Descriptors: 0 and 1 null, 2 diagnostics, 3 a socket to the launcher, 4 a socket to the server. The launcher
sends datagrams of JSON: first the policy, then jobs with their listeners, and jobs that have ended. We answer
each with a byte. We tell the server of connections.
"""

import array
import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections import deque
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from pjw.process import open_standard_descriptors

_REQUESTS_FD, _REPORTS_FD = 3, 4
_REQUEST_BYTES_MAX: Final = 65_536
_LISTENERS_MAX: Final = 17
# Reports that wait for the server; later ones are lost.
_REPORTS_MAX: Final = 2000
# For jobs' listeners, and for the files and sockets of the resolver.
_DESCRIPTORS_SPARE: Final = 65_536
_THREADS_MAX: Final = 32
# the limit of this process's memory, far above its use
_DATA_BYTES_MAX: Final = 1 << 30
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def main() -> int:
    """Serve until the launcher hangs up; return the exit code."""
    open_standard_descriptors()
    os.closerange(_REPORTS_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # we end when the launcher ends; a terminal's keys reach both
        signal.signal(number, signal.SIG_IGN)
    requests, reports = (socket.socket(fileno=number) for number in (_REQUESTS_FD, _REPORTS_FD))
    try:
        policy = json.loads(requests.recv(_REQUEST_BYTES_MAX) or "null")
        requests.send(b".")
    except OSError:
        policy = None
    if policy is None:
        # the launcher has gone already
        return 0
    _give_up_root(policy["uid"], policy["connections_total_max"])
    asyncio.run(_serve(requests, reports, policy))
    return 0


def _give_up_root(uid: int, connections_total_max: int) -> None:
    import ctypes

    # import the modules needed later while we are root: perhaps only root can read the interpreter's
    # directory
    for name in ("concurrent.futures.thread", "encodings.idna", "linecache", "traceback", "stringprep"):
        import_module(name)
    from pjw.egress.proxy import descriptors_for
    from pjw.server.sandbox import Sandbox, enter

    for limit, most in (
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_DATA, _DATA_BYTES_MAX),
    ):
        resource.setrlimit(limit, (most, most))
    enter(Sandbox(None, (), descriptors_for(connections_total_max) + _DESCRIPTORS_SPARE), uid)
    # this counts all processes of the user, so it comes after the change of user
    resource.setrlimit(resource.RLIMIT_NPROC, (4 * _THREADS_MAX, 4 * _THREADS_MAX))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, b"pjwd-egress", 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def _serve(requests: socket.socket, reports: socket.socket, policy: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from pjw.egress.proxy import Proxy
    from pjw.egress.targets import Targets

    loop = asyncio.get_running_loop()
    # for the resolver
    loop.set_default_executor(ThreadPoolExecutor(_THREADS_MAX))
    told = _Reports(reports)
    most, total = policy["connections_max"], policy["connections_total_max"]
    proxy = Proxy(Targets(policy["private"]), told.add, most, total)
    requests.setblocking(False)
    over = asyncio.Event()

    def on_request() -> None:
        try:
            data, sockets = _receive(requests)
        except BlockingIOError:
            return
        except OSError:
            data, sockets = b"", []
        if not data:
            over.set()
            return
        try:
            _obey(proxy, json.loads(data), sockets)
        finally:
            # in any case: otherwise the launcher would wait, and with it the requests for others
            with suppress(OSError):
                requests.send(b".")

    loop.add_reader(requests, on_request)
    await over.wait()
    # otherwise we would wait for lookups that are under way
    os._exit(0)


def _obey(proxy: Any, said: dict[str, Any], sockets: list[socket.socket]) -> None:  # noqa: ANN401  imported late
    if "gone" in said:
        proxy.remove(said["gone"])
        return
    places = said["listeners"]
    listeners = [(each, host, port) for each, (host, port) in zip(sockets, places, strict=True)]
    proxy.add(said["job"], said["client"], said["allow"], listeners)


def _receive(requests: socket.socket) -> tuple[bytes, list[socket.socket]]:
    room = socket.CMSG_SPACE(4 * _LISTENERS_MAX)
    data, ancillary, _, _ = requests.recvmsg(_REQUEST_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return data, [socket.socket(fileno=number) for number in numbers]


class _Reports:
    """Reports to the server, in their order; those that it does not read in time are lost."""

    def __init__(self, server: socket.socket) -> None:
        server.setblocking(False)
        self._server: Final = server
        self._unsent: Final[deque[bytes]] = deque(maxlen=_REPORTS_MAX)

    def add(self, job_id: int, client: str, host: str, port: int, result: str) -> None:
        """Tell of one connection."""
        said = {"job": job_id, "client": client, "host": host, "port": port, "result": result}
        self._unsent.append(json.dumps(said).encode())
        self._send()

    def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self._server.send(self._unsent[0])
            except BlockingIOError:
                loop.add_writer(self._server, self._send)
                return
            except OSError:
                # the server has gone; the launcher will go as well
                self._unsent.clear()
                break
            self._unsent.popleft()
        loop.remove_writer(self._server)


if __name__ == "__main__":
    sys.exit(main())
