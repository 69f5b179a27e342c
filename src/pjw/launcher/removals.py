"""Removals of scratch directories: some at a time, and clients take turns.

A job may leave millions of files or thousands of levels of directories, so a removal may take minutes. It
must hold up no other client's removal, and all of them together must not keep the disk from others.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from pjw.errors import JobStateError
from pjw.launcher.processes import Watcher
from pjw.launcher.scratch import Scratch

# How many at a time, in all and of one user, which is one client.
AT_ONCE: Final = 4
AT_ONCE_OF_ONE: Final = 2


class Removals:
    """The directories that are being removed, and those that wait for their turn."""

    def __init__(self, watcher: Watcher, scratch: Scratch) -> None:
        self._watcher: Final = watcher
        self._scratch: Final = scratch
        # who is told of the end, by the job
        self._then: Final[dict[int, Callable[[], None]]] = {}
        # by their users, the one first who has waited for a turn longest
        self._waiting: Final[dict[int, deque[int]]] = {}
        self._running: Final[dict[int, set[int]]] = {}

    def begin(self, job_id: int, then: Callable[[], None]) -> None:
        """Remove a job's directory when its turn has come, and go on with *then*, whether it is gone or not.

        Raises JobStateError when that was begun already.
        """
        if job_id in self._then:
            raise JobStateError(f"what job {job_id} left is being removed")
        self._then[job_id] = then
        self._waiting.setdefault(self._scratch.owner(job_id), deque()).append(job_id)
        self._spawn_next()

    def _spawn_next(self) -> None:
        while sum(map(len, self._running.values())) < AT_ONCE:
            # whoever has fewest, and of these whoever has waited longest
            uid = min(self._waiting, key=self._running_of, default=None)
            if uid is None or self._running_of(uid) == AT_ONCE_OF_ONE:
                return
            waiting = self._waiting.pop(uid)
            job_id = waiting.popleft()
            if waiting:
                # behind the others
                self._waiting[uid] = waiting
            self._running.setdefault(uid, set()).add(job_id)
            pid = self._scratch.spawn_removal(job_id)
            self._watcher.reap_helper(pid, partial(self._on_end, uid, job_id))

    def _running_of(self, uid: int) -> int:
        return len(self._running.get(uid, ()))

    def _on_end(self, uid: int, job_id: int) -> None:
        self._running[uid].discard(job_id)
        if not self._running[uid]:
            del self._running[uid]
        then = self._then.pop(job_id)
        self._spawn_next()
        then()
