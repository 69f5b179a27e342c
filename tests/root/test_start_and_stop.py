"""How a job is run and stopped, as a client asks for it: environment, working directory, any signal."""

import asyncio
import errno
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.model import JobSpec
from pjw.rpc.status import ERRNO_KEY
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.tracer import SUPPORTED, WHY_NOT, Tracer


def start(service: Service, command: str, **how: object) -> int:
    """Start a job; its id."""
    with service.stub() as stub:
        return stub.Start(pb.StartRequest(command=command, **how), timeout=CALL_SECONDS).job.id  # type: ignore[arg-type]


def read(service: Service, job_id: int, *, no_follow: bool = False) -> str:
    """The output of a job."""
    with service.stub() as stub:
        request = pb.LogsRequest(id=job_id, no_follow=no_follow)
        return b"".join(answer.data for answer in stub.Logs(request, timeout=CALL_SECONDS)).decode()


def stop(service: Service, job_id: int, *, grace: int = 10, number: int = 0) -> pb.Job:
    """Stop a job; how it ended."""
    with service.stub() as stub:
        request = pb.StopRequest(id=job_id, grace=Duration(seconds=grace), signal=number)
        return stub.Stop(request, timeout=CALL_SECONDS).job


# --- environment and working directory


def test_environment_and_directory(service: Service) -> None:
    """They are as asked for; what was not is as before."""
    job_id = start(service, "echo $A; pwd; echo $HOME; echo $PJW_JOB_ID", env={"A": "b c"}, workdir="/usr")
    assert read(service, job_id) == f"b c\n/usr\n/run/job\n{job_id}\n"


def test_the_next_job_has_nothing_of_the_last_one_s(service: Service) -> None:
    """Its init waited already when the environment of the last one came."""
    for number in range(3):
        job_id = start(service, "echo ${A-none} $(pwd)", **({"env": {"A": "x"}} if number == 1 else {}))
        assert read(service, job_id) == ("x /run/job\n" if number == 1 else "none /run/job\n")


@pytest.mark.parametrize(
    ("workdir", "why"),
    [
        ("/nonexistent", "no such file or directory (ENOENT)"),
        ("/etc/passwd", "not a directory (ENOTDIR)"),
        ("/root", "permission denied (EACCES)"),
    ],
)
def test_a_directory_that_cannot_be_entered(service: Service, workdir: str, why: str) -> None:
    """Start says which and why, and nothing is left."""
    with service.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Start(pb.StartRequest(command="true", workdir=workdir), timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == f"cannot enter the working directory {workdir}: {why}"
    # a program that is not there has a code of its own in the metadata, which this is not
    assert ERRNO_KEY not in str(caught.value.trailing_metadata())


def test_a_step_of_a_start_that_fails_is_named(make_service: Callable[..., Service]) -> None:
    """Which, on what and why (R2), to the client and in the log: "internal error" would help neither."""
    service = make_service(config="hidden_paths = ['/var/lib/pjw-test-loop']\n")
    loop = Path("/var/lib/pjw-test-loop")
    loop.symlink_to(loop)
    try:
        # B6: already its start says so, and a check
        service.start()
        said = service.log.read_text()
        command = service.command()
        command[1] = "check"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        code, words = service.refused("start", "true")
    finally:
        loop.unlink()
    trial = f"no job can be made here: pjw-init: cannot hide {loop}: too many levels of symbolic links"
    assert (f"ERROR: {trial}" in said, f"missing  {trial}" in done.stdout) == (True, True), said + done.stdout
    assert code == 125
    assert "cannot hide /var/lib/pjw-test-loop for job 1: too many levels of symbolic links (ELOOP)" in words
    service.await_log("cannot hide /var/lib/pjw-test-loop for job 1")


def test_the_state_directory_cannot_be_entered(service: Service) -> None:
    """It is hidden from the job, and so from its working directory."""
    with service.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Start(pb.StartRequest(command="true", workdir=f"{service.state}/jobs"), timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


# --- signals


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1])
def test_a_job_is_stopped_by_a_signal(service: Service, number: signal.Signals) -> None:
    """It ends by the one that was asked for."""
    job_id = start(service, "sleep 1000 & exec sleep 1000")
    job = stop(service, job_id, number=number)
    assert (job.state, job.reason, job.signal) == (pb.JOB_STATE_EXITED, pb.END_REASON_STOPPED, number)


def test_a_signal_that_is_survived_escalates(service: Service) -> None:
    """After the grace period comes SIGKILL; the job saw the first one."""
    job_id = start(service, "trap 'echo heard' HUP; echo ready; while :; do sleep 0.1; done")
    wait_for(lambda: read(service, job_id, no_follow=True) == "ready\n")
    job = stop(service, job_id, grace=1, number=signal.SIGHUP)
    assert (job.reason, job.signal) == (pb.END_REASON_STOPPED, signal.SIGKILL)
    assert "heard\n" in read(service, job_id)


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
def test_a_signal_that_cannot_be_sent_escalates(service: Service) -> None:
    """The launcher refuses the first one, as the kernel did: the kill follows all the same."""
    job_id = start(service, "exec sleep 60")
    with Tracer(service.launcher_pid(), 1, errno.EPERM, calls=("pidfd_send_signal",)) as tracer:
        assert stop(service, job_id, grace=1).signal == signal.SIGKILL
    assert tracer.hit == "pidfd_send_signal"


def test_sigkill_needs_no_grace(service: Service) -> None:
    """A job that is deaf to the rest ends at once."""
    job_id = start(service, "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    wait_for(lambda: read(service, job_id, no_follow=True) == "ready\n")
    began = time.monotonic()
    job = stop(service, job_id, grace=60, number=signal.SIGKILL)
    assert (job.reason, job.signal) == (pb.END_REASON_STOPPED, signal.SIGKILL)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [-1, 32, 64, 2**31 - 1])
def test_what_is_no_such_signal(service: Service, number: int) -> None:
    """It is refused, and the job goes on."""
    job_id = start(service, "exec sleep 1000")
    with pytest.raises(grpc.RpcError) as caught:
        stop(service, job_id, number=number)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == f"a job is stopped with a signal from 1 to 31, not {number}"
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    stop(service, job_id, grace=0)


async def test_many_starts_of_one_client_are_before_few_of_another(worker: Worker) -> None:
    """S10: a burst of starts goes on in turn, so another client's one start is not behind all of them."""
    burst = [asyncio.create_task(worker.start(JobSpec("true"), "alice")) for _ in range(100)]
    await asyncio.sleep(0)
    await worker.start(JobSpec("true"), "bob")
    answered = sum(task.done() for task in burst)
    for job in await asyncio.gather(*burst):
        await worker.wait(job.id)
    assert answered < 25
