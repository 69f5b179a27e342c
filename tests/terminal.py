"""A program at a terminal of its own: keys that are pressed, and the screen that a person would see."""

import fcntl
import os
import select
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import pyte

CTRL_C: Final = b"\x03"


class Terminal:
    """A pseudo-terminal with a program in its foreground; a context manager, which ends both."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, columns: int = 100, rows: int = 24
    ) -> None:
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (rows, columns))
        self._screen: Final = pyte.Screen(columns, rows)
        self._stream: Final = pyte.ByteStream(self._screen)
        self.sent = b""

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process: Final = subprocess.Popen(
            command,
            env={**env, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=own_terminal,  # noqa: PLW1509  nothing but two system calls
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._ours, keys)

    def text(self) -> str:
        """What is on the screen, without the blanks at its edges."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def until(self, condition: Callable[[str], object], seconds: float = 30) -> str:
        """Wait until the screen is as it should be; what is on it then."""
        deadline = time.monotonic() + seconds
        while not condition(self.text()):
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._ours], [], [], left)[0]
            assert ready and self._read(), f"this is on the screen:\n{self.text()}"
        return self.text()

    def end(self, seconds: float = 30) -> int:
        """Wait until the program has ended; its exit code."""
        deadline = time.monotonic() + seconds
        while select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not self._read():
                return self.process.wait(max(0.1, deadline - time.monotonic()))
        raise AssertionError(f"it has not ended; this is on the screen:\n{self.text()}")

    def _read(self) -> bool:
        data = b""
        # EIO is a terminal's word for "all have hung up"
        with suppress(OSError):
            data = os.read(self._ours, 65536)
        self.sent += data
        self._stream.feed(data)
        return bool(data)
