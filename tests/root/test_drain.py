"""`pjwd drain` and `pjwd resume`: a machine that starts no job, for an orderly reboot."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.root.conftest import shared_service
from tests.support.service import BIN, CALL_SECONDS, Service

WAITS = "waits: the operator has drained this machine"


def pjwd(service: Service, *words: str) -> tuple[int, str]:
    """Run pjwd on the service's state directory; its exit code, and all that it says."""
    command = [str(BIN / "pjwd"), *words, "--state-dir", str(service.state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def made() -> Iterator[Service]:
    """One service for all tests here."""
    with shared_service() as service:
        yield service


@pytest.fixture
def mine(made: Service) -> Iterator[Service]:
    """The same; it starts jobs again after each test, and has none that runs."""
    yield made
    if made.process is None:
        made.start()
    assert pjwd(made, "resume") == (0, "resumed\n")
    with made.stub() as stub:
        for job in stub.List(pb.ListRequest()).jobs:
            if not job.HasField("end"):
                stub.Stop(pb.StopRequest(id=job.id), timeout=CALL_SECONDS)


def test_a_drained_machine_starts_nothing(mine: Service) -> None:
    """A start is refused in words, and its request may be asked again; what runs goes on."""
    running = mine.start_job("sleep 300")
    with mine.stub() as stub:
        request = pb.StartRequest(command="true", request_id="before")
        before = stub.Start(request, timeout=CALL_SECONDS).job.id
        stub.Wait(pb.WaitRequest(id=before), timeout=CALL_SECONDS)
        assert pjwd(mine, "drain") == (0, "drained; jobs that have not ended: 1\n")
        assert stub.Start(request, timeout=CALL_SECONDS).job.id == before
        with pytest.raises(grpc.RpcError) as caught:
            stub.Start(pb.StartRequest(command="true"), timeout=CALL_SECONDS)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert mine.refused("start", "true")[1] == (
        "pjw: error: cannot start a job: the operator has drained this machine\n"
        "hint: try again later, or let the job wait for its turn: pjw start --queue\n"
    )
    assert mine.job(running).state == pb.JOB_STATE_RUNNING
    assert "state   drained: your operator has no job started now" in mine.ok("quota")
    assert json.loads(mine.ok("quota", "--format", "json"))["drained"] is True
    # once more is no error
    assert pjwd(mine, "drain") == (0, "drained; jobs that have not ended: 1\n")
    assert pjwd(mine, "resume") == (0, "resumed\n")
    assert mine.ok("run", "echo again") == "again\n"
    assert "drained" not in mine.ok("quota")


def test_the_queue_waits(mine: Service) -> None:
    """Jobs are put into it, and start when the machine is resumed."""
    pjwd(mine, "drain")
    job_id = mine.ok("start", "--queue", "echo waited").strip()
    told = json.loads(mine.ok("get", job_id))
    assert (told["state"], told["detail"]) == ("queued", WAITS)
    pjwd(mine, "resume")
    assert mine.ok("logs", job_id) == "waited\n"


def test_it_stays_drained_over_a_restart(mine: Service) -> None:
    """Of a pjwd that was killed, too; nothing out of the queue starts meanwhile; `pjwd check` says so."""
    running = mine.start_job("sleep 300")
    pjwd(mine, "drain")
    job_id = mine.ok("start", "--queue", "true").strip()
    mine.kill("both")
    mine.start()
    assert json.loads(mine.ok("get", job_id))["detail"] == WAITS
    assert mine.refused("start", "true")[0] == 1
    assert mine.job(running).state == pb.JOB_STATE_RUNNING
    assert (
        "warning  this machine is drained: pjwd starts no jobs\n         hint: pjwd resume"
        in (pjwd(mine, "check")[1])
    )


def test_whoever_waits_hears_of_the_last_end(mine: Service) -> None:
    """And not before; an end of the machine's resuming, and one of pjwd, is told as what it is."""
    first, last = mine.start_job("sleep 300"), mine.start_job("sleep 300")
    with waiting(mine) as waiter:
        assert line(waiter) == "drained; jobs that have not ended: 2\n"
        mine.ok("stop", str(first))
        assert waiter.poll() is None
        mine.ok("stop", str(last))
        assert (line(waiter), waiter.wait(CALL_SECONDS)) == ("no job is left\n", 0)
    assert pjwd(mine, "drain", "--wait") == (0, "drained; jobs that have not ended: 0\nno job is left\n")
    pjwd(mine, "resume")
    job_id = mine.start_job("sleep 300")
    with waiting(mine) as waiter:
        line(waiter)
        pjwd(mine, "resume")
        assert waiter.wait(CALL_SECONDS) == 1
        assert waiter.stderr is not None
        assert "any more: it was resumed\nhint: pjwd drain --wait\n" in waiter.stderr.read()
    with waiting(mine) as waiter:
        line(waiter)
        mine.kill("both")
        assert waiter.wait(CALL_SECONDS) == 1
        assert waiter.stderr is not None
        assert "has ended meanwhile; its jobs go on, and it stays as asked" in waiter.stderr.read()
    # without pjwd the mark alone is there
    code, said = pjwd(mine, "drain", "--wait")
    assert (code, said.splitlines()[0]) == (1, "drained; no pjwd serves this machine now")
    assert "no pjwd serves it\nhint: start pjwd, and wait again" in said
    mine.start()
    assert mine.job(job_id).state == pb.JOB_STATE_RUNNING


def waiting(service: Service) -> "subprocess.Popen[str]":
    """`pjwd drain --wait`."""
    command = [str(BIN / "pjwd"), "drain", "--wait", "--state-dir", str(service.state)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    """The next line that it says."""
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_start_under_way_is_waited_for(mine: Service) -> None:
    """Who waits counts the starts that had begun; many at once leave no job behind the last word."""
    with mine.stub() as stub:
        # at once, and out of the queue
        start = pb.StartRequest(command="sleep 0.2")
        stub.Submit(pb.SubmitRequest(jobs=[pb.QueuedJob(start=start) for _ in range(20)]))
        starts = [stub.Start.future(start) for _ in range(20)]
        assert pjwd(mine, "drain", "--wait")[0] == 0
        left = {job.state for job in stub.List(pb.ListRequest()).jobs if not job.HasField("end")}
        assert left <= {pb.JOB_STATE_QUEUED}
        assert {each.code() for each in starts} <= {
            grpc.StatusCode.OK,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }


def test_only_root_drains(mine: Service, tmp_path: Path) -> None:
    """And only where there is a state directory; a gateway has no jobs to drain."""
    command = [str(BIN / "pjwd"), "drain", "--state-dir", str(mine.state)]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert not os.path.lexists(mine.state / "drained")
    nowhere = tmp_path / "nowhere"
    done = subprocess.run([*command[:-1], str(nowhere)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        1,
        f"pjwd: error: there is no state directory {nowhere}",
    )
    config = tmp_path / "gateway.toml"
    config.write_text('[gateway]\ncrt = "/a"\nkey = "/b"\n')
    done = subprocess.run(
        [*command[:2], "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert done.stderr == (
        "pjwd: error: cannot drain a gateway: it runs no jobs\nhint: pjw nodes drain NODE\n"
    )
