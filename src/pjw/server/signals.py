"""Signals for an event loop: each is acted on, however many come."""

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

# more than enough bytes to read at a time; their values do not matter
_READ_BYTES: Final = 4096


class Signals:
    """Calls functions in the running loop after their signals; made and closed by the main thread.

    Not loop.add_signal_handler: it tells the loop which signal came by a byte in a socket, so that a signal
    is lost when others fill that socket first. Here the bytes only wake the loop, and Python itself remembers
    which signals came (signal(3): one of each kind, as the kernel does while they are pending).
    """

    def __init__(self) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._before: Final[dict[int, object]] = {}
        self._wake, self._write = socket.socketpair()

    def __enter__(self) -> Self:
        self._wake.setblocking(False)
        self._write.setblocking(False)
        self._loop.add_reader(self._wake, self._read)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # the value that signal() returned
        signal.set_wakeup_fd(-1)
        self._loop.remove_reader(self._wake)
        self._wake.close()
        self._write.close()

    def handle(self, number: int, act: Callable[[], None]) -> None:
        """Have *act* called, once or more, after each signal *number* from now on."""
        # a handler of Python's may come between any two steps of the loop: it only leaves word
        before = signal.signal(number, lambda *_: self._loop.call_soon_threadsafe(act))
        self._before.setdefault(number, before)

    def _read(self) -> None:
        # the handlers run by themselves as soon as the main thread does anything
        with suppress(BlockingIOError):
            self._wake.recv(_READ_BYTES)
