"""What Logs is asked for beyond all of the output: an end, the last lines, times, stderr; over real TLS."""

import asyncio
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.errors import LauncherGoneError
from pjw.model import Job, JobSpec
from pjw.server.authz import Caller
from pjw.server.service import JobWorkerService
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part
from pjw.worker.store import JobStore
from tests.support.service import CALL_SECONDS, Service, wait_for
from tests.support.worker_harness import ASK, DEADLINE_SECONDS, Bench, read_all

STDERR = pb.OUTPUT_STREAM_STDERR


def start(service: Service, command: str, **how: object) -> int:
    """Start a job; its id."""
    with service.stub() as stub:
        return stub.Start(pb.StartRequest(command=command, **how), timeout=CALL_SECONDS).job.id  # type: ignore[arg-type]


def read(service: Service, job_id: int, **how: object) -> bytes:
    """All that a call of Logs answers."""
    return b"".join(answer.data for answer in answers(service, job_id, **how))


def answers(service: Service, job_id: int, **how: object) -> list[pb.LogsResponse]:
    """Each answer of a call of Logs that has output."""
    with service.stub() as stub:
        found = list(stub.Logs(pb.LogsRequest(id=job_id, **how), timeout=CALL_SECONDS))  # type: ignore[arg-type]
    empty = [answer for answer in found if not answer.data]
    sought = bool({"tail_lines", "since"} & how.keys())
    assert [answer.HasField("offset") for answer in empty] == [True] * sought
    return [answer for answer in found if answer.data]


def refused(service: Service, job_id: int, **how: object) -> tuple[grpc.StatusCode, str | None]:
    """The code and words of a call of Logs that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        answers(service, job_id, **how)
    return caught.value.code(), caught.value.details()


@pytest.fixture
def running(service: Service) -> Iterator[int]:
    """A job that has written three lines, the last without an end, and goes on."""
    job_id = start(service, "printf 'one\\ntwo\\nthree'; exec sleep 1000")
    wait_for(lambda: read(service, job_id, no_follow=True) == b"one\ntwo\nthree")
    yield job_id
    with service.stub() as stub:
        stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=CALL_SECONDS)


# --- an end, and the last lines


def test_the_end_of_what_is_there(service: Service, running: int) -> None:
    """The call ends although the job runs, from any offset."""
    assert read(service, running, no_follow=True) == b"one\ntwo\nthree"
    assert read(service, running, no_follow=True, offset=4) == b"two\nthree"
    assert read(service, running, no_follow=True, offset=13) == b""
    assert refused(service, running, no_follow=True, offset=14)[0] is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(0, b""), (1, b"three"), (2, b"two\nthree"), (3, b"one\ntwo\nthree"), (9, b"one\ntwo\nthree")],
)
def test_the_last_lines(service: Service, running: int, lines: int, expected: bytes) -> None:
    """So many, whether the last one has ended or not, and not before the offset."""
    assert read(service, running, no_follow=True, tail_lines=lines) == expected
    assert (
        read(service, running, no_follow=True, tail_lines=lines, offset=5) == expected[-8:][: len(expected)]
    )


def test_the_last_lines_and_what_comes(service: Service) -> None:
    """Without no_follow the call goes on to the job's end."""
    job_id = start(service, ASK + "echo one; echo two; read x <&3; echo three")
    wait_for(lambda: read(service, job_id, no_follow=True) == b"one\ntwo\n")
    with service.stub() as stub:
        stream = stub.Logs(pb.LogsRequest(id=job_id, tail_lines=1), timeout=CALL_SECONDS)
        # where they begin, and the line itself
        assert [next(stream).data for _ in range(2)] == [b"", b"two\n"]
        service.tell(job_id)
        assert b"".join(answer.data for answer in stream) == b"three\n"
    assert read(service, job_id, tail_lines=1) == b"three\n"


async def test_the_last_lines_are_looked_for_in_a_job_that_is_looked_up_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells where they begin is what they are read from: all of the output takes as many looks."""
    worker = await bench.open()
    job = await worker.start(JobSpec("seq 9"))
    await worker.wait(job.id)
    looked_up: list[int] = []
    look_up = JobStore.get

    async def counted(store: JobStore, job_id: int, owner: str | None) -> Job | None:
        looked_up.append(job_id)
        return await look_up(store, job_id, owner)

    monkeypatch.setattr(JobStore, "get", counted)
    service, looks, found = JobWorkerService(worker), list[int](), list[pb.LogsResponse]()
    for request in (pb.LogsRequest(id=job.id), pb.LogsRequest(id=job.id, tail_lines=2)):
        looked_up.clear()
        calls = service.logs(request, Caller("local", "local"))
        found = [pb.LogsResponse.FromString(a) if isinstance(a, bytes) else a async for a in calls]
        looks.append(len(looked_up))
    assert [(answer.offset, answer.data) for answer in found] == [(14, b""), (0, b"8\n9\n")]
    assert looks[0] == looks[1] > 0


def test_a_negative_number_of_lines(service: Service, running: int) -> None:
    """It is refused in words."""
    code, words = refused(service, running, tail_lines=-1)
    assert (code, words) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the number of last lines must be 0 or more, not -1",
    )


# --- stderr


def test_stderr_is_read_alone(service: Service) -> None:
    """Each stream by itself, while the job runs and after; both count as its output."""
    job_id = start(service, "echo out; echo err >&2; sleep 0.3; echo more >&2", split_stderr=True)
    assert read(service, job_id, stream=STDERR) == b"err\nmore\n"
    assert read(service, job_id) == b"out\n"
    job = service.job(job_id)
    assert (job.split_stderr, job.output_bytes) == (True, len("out\nerr\nmore\n"))
    files = service.state / "jobs" / str(job_id)
    wait_for(lambda: not (files / "status").exists())
    # on a slow machine it has run long enough for a sample
    names = {path.name for path in files.iterdir()} - {"usage"}
    assert names == {"output", "times", "stderr", "stderr_times"}
    assert read(service, job_id, stream=STDERR, tail_lines=1) == b"more\n"
    with service.stub() as stub:
        stub.Delete(pb.DeleteRequest(id=job_id), timeout=CALL_SECONDS)
    wait_for(lambda: not files.exists())


def test_a_split_job_without_output_leaves_no_file(service: Service) -> None:
    """As one that is not split."""
    job_id = start(service, "true", split_stderr=True)
    assert (read(service, job_id), read(service, job_id, stream=STDERR)) == (b"", b"")
    wait_for(lambda: not (service.state / "jobs" / str(job_id)).exists())
    assert (read(service, job_id), read(service, job_id, stream=STDERR)) == (b"", b"")


def test_stderr_that_is_not_apart(service: Service, running: int) -> None:
    """It is refused in words, for a job that runs and one that has ended; a stream that is none as well."""
    ended = start(service, "true")
    assert read(service, ended) == b""
    for job_id in (running, ended):
        code, words = refused(service, job_id, stream=STDERR)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert words is not None
        assert words.startswith(f"cannot read the stderr of job {job_id} alone")
    assert refused(service, running, stream=7)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert refused(service, 10**6, stream=STDERR)[0] is grpc.StatusCode.NOT_FOUND


def test_the_output_limit_of_a_split_job(service: Service) -> None:
    """It counts both."""
    command = "head -c 600 /dev/zero; head -c 600 /dev/zero >&2"
    job_id = start(service, command, split_stderr=True, limits=pb.Limits(output_max_bytes=1000))
    assert (len(read(service, job_id)), len(read(service, job_id, stream=STDERR))) == (600, 400)
    assert service.job(job_id).reason == pb.END_REASON_OUTPUT_LIMIT


async def test_a_split_job_is_adopted(bench: Bench) -> None:
    """The next worker knows both streams, and their followers see the end."""
    worker = await bench.open()
    job = await worker.start(JobSpec("echo err >&2; echo out; sleep 0.5; echo more >&2", split_stderr=True))
    await bench.wait_for_output(job.id, b"out\n")
    await bench.close(worker)
    worker = await bench.open()
    async with asyncio.timeout(DEADLINE_SECONDS):
        chunks = [chunk async for chunk in worker.logs(job.id, Part(stderr=True))]
    assert b"".join(chunks) == b"err\nmore\n"
    assert await read_all(worker, job.id) == b"out\n"
    assert (await worker.get(job.id)).output_bytes == len("err\nout\nmore\n")


async def test_closing_the_worker_ends_who_follows_stderr(bench: Bench) -> None:
    """They are told that the job goes on, as those of the output are."""
    worker = await bench.open()
    job = await worker.start(JobSpec("echo err >&2; exec sleep 1000", split_stderr=True))
    chunks = worker.logs(job.id, Part(stderr=True))
    assert await anext(chunks) == b"err\n"
    await bench.close(worker)
    with pytest.raises(LauncherGoneError):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await anext(chunks)


# --- times


def nanoseconds(answer: pb.LogsResponse) -> int:
    """When an answer says that it was written."""
    assert answer.HasField("time")
    return answer.time.seconds * 10**9 + answer.time.nanos


def say(service: Service, job_id: int, records: int, name: str = "times") -> int:
    """Have a job say the time; the time when there are so many records of its output."""
    path = service.state / "jobs" / str(job_id) / name
    service.tell(job_id)
    wait_for(lambda: path.stat().st_size == 16 * records)
    return time.time_ns()


@pytest.mark.parametrize("split_stderr", [False, True])
def test_times_are_those_of_the_writes(service: Service, split_stderr: bool) -> None:
    """Followed live and read later, each line has the time at which the job wrote it."""
    redirect, stream = (" >&2", STDERR) if split_stderr else ("", pb.OUTPUT_STREAM_UNSPECIFIED)
    script = ASK + f"for n in 1 2 3; do read x <&3; date +%s%N{redirect}; done"
    job_id = start(service, script, split_stderr=split_stderr)
    with service.stub() as stub:
        request = pb.LogsRequest(id=job_id, stream=stream, timestamps=True)
        call = stub.Logs(request, timeout=CALL_SECONDS)
        name = "stderr_times" if split_stderr else "times"
        live, recorded = [], []
        for number in (1, 2, 3):
            recorded.append(say(service, job_id, number, name))
            live.append(next(call))
        assert list(call) == []
    later = answers(service, job_id, stream=stream, timestamps=True)
    for found in (live, later):
        for answer, latest in zip(found, recorded, strict=True):
            assert int(answer.data) - 1_000 <= nanoseconds(answer) <= latest


def test_times_from_an_offset_and_of_the_last_lines(service: Service) -> None:
    """They are as precise there."""
    job_id = start(service, ASK + "for n in 1 2 3; do read x <&3; date +%s%N; done")
    for number in (1, 2, 3):
        say(service, job_id, number)
    every = answers(service, job_id, timestamps=True)
    assert len(every) == 3
    expected = [(answer.data, nanoseconds(answer)) for answer in every]
    for how, first in (({}, 0), ({"tail_lines": 2}, 1), ({"offset": len(every[0].data)}, 1)):
        found = answers(service, job_id, timestamps=True, **how)
        assert [(answer.data, nanoseconds(answer)) for answer in found] == expected[first:]


def test_what_was_written_since_a_time(service: Service) -> None:
    """`--since` is a time, `--offset` a number of bytes; where there are no times, it is refused (U13)."""
    job_id = start(service, ASK + "for n in 1 2 3; do read x <&3; echo $n; done")
    for number in (1, 2, 3):
        say(service, job_id, number)
    read(service, job_id)
    second = answers(service, job_id, timestamps=True)[1]
    for how in ({}, {"tail_lines": 3}):
        found = answers(service, job_id, since=second.time, **how)
        assert b"".join(answer.data for answer in found) == b"2\n3\n"
    name = str(job_id)
    assert service.ok("logs", "--since", second.time.ToJsonString(), name) == "2\n3\n"
    assert service.ok("logs", "--since", "1h", name) == "1\n2\n3\n"
    assert service.ok("logs", "--offset", "2", name) == "2\n3\n"
    assert "'2' is not a time, such as 10m (ago)" in service.refused("logs", "--since", "2", name)[1]
    files = service.state / "jobs" / name
    wait_for(lambda: not (files / "status").exists())
    (files / "times").unlink()
    assert (
        "cannot begin at a time: nobody wrote down when" in service.refused("logs", "--since", "1h", name)[1]
    )


def test_without_being_asked_for_there_is_no_time(service: Service) -> None:
    """The ordinary answer has bytes alone."""
    job_id = start(service, "echo words")
    assert [answer.HasField("time") for answer in answers(service, job_id)] == [False]


def test_a_job_of_an_older_version_has_no_times(service: Service) -> None:
    """Its output is told without."""
    job_id = start(service, "echo words")
    read(service, job_id)
    files = service.state / "jobs" / str(job_id)
    wait_for(lambda: not (files / "status").exists())
    (files / "times").unlink()
    (answer,) = answers(service, job_id, timestamps=True)
    assert (answer.data, answer.HasField("time")) == (b"words\n", False)


def test_times_survive_a_kill_of_the_server(make_service: Callable[..., Service]) -> None:
    """init writes them: what is written while no server runs has its time."""
    service = make_service().start()
    job_id = start(service, ASK + "echo ready; read x <&3; date +%s%N; exec sleep 1000")
    path = service.state / "jobs" / str(job_id) / "times"
    wait_for(lambda: len(path.read_bytes()) == 16)
    service.stop(signal.SIGKILL)
    latest = say(service, job_id, 2)
    service.start()
    answer = answers(service, job_id, timestamps=True, no_follow=True)[-1]
    (_, _), (ns, end) = struct.iter_unpack("=qQ", path.read_bytes())
    assert end == len("ready\n") + len(answer.data)
    assert abs(nanoseconds(answer) - ns) < 1_000
    assert int(answer.data) - 1_000 <= nanoseconds(answer) <= latest


def test_the_size_of_the_times_is_bounded(service: Service) -> None:
    """A job that writes line by line, as fast as it can, has a record for each few milliseconds at most."""
    before = time.monotonic()
    job_id = start(service, "yes words | head -n 20000 | sed -u s/x/y/")
    size = len(read(service, job_id))
    took = time.monotonic() - before
    records = (service.state / "jobs" / str(job_id) / "times").stat().st_size // 16
    assert (size, records <= took * 250 + 3) == (120_000, True)


def test_a_follower_of_times_that_leaves(service: Service) -> None:
    """Neither descriptor stays."""
    job_id = start(service, "while :; do echo words; sleep 0.05; done")
    before = service.descriptors()
    with service.stub() as stub:
        stream = stub.Logs(pb.LogsRequest(id=job_id, timestamps=True))
        seen = threading.Event()
        assert next(iter(stream)).data == b"words\n"
        seen.set()
        stream.cancel()
    wait_for(lambda: service.open_outputs(job_id) == 0)
    wait_for(lambda: service.descriptors() <= before)
    with service.stub() as stub:
        stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=CALL_SECONDS)


def test_escape_sequences_at_a_terminal(service: Service) -> None:
    """A terminal is given text and colours, and all with --raw and by `run`; a pipe has every byte."""
    job_id = start(service, r"printf '\033[31mred\033[m \033[2J\033]0;title\007\n'")
    raw = "\x1b[31mred\x1b[m \x1b[2J\x1b]0;title\x07"
    shown = "\x1b[31mred\x1b[m \\x1b[2J\\x1b]0;title\\x07\r\n"
    assert service.at_terminal("logs", str(job_id)) == shown
    assert service.at_terminal("logs", "--timestamps", str(job_id)).partition(" ")[2] == shown
    assert service.at_terminal("logs", "--raw", str(job_id)) == f"{raw}\r\n"
    assert raw in service.at_terminal("run", "printf", r"\033[31mred\033[m \033[2J\033]0;title\007")
    assert service.pjw("logs", str(job_id)).stdout == f"{raw}\n".encode()
