"""Jobs: the one owner of the jobs that have not ended, and of the room that each of them takes.

The table keeps no state for a job that has not ended. While it lives, its snapshot here is the truth
and lies over its row (`over`). A job takes room from before its row is written until after its end, so the
running jobs of a client are those that live and those that are being started.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from pjw.model import Job, JobSpec, Limits
from pjw.worker.gpus import NONE, Gpus, Taken
from pjw.worker.job import LiveJob
from pjw.worker.quota import RunningJobs
from pjw.worker.workspaces import JobInWorkspace, Workspaces


@dataclass(frozen=True, slots=True)
class Room:
    """The room that was taken for one job: its place among running jobs, its workspace and its GPUs."""

    client_name: str
    limits: Limits
    use: JobInWorkspace | None
    gpus: Taken


class Jobs:
    """The live jobs of a worker. Only this class adds or removes one; `live` is a view for everybody else."""

    def __init__(self, running: RunningJobs, workspaces: Workspaces, gpus: Gpus) -> None:
        self._live: Final[dict[int, LiveJob]] = {}
        self.live: Final[Mapping[int, LiveJob]] = MappingProxyType(self._live)
        self._running: Final = running
        self._workspaces: Final = workspaces
        self._gpus: Final = gpus

    def over(self, row: Job) -> Job:
        """Return the snapshot of a job that lives; *row* for any other."""
        live = self._live.get(row.id)
        return row if live is None else live.job

    def of(self, job_id: int, owner: str | None) -> LiveJob | None:
        """Return a live job of a client's, or of any client for None; None when there is none.

        Another client's job is looked up in the table like one that never was, so that no time tells it.
        """
        live = self._live.get(job_id)
        return None if live is None or owner not in (None, live.job.client_name) else live

    # --- room

    async def take(self, client_name: str, spec: JobSpec, limits: Limits) -> Room:
        """Take room for a job. Give it back with `give_back` if the job gets no row.

        Raises LimitReachedError at a quota, InvalidJobError without room for its memory ever, GpuError and
        WorkspaceBusyError.
        """
        self._running.take(client_name, limits)
        gpus = NONE
        try:
            if spec.gpus:
                gpus = self._gpus.take(spec.gpus)
            use = await self._workspaces.take(client_name, spec) if spec.workspace else None
        except BaseException:
            self.give_back(Room(client_name, limits, None, gpus))
            raise
        return Room(client_name, limits, use, gpus)

    def give_back(self, room: Room) -> None:
        """Give back the room of a job that has no row."""
        self._running.give_back(room.client_name, room.limits)
        self._workspaces.give_back(room.use)
        self._gpus.give_back(room.gpus)

    def settle(self, room: Room, job_id: int) -> None:
        """Note which job has the room, now that it has a row. From here on `give_back_of` gives it back."""
        if room.use is not None:
            self._workspaces.begun(room.use, job_id)
        if room.gpus is not NONE:
            self._gpus.begun(room.gpus, job_id)

    def give_back_of(self, job: Job) -> None:
        """Give back the room of a job with a row."""
        self._running.give_back(job.client_name, job.limits)
        self._workspaces.give_back_of(job.id)
        self._gpus.give_back_of(job.id)

    # --- life

    def add(self, live: LiveJob) -> None:
        """Add a job that is about to be launched."""
        self._live[live.job.id] = live

    def adopt(self, live: LiveJob) -> None:
        """Add a job of an earlier worker, and take the room that it has, even above a bound set since."""
        self._running.adopt(live.job.client_name, live.job.limits)
        self._workspaces.adopt(live.job)
        self._gpus.adopt(live.job.id)
        self.add(live)

    def drop(self, job_id: int) -> None:
        """Remove a job whose launch has failed. Its room may be in use until all of it has departed."""
        del self._live[job_id]

    def end(self, live: LiveJob) -> None:
        """Remove a job whose end is in the table, and give its room back."""
        self.drop(live.job.id)
        self.give_back_of(live.job)
