"""How a job is run and stopped, as a client asks for it: environment, working directory, any signal."""

import signal
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.rpc.status import ERRNO_KEY
from pjw.v1 import job_worker_pb2 as pb
from tests.service import CALL_SECONDS, Service, wait_for


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
