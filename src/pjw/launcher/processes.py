"""Processes by their pidfds, timers, and deadlines for calls that may block."""

import contextlib
import heapq
import itertools
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Final, Never

# This signal plus N has init send signal N to its job (init/init.h, SIGNAL_FIRST).
INIT_SIGNAL_FIRST: Final = 33
# Tells an init that a session may be in its job (init/init.h, ENTERED).
ENTERED_SIGNAL: Final = signal.SIGUSR1
# The kernel gives the others the next time. Python makes room for this many each time.
_EVENTS_AT_ONCE: Final = 16


def has_ended(pidfd: int) -> bool:
    """Tell whether the process of a pidfd has ended."""
    return is_ready(pidfd, select.POLLIN)


def is_ready(descriptor: int, events: int) -> bool:
    """Tell whether one of the events of poll(2) is there, without waiting for it."""
    # not select(2): that takes no descriptor above 1023, and each job is one
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(0))


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal; to a process that has ended already, none."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def network_of(pidfd: int) -> int:
    """Return the network namespace of a process (namespaces(7)); -1 when it has ended, or soon will.

    It stays while its descriptor is open, whatever becomes of the process.
    """
    descriptor = -1
    with contextlib.suppress(OSError):
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as info:
            pid = next(int(line.split()[1]) for line in info if line.startswith(b"Pid:"))
        descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    # looked at again now: the number was still that process's
    if descriptor >= 0 and has_ended(pidfd):
        os.close(descriptor)
        return -1
    return descriptor


def collect(pidfd: int) -> None:
    """Collect an ended child, and close its pidfd; an adopted one is collected by its own parent."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


def find_init(pids: Callable[[], Collection[int]]) -> int | None:
    """Return a pidfd of the init of a job whose processes now are *pids*; None when it has ended.

    It may be none of them: an init that was killed leaves its cgroup and then waits for the others
    (zap_pid_ns_processes of the kernel), which takes as long as one of them is stuck.
    """
    members = pids()
    for pid in itertools.chain(members, _parents(members)):
        if not _is_init(pid):
            continue
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        found = False
        try:
            # Looked at again now that the pidfd is there: it is still the process that we read of.
            members = pids()
            found = _is_init(pid) and (pid in members or pid in _parents(members))
        finally:
            if not found:
                os.close(pidfd)
        if found:
            return pidfd
    return None


def _is_init(pid: int) -> bool:
    """Return whether it is PID 1 of a namespace that lies in ours (proc(5), NSpid)."""
    return status_of(pid, b"NSpid")[1:] == [b"1"]


def _parents(pids: Collection[int]) -> Iterator[int]:
    return (int(word) for pid in pids for word in status_of(pid, b"PPid"))


def status_of(pid: int | str, name: bytes) -> list[bytes]:
    """Return the words of a line of /proc/PID/status (proc(5)); none of a process that is gone."""
    with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/status", "rb") as status,
    ):
        for line in status:
            if line.startswith(name + b":"):
                return line.split()[1:]
    return []


class Timer:
    """A call to come, unless it is cancelled."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Drop the callback: it is never called."""
        self._callback = None

    @property
    def cancelled(self) -> bool:
        """Whether it is not to be called any more."""
        return self._callback is None

    def fire(self) -> None:
        """Call it now."""
        if self._callback is not None:
            self._callback()


class Watcher:
    """The events that the launcher's one thread waits for, and the callback of each."""

    def __init__(self) -> None:
        # Not selectors: its own bookkeeping takes longer than the system calls.
        self._epoll: Final = select.epoll()
        self._callbacks: Final[dict[int, Callable[[], None]]] = {}
        # by when they are due; the number is for those that are due at the same moment
        self._timers: Final[list[tuple[float, int, Timer]]] = []
        self._numbers: Final = itertools.count()

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()

    def watch(self, source: socket.socket | int, callback: Callable[[], None]) -> None:
        """Call *callback* whenever *source* is readable, until `unwatch`; in the place of another, if any."""
        descriptor = _number_of(source)
        with contextlib.suppress(FileExistsError):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._callbacks[descriptor] = callback

    def unwatch(self, source: socket.socket | int) -> None:
        """Do not any more, before it is closed; nothing happens where it was not watched."""
        descriptor = _number_of(source)
        if self._callbacks.pop(descriptor, None) is not None:
            # closed already: the kernel has forgotten it, unless another process has it, too
            with contextlib.suppress(OSError):
                self._epoll.unregister(descriptor)

    def call_after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call *callback* once, so much later."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))
        return timer

    def reap_helper(self, pid: int, then: Callable[[], None] = lambda: None) -> None:
        """Collect a child of which there is no pidfd yet, when it has ended, and go on with *then*."""
        # safe against reuse of the pid: a child keeps its pid until we reap it
        pidfd = os.pidfd_open(pid)

        def on_end() -> None:
            self.unwatch(pidfd)
            collect(pidfd)
            then()

        try:
            self.watch(pidfd, on_end)
        except OSError:
            os.close(pidfd)
            raise

    def run_once(self, seconds: float | None = None) -> bool:
        """Call all due callbacks, after at most *seconds*; return whether a descriptor was ready."""
        events = self._epoll.poll(self._timeout(seconds), _EVENTS_AT_ONCE)
        ready = [(descriptor, self._callbacks[descriptor]) for descriptor, _ in events]
        for descriptor, callback in ready:
            # One callback may end the watch of another: a request takes an init whose report is due as well.
            if self._callbacks.get(descriptor) is callback:
                callback()
        # Descriptors go first: a deadline that has passed because we were held up is no news.
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        return bool(ready)

    def _timeout(self, seconds: float | None) -> float | None:
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return seconds
        left = max(0.0, self._timers[0][0] - time.monotonic())
        return left if seconds is None else min(left, seconds)


def _number_of(source: socket.socket | int) -> int:
    return source if isinstance(source, int) else source.fileno()


# Deadlines for calls that may block for ever: the launcher's only thread serves all jobs.

# The launcher drops a line that stderr does not take in this time: a full pipe, a terminal stopped by Ctrl-S.
SAY_SECONDS: Final = 1.0


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Make a call that may block; return whether it came back in time.

    Only in the main thread, and not nested.
    """
    # flock(2), fcntl(2) and write(2) have no deadline; a signal handler that raises ends their wait
    former = signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        call()
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return True


def say(text: str) -> None:
    """Write a line to stderr, unless stderr does not take it within SAY_SECONDS."""
    data = f"pjwd: launcher: {text}\n".encode(errors="backslashreplace")
    with suppress(OSError):
        within(SAY_SECONDS, lambda: os.write(2, data))


def _on_alarm(number: int, frame: object) -> Never:
    raise TimeoutError
