"""A copy of the job table as it is at one moment, while the table is in use.

A worker locks the table (table.py), so no other process can read it. So the worker copies it itself, with
SQLite's backup API, and hands out a descriptor. SQLite opens files by their paths. A server that has given
root up may be unable to reach its own state directory by path, so the file is opened before.
"""

import os
import sqlite3
from contextlib import suppress
from typing import Final

from pjw.amounts import size_in_words
from pjw.errors import JobTableError, KernelError, LimitReachedError
from pjw.worker.settings import DiskMarks
from pjw.worker.store import JobStore

_NAME: Final = "table-copy"


class TableCopy:
    """A file without a name in the state directory, which holds one copy at a time."""

    def __init__(self, state_dir: str) -> None:
        """Open it; as root, and before privilege is dropped. Raises KernelError."""
        path = os.path.join(state_dir, _NAME)
        try:
            # left by a crash between here and the end of this block
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._descriptor: Final = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._db: Final = sqlite3.connect(path, check_same_thread=False)
                # a copy that breaks off is never used, and `pjwd backup` syncs its own file
                self._db.execute("PRAGMA journal_mode = OFF")
                self._db.execute("PRAGMA synchronous = OFF")
            except BaseException:
                os.close(self._descriptor)
                raise
            finally:
                os.unlink(path)
        except OSError as error:
            raise KernelError("make", path, error.errno or 0) from error
        except sqlite3.Error as error:
            raise JobTableError("make", path, error) from error

    def take(self, store: JobStore, marks: DiskMarks) -> int:
        """Copy the table; return the descriptor of the copy, ours to close.

        Blocks for as long as the disk takes.

        Raises LimitReachedError when the disk is full, or would have less free than *marks* say; and
        KernelError.
        """
        self._require_space(store.size_bytes(), marks)
        store.copy_to(self._db)
        return self._descriptor

    def _require_space(self, needed: int, marks: DiskMarks) -> None:
        # with less free space pjwd would end a client's job (disk.py)
        free, mark = marks.free_and_mark(os.fstatvfs(self._descriptor))
        if free - needed < mark:
            raise LimitReachedError(
                f"the copy of the job table takes {size_in_words(needed)}, and the file system of the state"
                f" directory has {size_in_words(free)} free, of which {size_in_words(mark)} stay free"
                " (disk.free_bytes_min)"
            )

    def clear(self) -> None:
        """Free the space of the copy. Raises KernelError."""
        try:
            # SQLite takes an empty file for an empty table
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise KernelError("empty", "the copy of the job table", error.errno or 0) from error

    def close(self) -> None:
        """Close the file, and so remove it."""
        self._db.close()
        os.close(self._descriptor)
