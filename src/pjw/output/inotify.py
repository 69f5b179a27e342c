"""Wakes on changes of files, by inotify(7). The standard library has no binding for it."""

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable
from typing import Final

from pjw.errors import KernelError

IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_CLOSE_WRITE: Final = 0x8
_IN_Q_OVERFLOW: Final = 0x4000
_EVENT: Final = struct.Struct("iIII")  # wd, mask, cookie, length of the name behind it
_READ_BYTES: Final = 65_536

# PyDLL: it is quicker to keep the interpreter's lock for calls that wait for nothing.
_libc: Final = ctypes.PyDLL(None, use_errno=True)


class Inotify:
    """One inotify instance for one kind of change, read by the running event loop."""

    def __init__(self, kind: int = IN_MODIFY) -> None:
        """Make an instance; *kind* is a mask of inotify(7). Raises KernelError, as for too many instances."""
        self._fd: Final = self._call(
            "make", "an inotify instance", "inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC
        )
        self._kind: Final = kind
        self._callbacks: Final[dict[int, Callable[[], None]]] = {}
        self._loop: Final = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_readable)

    def watch(self, path: str, callback: Callable[[], None]) -> int:
        """Call *callback* after changes of *path*; return the number for `unwatch`. Raises KernelError.

        One file is watched once: a second watch would replace the first one's callback.
        """
        watch = self._call("watch", path, "inotify_add_watch", self._fd, os.fsencode(path), self._kind)
        self._callbacks[watch] = callback
        return watch

    def unwatch(self, watch: int) -> None:
        """End a watch."""
        # A follower may outlive the instance, whose number may be another file's by then.
        if self._callbacks.pop(watch, None) is not None:
            _libc.inotify_rm_watch(self._fd, watch)

    def close(self) -> None:
        """End all watches."""
        self._callbacks.clear()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    @staticmethod
    def _call(operation: str, subject: str, function: str, *arguments: int | bytes) -> int:
        result: int = getattr(_libc, function)(*arguments)
        if result < 0:
            raise KernelError(operation, subject, ctypes.get_errno(), hint="see fs.inotify in sysctl(8)")
        return result

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            events = os.read(self._fd, _READ_BYTES)
            offset = 0
            while offset < len(events):
                watch, mask, _, name_bytes = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size + name_bytes
                if mask & _IN_Q_OVERFLOW:
                    # The kernel has dropped events: anything may have changed.
                    for callback in list(self._callbacks.values()):
                        callback()
                elif watch in self._callbacks:
                    self._callbacks[watch]()
