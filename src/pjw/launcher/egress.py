"""Keeps pjwd-egress, the process that connects for jobs to names on the network (pjw.egress).

pjwd-egress has the listeners of jobs, and so has the launcher: when pjwd-egress is killed, connections wait
in them for the next one. Of all that it says, only the end of its socket and the number of messages that it
has taken have an effect.
"""

import array
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.errors import KernelError
from pjw.launcher.policy import Policy
from pjw.launcher.processes import Watcher, say
from pjw.network import Listener

# as in pjw.egress: its socket to us, and its socket for reports of connections
_REQUESTS_FD, _REPORTS_FD = 3, 4
# So many messages may be under way: the kernel has room for more, so pjwd-egress never blocks us.
_WINDOW: Final = 32
# After so long a life we start it again at once; otherwise after a pause, which doubles each time.
_STEADY_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.2
_PAUSE_SECONDS_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Job:
    """The message about a job, and the sockets that go along."""

    told: bytes
    sockets: tuple[int, ...]


class EgressProcess:
    """The process, and all that it has to know."""

    def __init__(self, watcher: Watcher, policy: Policy) -> None:
        self._watcher: Final = watcher
        self._policy: Final = policy
        self._reports = -1
        self._jobs: Final[dict[int, _Job]] = {}
        self._requests: socket.socket | None = None
        self._unsent: Final[deque[tuple[bytes, tuple[int, ...]]]] = deque()
        self._on_the_way = 0
        self._started_at = 0.0
        self._pause = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether pjwd-egress runs, or will run again."""
        return self._reports >= 0

    @property
    def descriptors(self) -> int:
        """The number of descriptors that its jobs cost."""
        return sum(len(job.sockets) for job in self._jobs.values())

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._jobs

    def begin(self, reports: int) -> None:
        """Start it; it sends reports by the socket *reports*, which we own now. Raises KernelError."""
        self._reports = reports
        try:
            self._start()
        except OSError as error:
            self.close()
            raise KernelError("start", "pjwd-egress", error.errno or 0) from error

    def add(
        self,
        job_id: int,
        client: str,
        allow: Sequence[str],
        listeners: Sequence[Listener],
        sockets: Sequence[int],
    ) -> None:
        """Have it accept a job's connections; we own the sockets, one for each listener, from here on."""
        self.remove(job_id)
        places = [(listener.host, listener.port) for listener in listeners]
        told = {"job": job_id, "client": client, "allow": list(allow), "listeners": places}
        job = self._jobs[job_id] = _Job(json.dumps(told).encode(), tuple(sockets))
        self._tell(job.told, job.sockets)

    def remove(self, job_id: int) -> None:
        """Have it end all connections of a job; does nothing for a job that it does not have."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        # drop the message about the job if it waits, so that no socket is sent after its close
        waits = (job.told, job.sockets) in self._unsent
        if waits:
            self._unsent.remove((job.told, job.sockets))
        else:
            self._tell(json.dumps({"gone": job_id}).encode())
        for descriptor in job.sockets:
            os.close(descriptor)

    def close(self) -> None:
        """Have it end, and do not start it again."""
        if self._reports >= 0:
            os.close(self._reports)
            self._reports = -1
        self._hang_up()
        for job in self._jobs.values():
            for descriptor in job.sockets:
                os.close(descriptor)
        self._jobs.clear()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-I", "-m", "pjw.egress"],
                    {},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), _REQUESTS_FD),
                        (os.POSIX_SPAWN_DUP2, self._reports, _REPORTS_FD),
                    ],
                )
            ours.setblocking(False)
            self._requests = ours
            self._started_at = time.monotonic()
            self._watcher.reap_helper(pid, lambda: self._on_end(ours))
            self._watcher.watch(ours, lambda: self._on_taken(ours))
        except BaseException:
            self._hang_up()
            ours.close()
            raise
        policy = self._policy
        self._tell(
            json.dumps(
                {
                    "uid": policy.egress_uid,
                    "private": policy.egress_private,
                    "connections_max": policy.egress_connections_max,
                    "connections_total_max": policy.egress_connections_total_max,
                }
            ).encode()
        )
        for job in self._jobs.values():
            self._tell(job.told, job.sockets)

    def _tell(self, data: bytes, sockets: tuple[int, ...] = ()) -> None:
        if self._requests is not None:
            self._unsent.append((data, sockets))
            self._send()

    def _send(self) -> None:
        while self._requests is not None and self._unsent and self._on_the_way < _WINDOW:
            data, sockets = self._unsent.popleft()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sockets))] if sockets else []
            try:
                self._requests.sendmsg([data], rights)
            except OSError:
                # it has ended, and we will hear of that; or it takes nothing, and ends now that we hang up
                self._hang_up()
                return
            self._on_the_way += 1

    def _on_taken(self, requests: socket.socket) -> None:
        """Note that pjwd-egress has taken messages: it sends a byte for each."""
        data = b""
        with suppress(ConnectionResetError):
            data = requests.recv(64)
        if not data:
            self._hang_up()
            return
        self._on_the_way = max(0, self._on_the_way - len(data))
        self._send()

    def _hang_up(self) -> None:
        if self._requests is not None:
            self._watcher.unwatch(self._requests)
            self._requests.close()
            self._requests = None
        self._unsent.clear()
        self._on_the_way = 0

    def _on_end(self, requests: socket.socket) -> None:
        if self._requests is requests:
            self._hang_up()
        if not self.has_begun or self._requests is not None:
            return
        is_steady = time.monotonic() - self._started_at > _STEADY_SECONDS
        self._pause = 0.0 if is_steady else min(max(_PAUSE_SECONDS, 2 * self._pause), _PAUSE_SECONDS_MAX)
        say("pjwd-egress has ended; another one is started, and connections of jobs wait meanwhile")
        self._watcher.call_after(self._pause, self._start_again)

    def _start_again(self) -> None:
        if not self.has_begun or self._requests is not None:
            return
        try:
            self._start()
        except OSError:
            self._pause = _PAUSE_SECONDS_MAX
            self._watcher.call_after(self._pause, self._start_again)
