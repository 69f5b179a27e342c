"""Input on a real pjwd, by raw calls: whole to the byte, refused in words, gone with its job."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.disks import MIB, fill, small_disk
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.uploads import CHUNK_BYTES, Upload, sha256_line, some_bytes, upload

Code: Final = grpc.StatusCode


@pytest.fixture
def stub(service: Service) -> Iterator[JobWorkerServiceStub]:
    """Alice's calls to the service of all."""
    with service.stub() as stub:
        yield stub


def start(stub: JobWorkerServiceStub, command: str, *, takes_input: bool = True) -> int:
    """Start a job that reads."""
    return stub.Start(pb.StartRequest(command=command, input=takes_input), timeout=CALL_SECONDS).job.id


def output(stub: JobWorkerServiceStub, job_id: int) -> bytes:
    """All output of a job, which ends."""
    return b"".join(part.data for part in stub.Logs(pb.LogsRequest(id=job_id), timeout=CALL_SECONDS))


def stop(stub: JobWorkerServiceStub, job_id: int) -> None:
    """End a job at once."""
    stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=CALL_SECONDS)


def wait_for_output(stub: JobWorkerServiceStub, job_id: int, text: bytes) -> None:
    """Follow a job until it has said that."""
    got, call = b"", stub.Logs(pb.LogsRequest(id=job_id), timeout=CALL_SECONDS)
    for part in call:
        got += part.data
        if text in got:
            call.cancel()
            return
    raise AssertionError(got)


def file_of(service: Service, job_id: int) -> Path:
    """Where the input is kept."""
    return service.state / "jobs" / str(job_id) / "input"


def cpu_seconds(pid: int) -> float:
    """What a process has used of a processor."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


# --- every byte


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3 * MIB + 7, 64 * MIB])
def test_input_is_whole_to_the_byte(service: Service, stub: JobWorkerServiceStub, size: int) -> None:
    """From nothing to much more than a pipe holds; the file goes with the job."""
    data = some_bytes(size)
    job_id = start(stub, "sha256sum")
    last = upload(stub, job_id, data)
    assert (last.offset, last.ended) == (size, True)
    assert output(stub, job_id) == sha256_line(data)
    assert stub.Get(pb.GetRequest(id=job_id)).job.input
    assert not file_of(service, job_id).exists()


def test_a_conversation(stub: JobWorkerServiceStub) -> None:
    """What is sent is read at once, while the output is followed and nothing has ended."""
    job_id = start(stub, "cat")
    lines = stub.Logs(pb.LogsRequest(id=job_id), timeout=CALL_SECONDS)
    with Upload(stub, job_id) as call:
        sent = b""
        for number in range(20):
            line = f"line {number}\n".encode()
            call.write(line, len(sent))
            sent += line
            assert next(lines).data == line
        call.write(b"", len(sent), end=True)
        assert list(lines) == []
        assert call.code() is Code.OK


def test_the_pipe_can_be_opened_anew(stub: JobWorkerServiceStub) -> None:
    """/dev/stdin is the job's own."""
    job_id = start(stub, "exec sha256sum /dev/stdin")
    upload(stub, job_id, b"by name")
    assert output(stub, job_id) == sha256_line(b"by name").replace(b"-", b"/dev/stdin")


def test_a_job_without_input_has_an_empty_one(service: Service, stub: JobWorkerServiceStub) -> None:
    """As ever, and no file for it."""
    job_id = start(stub, "readlink /proc/self/fd/0; exec sleep 300", takes_input=False)
    wait_for_output(stub, job_id, b"/dev/null\n")
    assert not file_of(service, job_id).exists()
    stop(stub, job_id)


# --- input that breaks off


def test_a_lost_call_goes_on_where_it_was(stub: JobWorkerServiceStub) -> None:
    """The job waits, and what is sent twice is written once."""
    data = some_bytes(2 * MIB)
    job_id = start(stub, "sha256sum")
    with Upload(stub, job_id) as call:
        assert call.write(data[:MIB], 0) == MIB
    with Upload(stub, job_id) as call:
        assert (call.offset, call.first.ended) == (MIB, False)
        assert call.write(data[MIB - 1000 : MIB + 5], MIB - 1000) == MIB + 5
        assert call.write(data[MIB:], MIB) == 2 * MIB
        assert call.write(data[-MIB:], MIB, end=True) == 2 * MIB
        assert call.code() is Code.OK
    assert output(stub, job_id) == sha256_line(data)


def test_half_closing_is_no_end(stub: JobWorkerServiceStub) -> None:
    """A client that has nothing more to say has not said that it is all."""
    job_id = start(stub, "sha256sum")
    request = pb.WriteInputRequest(id=job_id, data=b"half")
    assert [answer.offset for answer in stub.WriteInput(iter([request]), timeout=CALL_SECONDS)] == [0, 4]
    assert stub.Get(pb.GetRequest(id=job_id)).job.state == pb.JOB_STATE_RUNNING
    upload(stub, job_id, b"half and whole")
    assert output(stub, job_id) == sha256_line(b"half and whole")


def test_an_end_that_was_told_is_told_again(stub: JobWorkerServiceStub) -> None:
    """To a client that lost the answer; nothing can be added."""
    job_id = start(stub, "cat; exec sleep 300")
    upload(stub, job_id, b"all of it")
    with Upload(stub, job_id) as call:
        assert (call.offset, call.first.ended, call.code()) == (9, True, Code.OK)
    request = pb.WriteInputRequest(id=job_id, data=b"all of it, and more")
    with pytest.raises(grpc.RpcError, match="has ended at byte 9") as caught:
        list(stub.WriteInput(iter([request]), timeout=CALL_SECONDS))
    assert caught.value.code() is Code.FAILED_PRECONDITION
    stop(stub, job_id)


@pytest.mark.parametrize("how", ["kill", "restart", "launcher"])
def test_an_upload_goes_on_after_the_end_of_pjwd(make_service: Callable[..., Service], how: str) -> None:
    """Killed, restarted or without a launcher, several times in mid-upload: no byte is lost or doubled."""
    service = make_service().start()
    data, answered = some_bytes(8 * MIB), 0
    with service.stub() as stub:
        job_id = start(stub, "sha256sum")
    for _ in range(4):
        with service.stub() as stub, Upload(stub, job_id) as call:
            assert call.offset >= answered
            answered = call.write(data[call.offset : call.offset + CHUNK_BYTES], call.offset)
            # unanswered: they may arrive, in whole or in part, or not
            for start_of in range(answered, answered + 8 * CHUNK_BYTES, CHUNK_BYTES):
                call.ask(data[start_of : start_of + CHUNK_BYTES], start_of)
            if how == "launcher":
                os.kill(service.launcher_pid(), signal.SIGKILL)
                assert service.process is not None
                service.process.wait(30)
            else:
                service.stop(signal.SIGKILL if how == "kill" else signal.SIGTERM)
            assert call.code() in (Code.UNAVAILABLE, Code.CANCELLED)
        service.start()
        assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    with service.stub() as stub:
        assert upload(stub, job_id, data).ended
        assert output(stub, job_id) == sha256_line(data)


def test_an_end_outlives_pjwd(make_service: Callable[..., Service]) -> None:
    """What was told to be whole is read to its end while no server runs."""
    service = make_service().start()
    data = some_bytes(4 * MIB)
    with service.stub() as stub:
        job_id = start(stub, "mkfifo go; read x <go; sha256sum; echo read")
        upload(stub, job_id, data)
    service.stop(signal.SIGKILL)
    with (service.state / "scratch" / str(job_id) / "go").open("wb") as go:
        go.write(b"go\n")
    path = service.state / "jobs" / str(job_id) / "output"
    wait_for(lambda: path.read_bytes() == sha256_line(data) + b"read\n")
    service.start()
    with service.stub() as stub:
        wait_for(lambda: service.job(job_id).state == pb.JOB_STATE_EXITED)
        with pytest.raises(grpc.RpcError, match="has ended"):
            Upload(stub, job_id)
    assert not file_of(service, job_id).exists()


def test_the_newest_call_writes(stub: JobWorkerServiceStub) -> None:
    """The one before is ended in words: it may be the same client's, whose connection has died unseen."""
    job_id = start(stub, "cat")
    with Upload(stub, job_id) as first, Upload(stub, job_id) as second, Upload(stub, job_id) as third:
        assert (first.code(), second.code()) == (Code.FAILED_PRECONDITION, Code.FAILED_PRECONDITION)
        third.write(b"third", 0, end=True)
        assert third.code() is Code.OK
    assert output(stub, job_id) == b"third"


# --- who reads no more


def test_head_ends_an_upload(stub: JobWorkerServiceStub) -> None:
    """A job that ends before its input does ends the call, in mid-stream and at once."""
    job_id = start(stub, "head -n 1")
    with Upload(stub, job_id) as call:
        call.ask(b"first\n", 0)
        assert call.code() is Code.FAILED_PRECONDITION
    assert output(stub, job_id) == b"first\n"
    assert stub.Get(pb.GetRequest(id=job_id)).job.exit_code == 0


def test_head_ends_a_large_upload(stub: JobWorkerServiceStub) -> None:
    """The same while the client sends as fast as it can."""
    job_id = start(stub, "head -c 100000 | wc -c")
    with pytest.raises(grpc.RpcError) as caught:
        upload(stub, job_id, bytes(256 * MIB))
    assert caught.value.code() is Code.FAILED_PRECONDITION
    assert output(stub, job_id) == b"100000\n"


def test_a_closed_stdin_ends_an_upload(service: Service, stub: JobWorkerServiceStub) -> None:
    """The command lives, and reads no more: the next message is refused, and init does not spin."""
    job_id = start(stub, "read x; exec <&-; echo closed; exec sleep 300")
    with Upload(stub, job_id) as call:
        call.write(b"one\n", 0)
        wait_for_output(stub, job_id, b"closed\n")
        wait_for(lambda: pipes(service.init_pid(job_id)) == 1)
        before, since = cpu_seconds(service.init_pid(job_id)), time.monotonic()
        call.ask(b"two\n", 4)
        assert call.code() is Code.FAILED_PRECONDITION
        wait_for(lambda: time.monotonic() - since > 0.3)
        assert cpu_seconds(service.init_pid(job_id)) - before < 0.1
    with Upload(stub, job_id) as call:
        call.ask(b"two\n", 4)
        assert call.code() is Code.FAILED_PRECONDITION
    stop(stub, job_id)


def pipes(pid: int) -> int:
    """How many ends of pipes a process has."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{pid}/fd/{name}").startswith("pipe:")
    return found


def test_a_stop_ends_an_upload(service: Service, stub: JobWorkerServiceStub) -> None:
    """At once, also of a client that is silent; nothing stays."""
    job_id = start(stub, "cat")
    with Upload(stub, job_id) as call:
        call.write(b"before\n", 0)
        stop(stub, job_id)
        assert call.code() is Code.FAILED_PRECONDITION
    assert not file_of(service, job_id).exists()


def test_a_slow_reader_costs_no_memory(service: Service, stub: JobWorkerServiceStub) -> None:
    """What nobody has read yet is on the disk: neither server nor init holds it."""
    data = some_bytes(64 * MIB) * 2
    job_id = start(stub, "mkfifo go; read x <go; sha256sum")
    status = Path(f"/proc/{service.pid}/status")
    before = rss_kib(status)
    assert upload(stub, job_id, data).ended
    assert rss_kib(status) - before < 12 * 1024
    assert rss_kib(Path(f"/proc/{service.init_pid(job_id)}/status")) < 2 * 1024
    with (service.state / "scratch" / str(job_id) / "go").open("wb") as go:
        go.write(b"go\n")
    assert output(stub, job_id) == sha256_line(data)


def rss_kib(status: Path) -> int:
    """How much memory a process has."""
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1])


# --- refusals


@contextmanager
def refused(code: grpc.StatusCode, words: str) -> Iterator[None]:
    """A call that must fail so."""
    with pytest.raises(grpc.RpcError, match=words) as caught:
        yield
    assert caught.value.code() is code


def test_what_is_refused(service: Service, stub: JobWorkerServiceStub) -> None:
    """Each with its code and words; the job goes on, with the input that it had."""
    job_id = start(stub, "cat")
    with Upload(stub, job_id) as call:
        call.write(b"abc", 0)
    for request, code, words in (
        (pb.WriteInputRequest(offset=4, data=b"x"), Code.OUT_OF_RANGE, "from byte 4: it has 3 bytes"),
        (pb.WriteInputRequest(offset=4, end=True), Code.OUT_OF_RANGE, "from byte 4: it has 3 bytes"),
        (pb.WriteInputRequest(offset=-1, data=b"x"), Code.INVALID_ARGUMENT, "has no byte -1"),
        (pb.WriteInputRequest(offset=2, end=True), Code.INVALID_ARGUMENT, "cannot end at byte 2: 3 are"),
        (pb.WriteInputRequest(offset=3, data=bytes(MIB + 1)), Code.INVALID_ARGUMENT, "at most 1048576"),
    ):
        request.id = job_id
        with refused(code, words):
            list(stub.WriteInput(iter([request]), timeout=CALL_SECONDS))
    with refused(Code.INVALID_ARGUMENT, "must say which job"):
        list(stub.WriteInput(iter([]), timeout=CALL_SECONDS))
    for other in (start(stub, "sleep 300", takes_input=False), start(stub, "true", takes_input=False)):
        with refused(Code.FAILED_PRECONDITION, f"job {other} takes no input"):
            Upload(stub, other)
        stop(stub, other)
    with service.stub("bob") as bob, refused(Code.NOT_FOUND, f"no job {job_id}"):
        Upload(bob, job_id)
    with Upload(stub, job_id) as call:
        call.write(b"", 3, end=True)
    assert output(stub, job_id) == b"abc"
    with refused(Code.FAILED_PRECONDITION, f"job {job_id} has ended"):
        Upload(stub, job_id)


def test_an_admin_writes_to_its_own_jobs_alone(make_service: Callable[..., Service]) -> None:
    """To write into another's job is to act as its owner."""
    service = make_service(clients=("alice", "ann"), config='[roles]\nadmins = ["ann"]\n').start()
    with service.stub() as alice, service.stub("ann") as ann:
        job_id = start(alice, "cat")
        with refused(Code.NOT_FOUND, f"no job {job_id}"):
            Upload(ann, job_id)
        stop(alice, job_id)


def test_a_ceiling_and_a_quota(make_service: Callable[..., Service]) -> None:
    """Of one input, and of all that is stored for a client, input included."""
    service = make_service(config="[clients]\ninput_bytes_max = 1000\nstored_bytes_max = 1500\n").start()
    with service.stub() as stub:
        first, second = start(stub, "cat >/dev/null"), start(stub, "cat >/dev/null")
        with refused(Code.RESOURCE_EXHAUSTED, "longer than 1000 bytes"):
            upload(stub, first, bytes(1001))
        with Upload(stub, first) as call:
            call.write(bytes(1000), 0)
        with Upload(stub, second) as call:
            call.write(bytes(200), 0)
            with refused(
                Code.RESOURCE_EXHAUSTED,
                r"have 1.2K \(1200 bytes\) of output, artifacts, input, scratch, workspaces and images",
            ):
                call.write(bytes(301), 200)
        assert file_of(service, second).stat().st_size == 200
        with Upload(stub, second) as call:
            # what is there is passed over, and counts once
            call.write(bytes(500), 0)
        with refused(
            Code.RESOURCE_EXHAUSTED,
            r"have 1.5K \(1500 bytes\) of output, artifacts, input, scratch, workspaces and images",
        ):
            Upload(stub, second)
        with refused(
            Code.RESOURCE_EXHAUSTED,
            r"have 1.5K \(1500 bytes\) of output, artifacts, input, scratch, workspaces and images",
        ):
            start(stub, "true")
        stop(stub, first)
        assert upload(stub, second, bytes(800)).ended


@pytest.mark.skipif("PJW_VM_GUEST" in os.environ, reason="that machine has no loop device")
def test_a_full_disk_is_told_and_loses_nothing(make_service: Callable[..., Service]) -> None:
    """RESOURCE_EXHAUSTED; when there is space again the upload goes on at what was written."""
    with small_disk(48) as disk:
        service = make_service()
        service.state = disk / "state"
        service.start()
        data = some_bytes(8 * MIB)
        with service.stub() as stub:
            job_id = start(stub, "sha256sum")
            fill(disk / "full", leave=3 * MIB)
            with refused(Code.RESOURCE_EXHAUSTED, "no space left on device"):
                upload(stub, job_id, data)
            assert stub.Get(pb.GetRequest(id=job_id)).job.state == pb.JOB_STATE_RUNNING
            (disk / "full").unlink()
            with Upload(stub, job_id) as call:
                begin = call.offset
            assert 0 < begin < len(data)
            assert upload(stub, job_id, data, begin).ended
            assert output(stub, job_id) == sha256_line(data)
        service.stop()


def test_an_upload_leaves_no_descriptor(service: Service, stub: JobWorkerServiceStub) -> None:
    """However it ends."""
    job_id = start(stub, "cat")
    with Upload(stub, job_id) as call:
        call.write(b"1", 0)
    before = service.descriptors()
    for number in range(1, 6):
        with Upload(stub, job_id) as call:
            call.write(b"1", number)
    with refused(Code.OUT_OF_RANGE, "from byte 100"):
        list(stub.WriteInput(iter([pb.WriteInputRequest(id=job_id, offset=100, data=b"x")]), timeout=60))
    wait_for(lambda: service.descriptors() <= before)
    stop(stub, job_id)
