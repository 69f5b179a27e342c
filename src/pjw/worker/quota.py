"""What a client may have at once: running jobs, and bytes of output."""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from pjw.errors import LimitReachedError
from pjw.worker.job import LiveJob
from pjw.worker.settings import Quotas
from pjw.worker.state_dir import StateDir


class RunningJobs:
    """Counts jobs from before their start to after their end, so that no burst gets past the quota."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self._running: Final[Counter[str]] = Counter()

    def take(self, client_name: str) -> None:
        """Count a job that is to be started. Raises LimitReachedError at a quota."""
        most, total = self.quotas.running_max, self.quotas.running_total_max
        if most and self._running[client_name] >= most:
            raise LimitReachedError(
                f"{most} jobs of {client_name} are running, and no more may",
                hint="wait for one to end, or stop one; the operator sets clients.running_max",
                limit="running_max",
            )
        if total and self._running.total() >= total:
            raise LimitReachedError(
                f"{total} jobs are running on this server, and no more may",
                hint="try again later; the operator sets clients.running_total_max",
                limit="running_total_max",
            )
        self.adopt(client_name)

    def adopt(self, client_name: str) -> None:
        """Count a job that runs already, whatever the quota has become since."""
        self._running[client_name] += 1

    def give_back(self, client_name: str) -> None:
        """A job has ended, or did not come to be."""
        self._running[client_name] -= 1
        if not self._running[client_name]:
            del self._running[client_name]


async def check_stored_bytes(
    quotas: Quotas, state: StateDir, live_jobs: Iterable[LiveJob], client_name: str
) -> None:
    """Raises LimitReachedError when a client, or all of them, have stored what they may, running jobs too."""
    if not quotas.stored_bytes_max and not quotas.stored_bytes_total_max:
        return
    own, total = await state.store.ended_bytes(client_name)
    for live in live_jobs:
        if quotas.stored_bytes_total_max or live.job.client_name == client_name:
            size = state.output_size(live.job) + state.input_size(live.job)
            total += size
            own += size if live.job.client_name == client_name else 0
    check_bytes(quotas, client_name, own, total)


def check_bytes(quotas: Quotas, client_name: str, own_bytes: int, total_bytes: int) -> None:
    """Raises LimitReachedError when a client, or all of them, have stored what they may."""
    most, total = quotas.stored_bytes_max, quotas.stored_bytes_total_max
    if most and own_bytes >= most:
        raise LimitReachedError(
            f"the jobs of {client_name} have {own_bytes} bytes of output and input, and at most {most}"
            " may be stored",
            hint="remove ended jobs: pjw rm ID; the operator sets clients.stored_bytes_max",
            limit="stored_bytes_max",
        )
    if total and total_bytes >= total:
        raise LimitReachedError(
            f"the output and input of all jobs are {total_bytes} bytes, and at most {total} may be stored",
            hint="remove ended jobs: pjw rm ID; the operator sets clients.stored_bytes_total_max",
            limit="stored_bytes_total_max",
        )
