"""Processes by their pidfds: finding them, whether they have ended, waiting for that, and collecting them."""

import contextlib
import os
import select
import selectors
import signal
import socket
from collections.abc import Callable, Collection
from typing import Final


def has_ended(pidfd: int) -> bool:
    """Tell whether the process of a pidfd has ended."""
    return is_ready(pidfd, select.POLLIN)


def wait_for(pidfd: int) -> None:
    """Wait until a process that is ending has ended."""
    _poll(pidfd, select.POLLIN, None)


def is_ready(descriptor: int, events: int) -> bool:
    """Tell whether one of the events of poll(2) is there, without waiting for it."""
    return _poll(descriptor, events, 0)


def _poll(descriptor: int, events: int, timeout: int | None) -> bool:
    # not select(2): that takes no descriptor above 1023, and each job is one
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(timeout))


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal; to a process that has ended already, none."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def end(pidfd: int) -> None:
    """Kill a child, collect it, and close its pidfd."""
    send_signal(pidfd, signal.SIGKILL)
    wait_for(pidfd)
    collect(pidfd)


def collect(pidfd: int) -> None:
    """Collect an ended child, and close its pidfd; one that is not ours (adopted) has another who does."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


def find_init(pids: Callable[[], Collection[int]]) -> int | None:
    """A pidfd of that one of *pids*, of now, that is PID 1 of its own namespace (proc(5), NSpid)."""
    for pid in pids():
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if status_of(pid, b"NSpid")[-1:] == [b"1"] and pid in pids():
            # Looked at again after the pidfd was there: it is still the process that we read of.
            return pidfd
        os.close(pidfd)
    return None


def status_of(pid: int | str, name: bytes) -> list[bytes]:
    """The words of a line of /proc/PID/status (proc(5)); none of a process that is gone."""
    with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/status", "rb") as status,
    ):
        for line in status:
            if line.startswith(name + b":"):
                return line.split()[1:]
    return []


class Watcher:
    """What the launcher's one thread waits for, and who is called then."""

    def __init__(self) -> None:
        self._selector: Final = selectors.DefaultSelector()

    def close(self) -> None:
        """Watch nothing any more."""
        self._selector.close()

    def watch(self, source: socket.socket | int, callback: Callable[[], None]) -> None:
        """Call *callback* whenever *source* is readable, until `unwatch`."""
        self._selector.register(source, selectors.EVENT_READ, callback)

    def unwatch(self, source: socket.socket | int) -> None:
        """Do not any more; nothing happens where it was not watched."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(source)

    def reap_helper(self, pid: int, then: Callable[[], None] = lambda: None) -> None:
        """Collect a child of which there is no pidfd yet, when it has ended, and go on with *then*."""
        # safe against reuse of the pid: a child keeps its pid until we reap it
        pidfd = os.pidfd_open(pid)

        def on_end() -> None:
            self.unwatch(pidfd)
            collect(pidfd)
            then()

        self.watch(pidfd, on_end)

    def run_once(self, *, wait: bool) -> bool:
        """Call all who are due; without *wait* only those who are due now. Whether there was one."""
        ready = self._selector.select(None if wait else 0)
        for key, _ in ready:
            # What one of them does may end the watch of another: a request takes an init whose report
            # is due as well.
            if self._selector.get_map().get(key.fd) == key:
                key.data()
        return bool(ready)
