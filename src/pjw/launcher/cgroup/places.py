"""The place of each job's cgroup below its instance's: `client-UID/job-ID`.

A job of a version before this layout is in `job-ID`, and stays there. The directories are the registry;
memory holds only an index of them, so that a job is found without a look at every client.
"""

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from pjw.launcher.cgroup import interface_files

_CLIENT: Final = "client-"
# the client of a job that an older version made
_NOBODY: Final = 0


class Places:
    """The jobs of one instance. *tops* are its directories: one on v2, one for each hierarchy on v1."""

    def __init__(self, tops: Iterable[str]) -> None:
        self._tops: Final = tuple(dict.fromkeys(tops))
        self._client_of: Final[dict[int, int]] = {}
        self._jobs_of: Final[Counter[int]] = Counter()
        for uid in self._clients():
            for job_id in self._jobs_in(client_place(uid)):
                self._add(job_id, uid)
            if uid not in self:
                # a crash has left it
                self._remove_client(uid)

    def __contains__(self, uid: int) -> bool:
        """Return whether this client has a job, and so a directory."""
        return uid in self._jobs_of

    def clients(self) -> set[int]:
        """Return the clients that have jobs, and so directories."""
        return self._jobs_of.keys() - {_NOBODY}

    def job_ids(self) -> set[int]:
        """Return every job that has a directory in any hierarchy, by a look at all of them."""
        return set().union(*(self._jobs_in(client_place(uid)) for uid in self._clients()))

    def of(self, job_id: int) -> str:
        """Return the place of a job, relative to each top; an older version's for an unknown one."""
        return _job_place(self._client_of.get(job_id, _NOBODY), job_id)

    def add(self, job_id: int, uid: int) -> str:
        """Add a job that is about to have a directory in its client's; return its place.

        Raises JobStateError when it has one.
        """
        if job_id in self._client_of:
            raise interface_files.it_exists(f"job {job_id}")
        self._add(job_id, uid)
        return _job_place(uid, job_id)

    def _add(self, job_id: int, uid: int) -> None:
        self._client_of[job_id] = uid
        self._jobs_of[uid] += 1

    def forget(self, job_id: int) -> int:
        """Forget a job whose directories are gone; remove its client's after the last. Return the client."""
        uid = self._client_of.pop(job_id, None)
        if uid is None:
            return _NOBODY
        self._jobs_of[uid] -= 1
        if not self._jobs_of[uid]:
            del self._jobs_of[uid]
            self._remove_client(uid)
        return uid

    def _remove_client(self, uid: int) -> None:
        if uid == _NOBODY:
            return
        # one that is not empty after all stays, and goes at the next start
        for top in self._tops:
            with suppress(OSError):
                os.rmdir(f"{top}/{client_place(uid)}")

    def _clients(self) -> set[int]:
        return {_NOBODY}.union(*(interface_files.job_ids_in(top, prefix=_CLIENT) for top in self._tops))

    def _jobs_in(self, place: str) -> set[int]:
        return set().union(*(interface_files.job_ids_in(f"{top}/{place}") for top in self._tops))


def client_place(uid: int) -> str:
    """Return a client's directory, relative to its instance's: by a number, never by its name."""
    return f"{_CLIENT}{uid}" if uid != _NOBODY else "."


def _job_place(uid: int, job_id: int) -> str:
    return f"job-{job_id}" if uid == _NOBODY else f"{_CLIENT}{uid}/job-{job_id}"
