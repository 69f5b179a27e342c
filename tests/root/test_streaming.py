"""Followers: any number, joined at any time. Each sees every byte, and costs the others nothing."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support import pjwd_with
from tests.support.service import CALL_SECONDS, Service, ask, wait_for
from tests.support.worker_harness import ASK

MIB: Final = 1024 * 1024
# Random to the eye and to compression, and the same each time: so a test knows the truth without pjw.
GENERATE: Final = (
    "openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 00 -in /dev/zero 2>/dev/null | head -c"
)
MANY_FOLLOWERS: Final = 50


def sha256_of(size: int) -> str:
    """The hash of so many bytes of the generator, run by the test itself."""
    with subprocess.Popen(["sh", "-c", f"{GENERATE} {size}"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        digest = hashlib.file_digest(process.stdout, "sha256")  # type: ignore[arg-type]
    return digest.hexdigest()


class Follower:
    """One reader over a connection of its own, in a thread; it hashes what it gets."""

    def __init__(self, service: Service, job_id: int, offset: int = 0) -> None:
        self.size = 0
        self.first = threading.Event()
        self.may_read = threading.Event()
        self.may_read.set()
        self._digest: Final = hashlib.sha256()
        self._thread: Final = threading.Thread(target=self._run, args=(service, job_id, offset), daemon=True)
        self._error: BaseException | None = None
        self._thread.start()

    def _run(self, service: Service, job_id: int, offset: int) -> None:
        try:
            with service.stub() as stub:
                for response in stub.Logs(pb.LogsRequest(id=job_id, offset=offset)):
                    self._digest.update(response.data)
                    self.size += len(response.data)
                    self.first.set()
                    self.may_read.wait()
        except BaseException as error:  # noqa: BLE001  told by result()
            self._error = error

    def result(self, seconds: float = 120) -> tuple[int, str]:
        """How many bytes there were, and their hash; when the stream has ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), self.size
        if self._error is not None:
            raise self._error
        return self.size, self._digest.hexdigest()


@pytest.fixture(scope="module")
def big(service: Service) -> tuple[int, int, str]:
    """An ended job with 64 MiB of output: its id, its size, its hash."""
    size = 64 * MIB
    job_id = service.start_job(f"{GENERATE} {size}")
    with service.stub() as stub:
        for _ in stub.Logs(pb.LogsRequest(id=job_id, offset=0)):
            pass
    return job_id, size, sha256_of(size)


@contextmanager
def silent_job(service: Service, client: str = "alice") -> Iterator[int]:
    """A job that says nothing and is stopped at the end."""
    job_id = service.start_job("sleep 300", client)
    yield job_id
    with service.stub(client) as stub:
        stub.Stop(pb.StopRequest(id=job_id))


def follow_at_any_time(service: Service, size: int, count: int, truth: str, seconds: float) -> None:
    """*count* readers join before, during and after the output, and one stalls; all must see it all."""
    # the first lot joins before there is any output, and the second while the job runs
    job_id = service.start_job(
        ASK + f"read x <&3; {GENERATE} {size} | {{ head -c {size // 2}; read x <&3; cat; }}"
    )
    before = [Follower(service, job_id) for _ in range(max(1, count // 3))]
    stalled = before[0]
    stalled.may_read.clear()
    wait_for(lambda: service.open_outputs(job_id) == len(before), seconds)
    assert not any(follower.first.is_set() for follower in before)
    service.tell(job_id)
    during = [Follower(service, job_id) for _ in range(count // 3)]
    for follower in before + during:
        assert follower.first.wait(seconds)
    service.tell(job_id)
    # neither the job nor the other readers wait for the one that does not read
    for follower in before[1:] + during:
        assert follower.result(seconds) == (size, truth)
    wait_for(lambda: service.job(job_id).HasField("end"), seconds)
    after = [Follower(service, job_id) for _ in range(count - len(before) - len(during))]
    for follower in after:
        assert follower.result(seconds) == (size, truth)
    assert stalled.size < size
    stalled.may_read.set()
    assert stalled.result(seconds) == (size, truth)


@pytest.mark.parametrize("count", [1, 8])
def test_followers_that_join_at_any_time_see_the_same_bytes(service: Service, count: int) -> None:
    """64 MiB: before, during, after, and one stalled for a while: every hash is the generator's own."""
    size = 64 * MIB
    follow_at_any_time(service, size, count, sha256_of(size), 60)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(8, marks=pytest.mark.slow),
        pytest.param(50, marks=pytest.mark.long),
    ],
)
def test_a_gigabyte_is_exact_for_one_eight_and_fifty(
    make_service: Callable[..., Service], count: int
) -> None:
    """1 GB of random bytes for that many followers, one of them stalled: every SHA-256 is equal."""
    service = make_service(clients=["alice"]).start()
    size = 10**9
    follow_at_any_time(service, size, count, sha256_of(size), 600)


def test_pjw_followers_are_exact_and_a_stopped_one_harms_nobody(service: Service) -> None:
    """Real pjw processes, one of them SIGSTOPped while the job writes and ends."""
    size = 32 * MIB
    job_id = service.start_job(f"sleep 0.5; {GENERATE} {size}; sleep 0.3")
    hashing = f"{Path(service.command()[0]).parent}/pjw logs {job_id} | sha256sum"
    followers = [
        subprocess.Popen(["sh", "-c", hashing], env=service.environment(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    with service.popen("logs", str(job_id)) as stopped:
        assert stopped.stdout is not None
        first = os.read(stopped.stdout.fileno(), 100)
        stopped.send_signal(signal.SIGSTOP)
        truth = sha256_of(size)
        for follower in followers:
            assert follower.communicate(timeout=60)[0].decode().split()[0] == truth
        wait_for(lambda: service.job(job_id).HasField("end"))
        stopped.send_signal(signal.SIGCONT)
        digest = hashlib.sha256(first)
        while data := stopped.stdout.read(MIB):
            digest.update(data)
        assert (digest.hexdigest(), stopped.wait(10)) == (truth, 0)


@pytest.mark.slow
def test_a_follower_stopped_for_longer_than_the_keepalive_resumes_exactly(service: Service) -> None:
    """A SIGSTOPped pjw is dropped by the server after 30 s, and goes on at the exact byte when it wakes."""
    size = 64 * MIB
    job_id = service.start_job(f"{GENERATE} {size}; sleep 45")
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None
        digest = hashlib.sha256(os.read(logs.stdout.fileno(), 100))
        assert service.open_outputs(job_id) == 1
        logs.send_signal(signal.SIGSTOP)
        wait_for(lambda: service.open_outputs(job_id) == 0, 60)
        logs.send_signal(signal.SIGCONT)
        while data := logs.stdout.read(MIB):
            digest.update(data)
        assert (digest.hexdigest(), logs.wait(60)) == (sha256_of(size), 0)


def test_every_byte_value_reaches_stdout_untouched(service: Service) -> None:
    """NUL, CR LF, escape sequences, invalid UTF-8: `pjw logs` changes none of them."""
    octal = "".join(f"\\{value:03o}" for value in range(256))
    job_id = service.start_job(f"printf '{octal}'; printf '\\r\\n\\377\\376\\n\\n'")
    assert service.pjw("logs", str(job_id)).stdout == bytes(range(256)) + b"\r\n\xff\xfe\n\n"


def test_follow_of_a_job_without_output_ends_with_the_job(service: Service) -> None:
    """Nothing is sent, and the stream ends when the job does; not before, not later."""
    # longer than the intervals at which others have been seen to send empty messages (up to 1 s)
    began = time.monotonic()
    job_id = service.start_job("sleep 1.3")
    with service.channel() as channel:
        messages, code, *_ = ask(channel, "Logs", pb.LogsRequest(id=job_id).SerializeToString())
    assert (messages, code) == ([], grpc.StatusCode.OK)
    assert 1.3 < time.monotonic() - began < 30
    assert service.job(job_id).HasField("end")
    assert service.pjw("logs", str(job_id)).stdout == b""


def test_a_stream_goes_on_at_any_offset(service: Service, big: tuple[int, int, str]) -> None:
    """From each offset the rest and nothing else; at the very end an empty stream."""
    job_id, size, _ = big
    with service.stub() as stub:
        whole = b"".join(r.data for r in stub.Logs(pb.LogsRequest(id=job_id)))
        for offset in (0, 1, 65_535, 65_536, size // 2, size - 1, size):
            rest = b"".join(r.data for r in stub.Logs(pb.LogsRequest(id=job_id, offset=offset)))
            assert rest == whole[offset:]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Logs(pb.LogsRequest(id=job_id, offset=size + 1)))
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE


def test_an_offset_ahead_of_a_running_job_is_out_of_range(service: Service) -> None:
    """A reader that claims more than there is has mistaken the job, and is told so at once."""
    with silent_job(service) as job_id:
        request = pb.LogsRequest(id=job_id, offset=1).SerializeToString()
        assert service.answer("Logs", request)[1] is grpc.StatusCode.OUT_OF_RANGE


def test_messages_are_of_a_size_that_streams_well(service: Service, big: tuple[int, int, str]) -> None:
    """64 KiB at first, up to 256 KiB for readers that keep up; never the 4 KiB that make 500,000 messages."""
    # into the page cache, of which a busy machine may have taken some: what is left is sent at once
    (service.state / "jobs" / str(big[0]) / "output").read_bytes()
    with service.stub() as stub:
        sizes = [len(r.data) for r in stub.Logs(pb.LogsRequest(id=big[0]))]
    assert sum(sizes) == big[1]
    assert (sizes[0], max(sizes) <= 256 * 1024, min(sizes[:-1]) >= 64 * 1024) == (64 * 1024, True, True)


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_a_follower_that_vanishes_leaves_no_descriptor(service: Service, how: str) -> None:
    """Of readers of a silent job that were killed or cancelled nothing stays open in the server."""
    with silent_job(service) as job_id:
        idle = service.descriptors()
        if how == "killed":
            readers = [service.popen("logs", str(job_id)) for _ in range(4)]
            wait_for(lambda: service.open_outputs(job_id) == len(readers))
            for reader in readers:
                reader.kill()
                reader.communicate()
        else:
            with service.stub() as stub:
                calls = [stub.Logs(pb.LogsRequest(id=job_id)) for _ in range(20)]
                wait_for(lambda: service.open_outputs(job_id) == len(calls))
                for call in calls:
                    call.cancel()
                wait_for(lambda: service.open_outputs(job_id) == 0)
        wait_for(lambda: (service.open_outputs(job_id), service.descriptors() <= idle) == (0, True))


def test_memory_does_not_grow_with_output(service: Service, big: tuple[int, int, str]) -> None:
    """Half a gigabyte sent to readers, one of them stalled, leaves the server as small as it was."""

    def resident() -> int:
        return int(Path(f"/proc/{service.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    job_id, size, truth = big
    before = resident()
    stalled = Follower(service, job_id)
    stalled.may_read.clear()
    readers = [Follower(service, job_id) for _ in range(8)]
    peak = before
    while any(reader.size < size for reader in readers):
        peak = max(peak, resident())
        time.sleep(0.05)
    for reader in readers:
        assert reader.result() == (size, truth)
    stalled.may_read.set()
    assert stalled.result() == (size, truth)
    assert peak - before < 64 * MIB, f"{(peak - before) / MIB:.0f} MiB more"


def test_output_is_not_kept_in_memory(make_service: Callable[..., Service]) -> None:
    """A quarter of a gigabyte goes from a job to the disk and to readers, and never stays in the server."""
    # a new one: its peak is that of this job
    service = make_service(clients=["alice"]).start()

    def peak() -> int:
        status = Path(f"/proc/{service.pid}/status").read_text().splitlines()
        [line] = [line for line in status if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024

    before = peak()
    size = 256 * MIB
    job_id = service.start_job(f"head -c {size} /dev/zero")
    for _ in range(2):
        with service.stub() as stub:
            assert sum(len(response.data) for response in stub.Logs(pb.LogsRequest(id=job_id))) == size
    assert peak() - before < 64 * MIB


def test_a_reader_that_is_let_go_of_sees_no_clean_end(tmp_path: Path) -> None:
    """Who reads nothing for too long is cut off with an error, never with an end that looks whole."""
    service = Service(tmp_path, clients=["alice"])
    service.change = pjwd_with.drop_stalled_readers
    service.start()
    try:
        size = 64 * MIB
        job_id = service.start_job(f"head -c {size} /dev/zero")
        with service.stub() as stub:
            call = stub.Logs(pb.LogsRequest(id=job_id))
            got = len(next(call).data)
            wait_for(lambda: b"which has read nothing" in service.log.read_bytes())
            with pytest.raises(grpc.RpcError) as caught:
                got += sum(len(response.data) for response in call)
            # what makes pjw come back for the rest
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert 0 < got < size
        assert len(service.pjw("logs", str(job_id)).stdout) == size
    finally:
        assert service.stop() == 0


def test_hundreds_of_calls_are_answered_while_followers_hang(service: Service) -> None:
    """8 clients make 300 List and Get calls while 50 followers wait for jobs that say nothing."""
    with silent_job(service) as first, silent_job(service) as second, service.stub() as hanging:
        followers = [
            hanging.Logs(pb.LogsRequest(id=job_id))
            for job_id in (first, second)
            for _ in range(MANY_FOLLOWERS // 2)
        ]
        for follower in followers:
            follower.initial_metadata()

        def calls(count: int) -> float:
            slowest = 0.0
            with service.stub() as stub:
                for number in range(count):
                    began = time.monotonic()
                    if number % 2:
                        stub.List(pb.ListRequest(page_size=20), timeout=CALL_SECONDS)
                    else:
                        stub.Get(pb.GetRequest(id=first), timeout=CALL_SECONDS)
                    slowest = max(slowest, time.monotonic() - began)
            return slowest

        with ThreadPoolExecutor(8) as clients:
            assert max(clients.map(calls, [38] * 8)) < 5
        assert all(follower.is_active() for follower in followers)
        for follower in followers:
            follower.cancel()


def test_a_stop_with_a_long_grace_period_blocks_nobody(service: Service) -> None:
    """While one stop waits for a stubborn job, others are started, stopped and shown at once."""
    job_id = service.start_job("trap '' TERM; echo ready; while :; do sleep 1; done")
    with service.stub() as stub, service.stub() as other:
        logs = stub.Logs(pb.LogsRequest(id=job_id))
        assert next(logs).data == b"ready\n"
        request = pb.StopRequest(id=job_id)
        request.grace.seconds = 60
        stop = stub.Stop.future(request)
        wait_for(lambda: service.job(job_id).state == pb.JOB_STATE_STOPPING)
        began = time.monotonic()
        for client in ("alice", "bob"):
            with service.stub(client) as quick:
                another = quick.Start(pb.StartRequest(command="sleep 300")).job.id
                assert quick.Stop(pb.StopRequest(id=another)).job.signal == signal.SIGTERM
        # a second, impatient stop of the same job does not wait for the first
        request.grace.seconds = 0
        impatient = other.Stop(request).job
        assert time.monotonic() - began < 20
        assert (impatient.signal, stop.result(20).job.signal) == (signal.SIGKILL, signal.SIGKILL)
        assert b"".join(r.data for r in logs) in (b"", b"Killed\n")
