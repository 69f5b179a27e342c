"""Jobs that the kernel cannot end: they hold up nobody else, and are named as what they are (S2)."""

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest

from pjw.errors import ConfigError, JobStateError
from pjw.launcher.protocol import Done, Kill, Launched, Refused, Remaining
from pjw.launcher.visible import Place
from pjw.model import EndReason, ExitStatus, JobSpec, JobState
from pjw.server import trial
from pjw.worker import Worker
from pjw.worker.launcher_client import LauncherClient
from tests.root.test_launcher_hostile import Peer
from tests.support.fuse import SUPPORTED, WHY_NOT, DeadFileSystem
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.worker_harness import Bench

pytestmark = pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)

# far above what a start takes, far below what anybody waits for a process to end
AT_ONCE_SECONDS = 2.0
# until a job is named
SOON_SECONDS = 0.2
WORDS = r"was killed and does not end: process \d+ \(cat\) in state D( in \w+)?"


@pytest.fixture
def dead() -> Iterator[DeadFileSystem]:
    """What answers nobody, where jobs see what the host has mounted."""
    with tempfile.TemporaryDirectory(prefix="pjw-dead-", dir="/etc") as directory:
        Path(directory).chmod(0o755)
        dead = DeadFileSystem(Path(directory))
        yield dead
        dead.release()


@pytest.fixture
async def impatient(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that names soon what does not end."""
    for module in ("stopping.LAST_RESORT", "stopping.INIT_ENDS", "adoption.STRAYS"):
        monkeypatch.setattr(f"pjw.worker.{module}_SECONDS", SOON_SECONDS)
    return await bench.open()


async def stuck_job(worker: Worker, dead: DeadFileSystem, **limits: int) -> int:
    """The id of a job that waits for what does not come."""
    held = dead.held
    job = await worker.start(JobSpec(["cat", f"{dead.directory}/file"], limits))
    await asyncio.to_thread(wait_for, lambda: dead.held > held)
    return job.id


def test_the_launcher_goes_on_beside_jobs_that_do_not_end(bench: Bench, dead: DeadFileSystem) -> None:
    """S2: it starts, and ends, the jobs of others at once, while it has killed some that do not go."""
    peer = Peer(bench)
    try:
        for job_id in (1, 2, 3):
            assert isinstance(peer.launch(job_id, ("cat", f"{dead.directory}/{job_id}")), Launched)
        wait_for(lambda: dead.held == 3)
        began = time.monotonic()
        for job_id in (1, 2, 3):
            assert peer.ask(Kill(job_id, init_too=True)) == Done()
        assert isinstance(peer.launch(4, ("sleep", "60")), Launched)
        assert peer.ask(Kill(4, init_too=True)) == Done()
        assert time.monotonic() - began < AT_ONCE_SECONDS
    finally:
        dead.release()
        peer.close()


@pytest.mark.slow
def test_a_launch_that_is_stuck_is_given_up(bench: Bench, dead: DeadFileSystem) -> None:
    """S10: after half a minute, in words that name what of it is left; nobody else's launch waits for it."""
    peer = Peer(bench)
    try:
        began = time.monotonic()
        refused = peer.launch(1, (f"{dead.directory}/program",))
        assert isinstance(refused, Refused)
        assert (refused.kind, refused.operation, refused.subject) == ("late", "within 30 s", "job 1")
        assert " in state D" in refused.hint
        assert time.monotonic() - began < 40
        assert isinstance(peer.launch(2, ("sleep", "60")), Launched)
    finally:
        dead.release()
        peer.close()


async def test_a_stop_says_what_does_not_end(
    bench: Bench, dead: DeadFileSystem, impatient: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: soon, and so do a wait that asks for it, a look, and the log, once; init records the end."""
    job_id = await stuck_job(impatient, dead)
    for _ in range(2):
        with pytest.raises(JobStateError, match=f"^job {job_id} {WORDS}$") as caught:
            await impatient.stop(job_id, signal=SIGKILL)
        assert caught.value.hint == f"pjw wait {job_id} tells of its end"
    waited = await impatient.wait(job_id, or_stuck=True)
    assert waited.state is JobState.STOPPING
    assert re.fullmatch(WORDS, waited.detail)
    assert (await impatient.get(job_id)).detail == waited.detail
    assert [job.detail for job in await impatient.list()] == [waited.detail]
    assert [record.getMessage() for record in caplog.records] == [f"job {job_id} of local {waited.detail}"]
    assert bench.init_pid(job_id)
    # another's job is none the worse
    other = await impatient.start(JobSpec("exec sleep 60"))
    assert (await impatient.stop(other.id, grace_seconds=0)).detail == ""
    dead.release()
    job = await impatient.wait(job_id)
    assert (job.reason, job.exit_status, job.detail) == (EndReason.STOPPED, ExitStatus(signal=SIGKILL), "")


async def test_many_stops_look_no_more_often_than_one(
    dead: DeadFileSystem, impatient: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: to look at a job takes the launcher's time, which is everybody's."""
    job_id = await stuck_job(impatient, dead)
    with pytest.raises(JobStateError):
        await impatient.stop(job_id, grace_seconds=0)
    looks: list[int] = []
    look = LauncherClient.request_remaining

    async def counted(launcher: LauncherClient, job_id: int) -> Remaining:
        looks.append(job_id)
        return await look(launcher, job_id)

    monkeypatch.setattr(LauncherClient, "request_remaining", counted)
    tasks = len(asyncio.all_tasks())
    for _ in range(50):
        with pytest.raises(JobStateError):
            await impatient.stop(job_id, grace_seconds=0)
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > tasks:
            await asyncio.sleep(0.02)
    # by who looks again until its end
    assert len(looks) < 10
    dead.release()
    assert (await impatient.wait(job_id)).reason is EndReason.STOPPED


async def test_a_limit_of_time_that_does_not_end_a_job(dead: DeadFileSystem, impatient: Worker) -> None:
    """S2: nobody asked for its end, and it is named all the same."""
    job_id = await stuck_job(impatient, dead, time_max_seconds=1)
    job = await impatient.wait(job_id, or_stuck=True)
    assert (job.state, job.detail != "") == (JobState.RUNNING, True)
    dead.release()
    assert (await impatient.wait(job_id)).reason is EndReason.TIMED_OUT


async def test_a_restart_beside_a_job_that_does_not_end(
    bench: Bench, dead: DeadFileSystem, impatient: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: the next worker begins at once, has it among its jobs, and names it when it is stopped again."""
    job_id = await stuck_job(impatient, dead)
    with pytest.raises(JobStateError):
        await impatient.stop(job_id, grace_seconds=0)
    await bench.close(impatient)
    began = time.monotonic()
    worker = await bench.open()
    assert time.monotonic() - began < AT_ONCE_SECONDS
    with pytest.raises(JobStateError, match=WORDS):
        await worker.stop(job_id, grace_seconds=0)
    # and where no table knows of it; the second time its init was killed before, and has left the cgroup
    for _ in range(2):
        await bench.close(worker)
        for path in bench.state.glob("jobs.sqlite*"):
            path.unlink()
        caplog.clear()
        began = time.monotonic()
        worker = await bench.open()
        assert time.monotonic() - began < AT_ONCE_SECONDS
        await asyncio.to_thread(wait_for, lambda: caplog.records)
        assert f"job {job_id}, of which no table knows, was killed and does not end" in caplog.text
    dead.release()
    await asyncio.to_thread(bench.check_nothing_remains)


def test_a_job_that_does_not_end_at_the_command_line(service: Service, dead: DeadFileSystem) -> None:
    """S2: `stop` fails in words, `get` and `list` have them, `wait` tells them and goes on."""
    job_id = service.ok("start", f"exec cat {dead.directory}/file").strip()
    wait_for(lambda: dead.held)
    code, words = service.refused("stop", "--grace", "0", job_id)
    assert code == 1
    detail = json.loads(service.ok("get", job_id))["detail"]
    assert re.fullmatch(WORDS, detail)
    assert words == f"pjw: error: job {job_id} {detail}\nhint: pjw wait {job_id} tells of its end\n"
    assert f"        {detail}" in service.ok("list", "--format", "table").splitlines()
    waiting = service.popen("wait", job_id)
    assert waiting.stderr is not None
    assert waiting.stderr.readline().decode() == f"pjw: job {job_id} {detail}\n"
    dead.release()
    output, _ = waiting.communicate(timeout=CALL_SECONDS)
    # both are pending, and either is taken first
    assert output in (b"%d\n" % (128 + number) for number in (SIGTERM, SIGKILL))
    assert waiting.returncode == int(output)
    assert json.loads(service.ok("get", job_id))["detail"] == ""


def test_a_trial_that_hangs_says_at_what(dead: DeadFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pjwd check` and `serve` make a job, and give up when a file system does not answer."""
    monkeypatch.setattr(trial, "INIT_SECONDS", 1.0)
    path = f"{dead.directory}/data"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"the init does not end within 1 s: about to show {path}"):
        trial.Trial([Place(path, "visible")], (), 1).finish()
    assert time.monotonic() - began < 1 + AT_ONCE_SECONDS
