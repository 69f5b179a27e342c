"""Finds jobs whose output waits for the disk, tells it in their `detail` and in the log, and counts them."""

import logging
import os
import stat
import time
from typing import Final

from pjw.errors import KernelError
from pjw.model import Job
from pjw.output.inotify import IN_ATTRIB, Inotify
from pjw.worker.job import OUTPUT_HELD, LiveJob
from pjw.worker.state_dir import StateDir

# Seconds between such lines of the log at least, as a disk may be full again and again.
_SAY_AGAIN_SECONDS: Final = 600

log: Final = logging.getLogger(__name__)


class HeldOutputs:
    """Watches the modes of the output files of live jobs: there a job's init notes that output waits.

    See `note_held` in init/output.c.
    """

    def __init__(self, state: StateDir) -> None:
        """Begin without any jobs. Raises KernelError."""
        self._state: Final = state
        # an instance of its own: a follower watches the same files for other changes
        self._inotify: Final = Inotify(IN_ATTRIB)
        self._watches: Final[dict[int, list[int]]] = {}
        self._live: Final[dict[int, LiveJob]] = {}
        # the finders that have found the file system read-only
        self._read_only: Final[set[object]] = set()
        self._held: Final[set[int]] = set()
        self._said_at = float("-inf")

    def close(self) -> None:
        """End all watches."""
        self._inotify.close()

    def __len__(self) -> int:
        """Return the number of jobs whose output waits."""
        return len(self._held)

    def add(self, live: LiveJob) -> None:
        """Watch a job's output from now on; an earlier note counts as well.

        Looks at the files on the event loop: this process has just made them, or has found them at its start,
        so the kernel has them in its cache.
        """
        self._live[live.job.id] = live
        watches = self._watches.setdefault(live.job.id, [])
        try:
            for path in self._state.outputs(live.job):
                # one by one, so that the first is kept when the second fails
                watches.append(self._inotify.watch(path, lambda: self._look(live)))
        except KernelError as error:
            log.error("cannot tell whether the output of job %d waits: %s", live.job.id, error)
        self._look(live)

    def remove(self, job_id: int) -> None:
        """Stop watching a job that has ended."""
        for watch in self._watches.pop(job_id, ()):
            self._inotify.unwatch(watch)
        self._live.pop(job_id, None)
        self._no_longer(job_id)

    def set_read_only(self, finder: object, *, read_only: bool) -> None:
        """Note whether *finder* finds the file system read-only: then no init can note that output waits."""
        if read_only == (finder in self._read_only):
            return
        if read_only:
            self._read_only.add(finder)
        else:
            self._read_only.remove(finder)
        for live in self._live.values():
            self._look(live)

    def _look(self, live: LiveJob) -> None:
        held = bool(self._read_only) or any(_is_noted(path) for path in self._state.outputs(live.job))
        if held == live.held.is_set():
            return
        live.output_held(held=held)
        if held:
            self._say(live.job)
            self._held.add(live.job.id)
        else:
            self._no_longer(live.job.id)

    def _say(self, job: Job) -> None:
        now = time.monotonic()
        if not self._held and now - self._said_at > _SAY_AGAIN_SECONDS:
            self._said_at = now
            log.error("job %d of %s %s; so may others", job.id, job.client_name, OUTPUT_HELD)

    def _no_longer(self, job_id: int) -> None:
        if job_id in self._held:
            self._held.remove(job_id)
            if not self._held:
                log.info("no job waits for the disk any more")


def _is_noted(path: str) -> bool:
    try:
        return bool(os.stat(path).st_mode & stat.S_ISVTX)
    except OSError:
        return False
