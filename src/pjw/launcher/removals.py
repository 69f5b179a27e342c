"""Removals of scratch directories and workspaces: some at a time, and clients take turns.

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

# The most removals at a time, in all and of one user, which is one client.
AT_ONCE: Final = 4
AT_ONCE_OF_ONE: Final = 2

# The thing to remove: the scratch of a job, by its id, or a workspace, by its user and its name.
Key = int | tuple[int, str]
# Begins to remove a directory, and gives the pid of the process that does.
Spawn = Callable[[], int]


class Removals:
    """The directories that are being removed, and those that wait for their turn."""

    def __init__(self, watcher: Watcher, scratch: Scratch) -> None:
        self._watcher: Final = watcher
        self._scratch: Final = scratch
        # callbacks for the end of each removal
        self._then: Final[dict[Key, Callable[[], None]]] = {}
        # by their users; first the user that has waited longest for a turn
        self._waiting: Final[dict[int, deque[tuple[Key, Spawn]]]] = {}
        self._running: Final[dict[int, set[Key]]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._then

    def begin(self, job_id: int, then: Callable[[], None]) -> None:
        """Remove a job's directory when its turn has come, and go on with *then*, whether it is gone or not.

        Raises JobStateError when that was begun already.
        """
        if job_id in self._then:
            raise JobStateError(f"what job {job_id} left is being removed")
        self._add(job_id, self._scratch.owner(job_id), partial(self._scratch.spawn_removal, job_id), then)

    def begin_workspace(self, uid: int, name: str, spawn: Spawn, then: Callable[[], None]) -> None:
        """Begin the removal of a workspace likewise; *spawn* begins the work."""
        if (uid, name) in self._then:
            raise JobStateError(f"the workspace {name} is being removed")
        self._add((uid, name), uid, spawn, then)

    def _add(self, key: Key, uid: int, spawn: Spawn, then: Callable[[], None]) -> None:
        self._then[key] = then
        self._waiting.setdefault(uid, deque()).append((key, spawn))
        self._spawn_next()

    def _spawn_next(self) -> None:
        while sum(map(len, self._running.values())) < AT_ONCE:
            # the user with fewest removals, and of these the one that has waited longest
            uid = min(self._waiting, key=self._running_of, default=None)
            if uid is None or self._running_of(uid) == AT_ONCE_OF_ONE:
                return
            waiting = self._waiting.pop(uid)
            key, spawn = waiting.popleft()
            if waiting:
                # behind the others
                self._waiting[uid] = waiting
            self._running.setdefault(uid, set()).add(key)
            self._watcher.reap_helper(spawn(), partial(self._on_end, uid, key))

    def _running_of(self, uid: int) -> int:
        return len(self._running.get(uid, ()))

    def _on_end(self, uid: int, key: Key) -> None:
        self._running[uid].discard(key)
        if not self._running[uid]:
            del self._running[uid]
        then = self._then.pop(key)
        self._spawn_next()
        then()
