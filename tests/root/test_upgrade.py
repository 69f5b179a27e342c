"""A service of an earlier commit, with running jobs, is upgraded in place and loses nothing.

tests/data/earlier-commit names that commit: the last one that people may run. Raise it when work begins that
changes a running job's foundations: its cgroup, its scratch directory, its init, its row.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pjw.launcher import job_users
from pjw.v1 import job_worker_pb2 as pb
from tests.support import certs_factory
from tests.support.certs_factory import CN, issue
from tests.support.scene import Scene, config_of
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import uid_range

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def earlier() -> Path:
    """pjwd of the earlier commit, with the libraries of this one."""
    # the virtual machine has no git: scripts/test-vm has built it
    if path := os.environ.get("PJW_EARLIER"):
        return Path(path) / "bin" / "pjwd"
    commit = (ROOT / "tests/data/earlier-commit").read_text().strip()
    done = subprocess.run(
        ["scripts/install-revision", commit], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ROOT / "build/revisions" / commit / "bin/pjwd"


@pytest.fixture
def upgraded(make_service: Callable[..., Service], earlier: Path) -> Iterator[Scene]:
    """A scene that began on the earlier commit; its next start is of this one."""
    uid_first = uid_range()
    service = make_service(config=config_of(uid_first))
    service.pjwd = earlier
    scene = Scene(service.start(), uid_first)
    service.pjwd = BIN / "pjwd"
    yield scene
    scene.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_running_jobs_are_adopted_whole(upgraded: Scene, number: int) -> None:
    """The jobs of a service that was stopped or killed go on, end as they would have, and keep all output."""
    upgraded.service.stop(number)
    upgraded.service.start()
    upgraded.goes_on()
    upgraded.others_unharmed()
    upgraded.end_known()
    upgraded.output_whole()
    # not nothing_left(): the two versions have not the same descriptors open when they are idle
    wait_for(lambda: upgraded.remains() == [])


def test_jobs_keep_their_user_ids(make_service: Callable[..., Service], earlier: Path) -> None:
    """With no range of the operator's: all of the earlier version had the same, and who had it keeps it."""
    service = make_service()
    service.pjwd = earlier
    job_id = service.start().start_job("sleep 1000")
    uids = [os.stat(f"/proc/{service.pid}").st_uid, job_users.FORMER_FIRST]
    service.pjwd = BIN / "pjwd"
    service.stop()
    service.start()
    [scratch] = service.scratch()
    assert uids == [os.stat(f"/proc/{service.pid}").st_uid, scratch.stat().st_uid]
    assert service.ok("run", "id -u") == f"{job_users.FORMER_FIRST}\n"
    service.ok("stop", str(job_id))


def test_clients_keep_their_names(
    make_service: Callable[..., Service], earlier: Path, tmp_path: Path
) -> None:
    """A name of 64 bits that is made of a key stays its client's, with its jobs; new ones are longer."""
    service = make_service()
    ca = certs_factory.load((service.certs / "ca.crt").read_bytes(), (service.certs / "ca.key").read_bytes())
    old, new = (
        issue(ca, [(CN, "localhost")], sans=("localhost",)).write(tmp_path, name) for name in ("old", "new")
    )
    request = pb.StartRequest(command="true")
    service.pjwd = earlier
    with service.start().stub(old) as stub:
        before = stub.Start(request).job
    assert len(before.client_name) == len("key-") + 16
    service.stop()
    service.pjwd = BIN / "pjwd"
    service.start()
    with service.stub(old) as stub:
        assert [job.id for job in stub.List(pb.ListRequest()).jobs] == [before.id]
        assert stub.Start(request).job.client_name == before.client_name
    with service.stub(new) as stub:
        assert len(stub.Start(request).job.client_name) == len("key-") + 32


def test_what_ran_before_obeys_what_came_after(upgraded: Scene) -> None:
    """A job of the earlier service is measured, stopped, killed and removed by this one."""
    service = upgraded.service
    stub = upgraded.stub("alice")
    stubborn = stub.Start(pb.StartRequest(command="trap '' TERM; echo up; while :; do sleep 1; done")).job.id
    timed = stub.Start(pb.StartRequest(command="sleep 1000", limits=pb.Limits(time_max_seconds=3))).job.id
    wait_for(lambda: upgraded.output_size(stubborn))
    service.stop(signal.SIGKILL)
    service.start()
    assert upgraded.job_of(upgraded.job, "alice").state == pb.JOB_STATE_RUNNING
    ended = stub.Stop(pb.StopRequest(id=upgraded.job), timeout=30, wait_for_ready=True).job
    assert (ended.reason, ended.signal) == (pb.END_REASON_STOPPED, signal.SIGTERM)
    request = pb.StopRequest(id=stubborn)
    request.grace.FromMilliseconds(100)
    assert stub.Stop(request, timeout=30).job.signal == signal.SIGKILL
    assert stub.Wait(pb.WaitRequest(id=timed), timeout=30).job.reason == pb.END_REASON_TIMED_OUT
    for job_id in (upgraded.job, stubborn, timed):
        assert upgraded.job_of(job_id, "alice").usage.cpu_usage_usec > 0
        stub.Delete(pb.DeleteRequest(id=job_id), timeout=30)


def test_jobs_that_ended_in_between_are_told(upgraded: Scene) -> None:
    """Their records and accounts are read by a service that did not start them."""
    service = upgraded.service
    service.stop(signal.SIGKILL)
    upgraded.tell(upgraded.job)
    init = upgraded.service.state / "jobs" / str(upgraded.job) / "status"
    wait_for(lambda: b"ended" in init.read_bytes())
    service.start()
    job = upgraded.job_of(upgraded.job, "alice")
    assert (job.state, job.reason) == (pb.JOB_STATE_EXITED, pb.END_REASON_COMPLETED)
    assert job.usage.cpu_usage_usec > 0
    upgraded.others_unharmed()
