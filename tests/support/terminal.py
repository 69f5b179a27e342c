"""A program at a terminal, and what a person would see there."""

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

WAIT_SECONDS: Final = 60


class Terminal:
    """A program with a terminal of its own, until the end of a `with` block, which kills it."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, columns: int = 100, lines: int = 30
    ) -> None:
        self.command: Final = command
        self.screen: Final = pyte.Screen(columns, lines)
        # all that it was sent
        self.bytes: Final = bytearray()
        self._stream: Final = pyte.ByteStream(self.screen)
        self._descriptor, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (lines, columns))
        self.process: Final = subprocess.Popen(
            # not only stdin: a shell wants a terminal that controls its session
            ["setsid", "--ctty", *command],
            env={"TERM": "xterm-256color", "LANG": "C.UTF-8", **env},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._descriptor)

    @property
    def text(self) -> str:
        """What is on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._descriptor, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Make the window another size."""
        self.screen.resize(lines, columns)
        termios.tcsetwinsize(self._descriptor, (lines, columns))

    @property
    def settings(self) -> list[object]:
        """How the terminal is set: raw, or as a shell likes it."""
        return termios.tcgetattr(self._descriptor)

    def wait_for(self, *words: str) -> str:
        """Wait until all of these words are on the screen; what is there then."""
        return self.wait_until(lambda text: all(word in text for word in words), f"{words} to be there")

    def wait_until(self, condition: Callable[[str], object], what: str = "a condition") -> str:
        """Wait until what is on the screen fulfils a condition."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition(self.text):
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"waited for {what} and saw:\n{self.text}"
        return self.text

    def wait_for_end(self) -> int:
        """Read to the end of the program; its exit code."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        return self.process.wait(max(0.0, deadline - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        """Take what comes within so much time; False at the end of the program and of the time."""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return False
        data = b""
        # EIO is a terminal's word for "all have hung up"
        with suppress(OSError):
            data = os.read(self._descriptor, 65536)
        self.bytes.extend(data)
        self._stream.feed(data)
        return bool(data)
