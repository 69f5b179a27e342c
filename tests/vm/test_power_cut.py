"""After a power cut: what was acknowledged is kept, what was lost is said, nothing is guessed or reused.

scripts/test-vm runs power_cut.py in a machine, cuts its power, and starts it again with these.
"""

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pjw.errors import JobNotFoundError, OutputLostError
from pjw.model import EndReason, ExitStatus, JobSpec, JobState
from pjw.worker import Worker
from tests.service import job_cgroups, wait_for, waiting_ids
from tests.vm.power_cut import ACKNOWLEDGED, STATE, numbers

pytestmark = pytest.mark.skipif(
    "PJW_VM_PROMISED" not in os.environ, reason="needs a machine whose power was cut: see scripts/test-vm"
)


@pytest.fixture(scope="module")
def promised() -> dict[str, Any]:
    """What was told before the power was cut."""
    facts: dict[str, Any] = json.loads(os.environ["PJW_VM_PROMISED"])
    return facts


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    """The next worker on the same state directory."""
    async with await Worker.open(str(STATE)) as worker:
        yield worker


async def output_of(worker: Worker, job_id: int) -> bytes:
    """All that is left of a job's output, as a client is given it."""
    return b"".join([chunk async for chunk in worker.logs(job_id)])


async def test_every_start_that_was_answered_is_remembered(worker: Worker, promised: dict[str, Any]) -> None:
    """Each has a row, and it is lost for the reason that is known: the host was restarted."""
    assert len(promised["started"]) == ACKNOWLEDGED
    for job_id in (*promised["started"], promised["running"]):
        job = await worker.get(job_id)
        assert (job.state, job.reason, job.exit_status) == (JobState.LOST, EndReason.HOST_RESTARTED, None)
        assert job.end is not None
    assert (await worker.get(promised["running"])).client_name == "bob"


async def test_an_end_that_was_told_is_kept(worker: Worker, promised: dict[str, Any]) -> None:
    """State, code and size are those that were told, moments before the cut."""
    job = await worker.get(promised["told"])
    assert (job.state, job.reason) == (JobState.EXITED, EndReason.COMPLETED)
    assert (job.exit_status, job.output_bytes) == (ExitStatus(code=7), promised["told_bytes"])


async def test_output_is_whole_or_said_to_be_cut(worker: Worker, promised: dict[str, Any]) -> None:
    """A job that ended before has all of it; one that ended just then what the disk had, and an error."""
    assert await output_of(worker, promised["settled"]) == numbers(100_000)
    whole, got = numbers(300_000), b""
    try:
        async for chunk in worker.logs(promised["told"]):
            got += chunk
        assert got == whole
    except OutputLostError:
        assert len(got) < len(whole)
        assert whole.startswith(got)


async def test_what_was_removed_stays_removed(worker: Worker, promised: dict[str, Any]) -> None:
    """Neither its row nor its files come back."""
    with pytest.raises(JobNotFoundError):
        await worker.get(promised["deleted"])
    assert not (STATE / "jobs" / str(promised["deleted"])).exists()


async def test_no_id_and_no_user_is_given_twice(worker: Worker, promised: dict[str, Any]) -> None:
    """The next job has an id that was never told, and each client is the user that it was."""
    job = await worker.start(JobSpec("id -u"), "bob")
    assert job.id > max(promised["told"], *promised["started"])
    bobs = await output_of(worker, job.id)
    job = await worker.start(JobSpec("id -u"), "alice")
    assert int(bobs) == int(await output_of(worker, job.id)) + 1


async def test_nothing_of_the_boot_before_is_left(worker: Worker) -> None:
    """No cgroup, no scratch directory."""
    for job in await worker.list():
        await worker.wait(job.id)
    waiting = {str(job_id) for job_id in waiting_ids(STATE)}
    wait_for(lambda: job_cgroups(STATE) == [])
    wait_for(lambda: {path.name for path in (STATE / "scratch").iterdir()} <= waiting)
