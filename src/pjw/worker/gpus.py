"""GPUs: those of the machine, and the job that has each of them for itself.

A job's GPUs are in its row from before its launch. So the next worker knows them, and gives no GPU to two.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from pjw.errors import ConfigError, GpuError, KernelError, LimitReachedError
from pjw.launcher import protocol
from pjw.model import JobSpec
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.settings import WorkerSettings
from pjw.worker.store import JobStore

log: Final = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Taken:
    """The GPUs that a job has, or is about to have."""

    names: tuple[str, ...] = ()
    job_id: int | None = None


NONE: Final = Taken()


class Gpus:
    """Those of one worker."""

    def __init__(self, store: JobStore, launcher: LauncherClient, settings: WorkerSettings) -> None:
        self._store: Final = store
        self._launcher: Final = launcher
        self._offer: Final = settings.gpus
        # all that there were when last asked, and those of them that jobs have
        self._names: tuple[str, ...] = ()
        self._taken: Final[set[str]] = set()
        self._of_job: Final[dict[int, Taken]] = {}
        # GPUs in the rows of jobs that have not ended
        self._stored: Mapping[int, tuple[str, ...]] = {}
        # called when jobs have fewer than before
        self.freed: Final[list[Callable[[], None]]] = []

    async def begin(self) -> None:
        """Find the GPUs of the machine, and those of the jobs of the worker before us."""
        self._stored = await self._store.gpus_of_jobs()
        if self._offer.kind:
            try:
                await self._refresh()
            except GpuError:
                # asked for again with each job that needs some
                self._names = ()

    def adopt(self, job_id: int) -> None:
        """Count the GPUs of a job of the worker before us that still runs."""
        if names := self._stored.get(job_id):
            self._taken.update(names)
            self._of_job[job_id] = Taken(names, job_id)

    async def check(self, client_name: str, count: int) -> None:
        """Check that a job of this client can ever have so many. Raises GpuError."""
        if not self._offer.is_for(client_name):
            raise GpuError.not_offered()
        await self._refresh()
        if count > len(self._names):
            raise GpuError(
                f"the job asks for {_gpus(count)}, and the machine has {len(self._names)}",
                hint="ask for fewer; `pjw quota` shows how many there are",
            )

    async def _refresh(self) -> None:
        self._names = (await self._asked(())).names

    async def _asked(self, names: tuple[str, ...]) -> protocol.GpuNames:
        try:
            return await self._launcher.request_gpus(names)
        except (ConfigError, KernelError) as error:
            log.error("GPUs: %s", error)
            raise GpuError.unknown() from None

    def of(self, client_name: str) -> int:
        """Return the number of GPUs for jobs of a client, free or not."""
        return len(self._names) if self._offer.is_for(client_name) else 0

    @property
    def total(self) -> int:
        """How many the machine has for jobs, free or not."""
        return len(self._names)

    @property
    def free(self) -> int:
        """The number of GPUs that no job has."""
        return sum(name not in self._taken for name in self._names)

    def take(self, count: int) -> Taken:
        """Give GPUs to a job before its start. Raises LimitReachedError when fewer are free."""
        if not count:
            return NONE
        names = [name for name in self._names if name not in self._taken][:count]
        if len(names) < count:
            # do not tell a client about the jobs of others
            raise LimitReachedError(
                f"cannot start the job with {_gpus(count)}: fewer are free now",
                hint="wait for a job to end, or put the job into the queue: --queue",
                limit="gpus",
            )
        self._taken.update(names)
        return Taken(tuple(names))

    async def with_variables(self, spec: JobSpec, taken: Taken) -> JobSpec:
        """Return a spec with the variables of its GPUs; its own take precedence. Raises GpuError."""
        if not taken.names:
            return spec
        found = dict(each.split("=", 1) for each in (await self._asked(taken.names)).environment)
        added = {name: text for name, text in found.items() if name not in spec.secrets}
        return replace(spec, env={**added, **spec.env})

    def begun(self, taken: Taken, job_id: int) -> None:
        """Note the id of the job, which it has from now on."""
        if taken.names:
            taken.job_id = job_id
            self._of_job[job_id] = taken

    def give_back(self, taken: Taken) -> None:
        """Free the GPUs of a job that was not started."""
        if not taken.names:
            return
        self._taken.difference_update(taken.names)
        if taken.job_id is not None:
            del self._of_job[taken.job_id]
        for each in self.freed:
            each()

    def give_back_of(self, job_id: int) -> None:
        """Free the GPUs of a job with an id that has ended, or was not started."""
        if (taken := self._of_job.get(job_id)) is not None:
            self.give_back(taken)

    def names_of(self, job_id: int) -> tuple[str, ...]:
        """Return the GPUs of a job."""
        return self._of_job.get(job_id, NONE).names


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
