"""The attacker's programs, each a separate process.

    python -m benchmarks.attack.attackers NAME ADDRESS CERTS [ARGUMENT]...

A program prints "ready" when it is at work. It goes on, also after the server has closed its connections,
until its input ends: so none outlives the run that began it. rows.py bounds their use of scarce things of the
host, and none runs longer than LIFE_SECONDS.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration

from benchmarks.attack.facts import UNSTOPPABLE, UNSTOPPABLE_JOBS
from benchmarks.attack.stage import ATTACKER
from benchmarks.connect import OPTIONS
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support import http2

LIFE_SECONDS: Final = 600.0
CALL_SECONDS: Final = 60.0
# The attacker's own: connections without a certificate are counted by address, and the victim has another.
HOST: Final = "127.0.0.9"
SETTLE_SECONDS: Final = 0.2
READY_SECONDS: Final = 20.0
# A server that cut this client off listens again after a minute at most (server/accept.py).
LET_IN_SECONDS: Final = 75.0
MIB: Final = 1024**2
# How much a job that is made again and again may write before it ends: the disk of the machine is shared.
OUTPUT_BYTES: Final = 64 * MIB
INPUT_BYTES: Final = 64 * MIB
CHUNK: Final = bytes(256 * 1024)
# A process writes about as much a second, and a job lasts for some of them.
DEEP_LEVELS: Final = 5000


class Client:
    """The attacker's calls, over their own connection."""

    def __init__(self, address: str, certs: Path) -> None:
        ca, key, crt = (
            (certs / name).read_bytes() for name in ("ca.crt", f"{ATTACKER}.key", f"{ATTACKER}.crt")
        )
        credentials = grpc.ssl_channel_credentials(ca, key, crt)
        self.stub: Final = JobWorkerServiceStub(grpc.secure_channel(address, credentials, OPTIONS))

    def start(self, *arguments: str, limits: pb.Limits | None = None, with_input: bool = False) -> int:
        """Start a job."""
        request = pb.StartRequest(argv=pb.Argv(arguments=arguments), limits=limits, input=with_input)
        return self.stub.Start(request, timeout=CALL_SECONDS).job.id

    def start_when_let_in(self, *arguments: str) -> int:
        """Start a job, when the server permits it: it may refuse a recent attacker for a while."""
        over = time.monotonic() + LET_IN_SECONDS
        while True:
            try:
                return self.start(*arguments)
            except grpc.RpcError:
                if time.monotonic() > over:
                    raise
                time.sleep(SETTLE_SECONDS)

    def wait(self, job_id: int) -> None:
        """Wait for the end of a job."""
        self.stub.Wait(pb.WaitRequest(id=job_id), timeout=CALL_SECONDS)

    def stop(self, job_id: int) -> None:
        """Kill a job."""
        self.stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=CALL_SECONDS)

    def delete(self, job_id: int) -> None:
        """Have the server forget a job, and its output."""
        self.stub.Delete(pb.DeleteRequest(id=job_id), timeout=CALL_SECONDS)

    def life(self, *arguments: str, limits: pb.Limits | None = None) -> None:
        """Run one job from its start until nothing of it is left."""
        job_id = self.start(*arguments, limits=limits)
        self.wait(job_id)
        self.delete(job_id)


def _forever(client: Client, work: Callable[[Client], object], threads: int = 1) -> None:
    """Repeat *work* without an end, also when the server refuses it."""

    def loop() -> None:
        while True:
            try:
                work(client)
            except grpc.RpcError:
                # a refusal costs the server as much as an answer, so this is part of it
                continue

    for _ in range(threads):
        threading.Thread(target=loop, daemon=True).start()
    threading.Event().wait()


def calls(client: Client) -> None:
    """The reference for the others: a client that sends the next call as soon as it has its answer."""
    job_id = client.start_when_let_in("true")
    request = pb.GetRequest(id=job_id)
    _forever(client, lambda one: one.stub.Get(request, timeout=CALL_SECONDS))


def lists(client: Client) -> None:
    """Lists of jobs with labels that no job has, so that all rows are looked at."""
    for _ in range(50):
        with suppress(grpc.RpcError):
            client.start("true")
    request = pb.ListRequest(labels={"no": "such"}, name="none")
    _forever(client, lambda one: one.stub.List(request, timeout=CALL_SECONDS), threads=16)


def storm(client: Client, count: str) -> None:
    """Starts and stops, several at a time."""

    def once(one: Client) -> None:
        one.stop(one.start("sleep", "1000"))

    _forever(client, once, threads=int(count))


def launches(client: Client, programs: str, *numbers: str) -> None:
    """Four starts at a time of programs that are not in the page cache, with the lowest limits of disk IO."""
    paths = sorted(Path(programs).iterdir())
    rbps, riops = map(int, numbers)
    limits = pb.Limits(io_rbps_max=rbps, io_riops_max=riops)
    lock, turn = threading.Lock(), iter(range(10**9))

    def once(one: Client) -> None:
        with lock:
            path = paths[next(turn) % len(paths)]
        with path.open("rb") as program:
            os.posix_fadvise(program.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        one.life(str(path), limits=limits)

    _forever(client, once, threads=4)


def syncs(client: Client, *numbers: str) -> None:
    """Jobs that sync much data, at the lowest limits of disk IO."""
    wbps, wiops = map(int, numbers)
    limits = pb.Limits(io_wbps_max=wbps, io_wiops_max=wiops, time_max_seconds=30)
    _forever(client, lambda one: one.life("sh", "-c", UNSTOPPABLE, limits=limits), threads=2)


def unstoppable(client: Client, *numbers: str) -> None:
    """Jobs that wait in a sync, at the lowest limits of disk IO: each is stopped, and another one starts."""
    wbps, wiops = map(int, numbers)
    limits = pb.Limits(io_wbps_max=wbps, io_wiops_max=wiops, time_max_seconds=1)

    def once(one: Client) -> None:
        job_id = one.start("sh", "-c", UNSTOPPABLE, limits=limits)
        time.sleep(0.3)
        one.stop(job_id)

    _forever(client, once, threads=UNSTOPPABLE_JOBS)


def outputs(client: Client) -> None:
    """Jobs that write as fast as they can, each up to its limit of output."""
    limits = pb.Limits(output_max_bytes=OUTPUT_BYTES)
    _forever(client, lambda one: one.life("yes", limits=limits), threads=4)


def inputs(client: Client) -> None:
    """Input without an end, for jobs that read none of it, each up to a bound of ours."""

    def requests(job_id: int) -> Iterator[pb.WriteInputRequest]:
        for offset in range(0, INPUT_BYTES, len(CHUNK)):
            yield pb.WriteInputRequest(id=job_id, offset=offset, data=CHUNK)

    def once(one: Client) -> None:
        job_id = one.start("sleep", "1000", with_input=True)
        try:
            for _ in one.stub.WriteInput(requests(job_id), timeout=CALL_SECONDS):
                pass
        finally:
            one.stop(job_id)
            one.delete(job_id)

    _forever(client, once, threads=4)


def followers(client: Client, count: str) -> None:
    """Followers of an output that never ends, none of which reads."""
    job_id = client.start("yes", limits=pb.Limits(output_max_bytes=OUTPUT_BYTES))
    streams = [client.stub.Logs(pb.LogsRequest(id=job_id)) for _ in range(int(count))]
    client.wait(job_id)
    while streams:
        time.sleep(1)


def trees(client: Client) -> None:
    """Jobs that leave the deepest trees of directories that they can make in their time."""
    program = f'for (1..{DEEP_LEVELS}) {{ mkdir "d"; chdir "d" or last }}'
    _forever(client, lambda one: one.life("perl", "-e", program), threads=4)


def fill(client: Client, what: str) -> None:
    """Jobs that fill the disk below their scratch directory, by bytes or by names; endlessly."""
    program = {
        "bytes": "cat /dev/zero >f; sleep 1000",
        "inodes": "n=0; while n=$((n+1)); do true >f$n || sleep 1; done",
    }[what]
    _forever(client, lambda one: one.life("sh", "-c", program), threads=2)


def main() -> None:
    """Run one program until the input ends."""
    name, address, certs, *rest = sys.argv[1:]
    directory, seconds = Path(certs), LIFE_SECONDS
    raw: dict[str, Callable[[], object]] = {
        "reset": lambda: http2.rapid_reset(address, directory, seconds, client=ATTACKER),
        "pipelined": lambda: http2.pipelined(address, directory, 4, seconds, client=ATTACKER),
        "idle": lambda: http2.idle_connections(address, int(rest[0]), seconds, source=HOST),
        "handshakes": lambda: http2.half_handshakes(address, int(rest[0]), seconds, source=HOST),
        "pings": lambda: http2.ping_flood(address, directory, seconds, ATTACKER),
        "settings": lambda: http2.settings_flood(address, directory, seconds, ATTACKER),
    }
    programs = calls, lists, storm, launches, syncs, unstoppable, outputs, inputs, followers, trees, fill
    typed: dict[str, Callable[..., None]] = {program.__name__: program for program in programs}
    if name in raw:
        work = raw[name]
    else:
        client = Client(address, directory)
        client.stop(client.start_when_let_in("true"))
        work = functools.partial(typed[name], client, *rest)
    threading.excepthook = _fail
    threading.Thread(target=work, daemon=True).start()
    _settle()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def _fail(failed: threading.ExceptHookArgs) -> None:
    """End at once: an attack that is over measures nothing."""
    sys.__excepthook__(failed.exc_type, failed.exc_value or SystemExit(), failed.exc_traceback)
    os._exit(1)


def _settle() -> None:
    """Wait until the client opens no more connections for a while."""
    over, before = time.monotonic() + READY_SECONDS, -1
    while (now := len(os.listdir("/proc/self/fd"))) != before and time.monotonic() < over:
        before = now
        time.sleep(SETTLE_SECONDS)


if __name__ == "__main__":
    main()
