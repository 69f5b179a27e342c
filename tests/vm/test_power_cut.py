"""After a power cut: what was acknowledged is kept, what was lost is said, nothing is guessed or reused.

scripts/test-vm runs power_cut.py in a machine, cuts its power, and starts it again with these.
"""

import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pjw.errors import CopyError, JobNotFoundError, OutputLostError
from pjw.model import ArtifactsState, EndReason, ExitStatus, JobSpec, JobState
from pjw.worker import Part, Worker
from tests.support.service import job_cgroups, wait_for, waiting_ids
from tests.vm.power_cut import ACKNOWLEDGED, BOOT_ID, KEEPING, KEPT_LINES, SECRET, STATE, numbers

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


async def kept_by(worker: Worker, job_id: int) -> dict[str, bytes]:
    """The files that were kept of a job, by name."""
    archive = b"".join([chunk async for chunk in worker.logs(job_id, Part(artifacts=True))])
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return {
            each.name.removeprefix("./"): file.read()
            for each in files
            if (file := files.extractfile(each)) is not None
        }


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


async def test_artifacts_are_whole_or_missing(worker: Worker, promised: dict[str, Any]) -> None:
    """Those that were told are there to the byte; of those that were being kept none is short."""
    files, whole = promised["files"], []
    job_id, size = files["kept"]
    for each in (job_id, *files["keeping"]):
        artifacts = (await worker.get(each)).artifacts
        if artifacts is not None and artifacts.state is ArtifactsState.KEPT:
            assert await kept_by(worker, each) == {"kept": numbers(KEPT_LINES)}
            whole.append(each)
        else:
            with pytest.raises(CopyError):
                await kept_by(worker, each)
    print(f"{len(whole)} of {KEEPING + 1} are whole")
    job = await worker.get(job_id)
    assert job_id in whole
    assert job.artifacts is not None and job.artifacts.bytes == size
    job = await worker.get(files["looking"])
    assert job.artifacts is None or job.artifacts.state is ArtifactsState.FAILED


async def test_a_workspace_has_what_was_synced(worker: Worker) -> None:
    """The next job finds it."""
    job = await worker.start(JobSpec("cat file", workspace="things"), "dave")
    assert await output_of(worker, job.id) == numbers(1000)


async def test_each_job_of_the_queue_ran_once_at_most(worker: Worker, promised: dict[str, Any]) -> None:
    """Each is lost, or has run to its end, before the cut or after it; what had ended did not again."""
    queue, this_boot = promised["queue"], BOOT_ID.read_text().strip()
    ran: dict[str, list[int]] = {this_boot: [], promised["boot"]: [], "lost": []}
    for job_id in queue["jobs"]:
        job = await worker.wait(job_id)
        if job.state is JobState.LOST:
            assert job.reason is EndReason.HOST_RESTARTED
            ran["lost"].append(job_id)
            continue
        assert job.succeeded
        try:
            ran[(await output_of(worker, job_id)).decode().strip()].append(job_id)
        except OutputLostError:
            # what was not on the disk was not written by this boot
            ran[promised["boot"]].append(job_id)
    print({boot: len(ids) for boot, ids in ran.items()})
    assert set(queue["ended"]) & set(queue["jobs"]) <= set(ran[promised["boot"]])
    assert ran[this_boot]


async def test_what_waits_for_a_lost_job_is_told(worker: Worker, promised: dict[str, Any]) -> None:
    """A job that ran out of the queue is lost, and failed for those that wait; it runs again where asked."""
    queue = promised["queue"]
    job = await worker.get(queue["lost"])
    assert (job.state, job.reason) == (JobState.LOST, EndReason.HOST_RESTARTED)
    after = {each: await worker.wait(job_id) for each, job_id in queue["after"].items()}
    assert (after["failed"].succeeded, after["any"].succeeded) == (True, True)
    assert after["ok"].reason is EndReason.CANCELLED
    assert after["ok"].detail == f"job {job.id}, which it waited for, is lost"
    again = await worker.wait(queue["rerun"])
    assert (again.attempt, again.succeeded) == (2, True)
    assert (await worker.get(queue["rerun"])).reason is EndReason.HOST_RESTARTED


async def test_what_was_held_is_held(worker: Worker, promised: dict[str, Any]) -> None:
    """Holds, secrets and pauses are those of before."""
    queue = promised["queue"]
    assert (await worker.get(queue["held"])).held
    await worker.release(queue["held"])
    assert await output_of(worker, queue["held"]) == f"{SECRET}\n".encode()
    waiting = await worker.get(queue["pause"])
    assert (waiting.state, str(waiting.not_before)) == (JobState.QUEUED, queue["not_before"])
    assert (await worker.stop(waiting.id)).reason is EndReason.CANCELLED


async def test_changes_that_were_told_are_the_same(worker: Worker, promised: dict[str, Any]) -> None:
    """Each has the number that it had, and what comes later has higher ones."""
    told = promised["queue"]["changes"]
    found = [
        [change.sequence, change.job.id, change.job.state]
        async for batch in worker.watch_jobs("carol", since=told[0][0] - 1, follow=False)
        for change in batch.changes
    ]
    assert found[: len(told)] == told
    assert len(found) > len(told)


async def test_no_id_and_no_user_is_given_twice(worker: Worker, promised: dict[str, Any]) -> None:
    """The next job has an id that was never told, and each client is the user that it was."""
    job = await worker.start(JobSpec("id -u"), "bob")
    assert job.id > max(promised["told"], *promised["started"], *promised["queue"]["jobs"])
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
