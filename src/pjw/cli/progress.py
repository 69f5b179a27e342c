"""A line on the terminal while one waits; nothing anywhere else."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

# Work that is over sooner needs no line.
QUIET_SECONDS: Final = 0.7
TURN_SECONDS: Final = 0.5
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """Shows *words*, which are given the seconds since the beginning, until it is left."""

    def __init__(self, words: Callable[[float], str]) -> None:
        self._words: Final = words
        self._over: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            # a daemon: a user who leaves by Ctrl-C does not wait for it
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        began = time.monotonic()
        if self._over.wait(QUIET_SECONDS):
            return
        while True:
            sys.stderr.write(f"{_CLEAR}{self._words(time.monotonic() - began)}")
            sys.stderr.flush()
            if self._over.wait(TURN_SECONDS):
                break
        sys.stderr.write(_CLEAR)
        sys.stderr.flush()
