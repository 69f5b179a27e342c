"""A directory that is there only while it has something in it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final


class SparseDirectory:
    """Comes with its first entry, and goes with its last one. For any thread."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._changing: Final = threading.Lock()

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Make an entry within: the directory is there, 0700, and is not removed. Raises OSError."""
        with self._changing:
            os.makedirs(self.path, 0o700, exist_ok=True)
            try:
                yield
            except BaseException:
                self._remove()
                raise

    def tidy(self) -> None:
        """Remove the directory if it is empty; call this after the removal of an entry."""
        with self._changing:
            self._remove()

    def _remove(self) -> None:
        # not while there is another
        with suppress(OSError):
            os.rmdir(self.path)

    def names(self) -> list[str]:
        """Return the names in it."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []
