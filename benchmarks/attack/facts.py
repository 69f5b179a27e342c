"""Facts that must hold while an attack goes on, apart from the victim's times."""

import fcntl
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration

from benchmarks.attack.stage import BUSY, PYTHON, VICTIM, Stage
from benchmarks.attack.verdict import Fact
from benchmarks.attack.victim import run_as_root, why
from benchmarks.processes import children
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import wait_for

NAMES: Final = 2000
COLD_PROGRAMS: Final = 32
# How long a job may outlive an end that the kernel can bring about.
END_SECONDS: Final = 10.0
TIME_SECONDS: Final = 1
# its data reaches the disk at the end, and waits there for its turn
UNSTOPPABLE: Final = "exec dd if=/dev/zero of=f bs=64k count=1000 conv=fsync"
UNSTOPPABLE_JOBS: Final = 6
SHARE_SECONDS: Final = 2.0
# as a part of an equal share
SHARE_LEAST: Final = 0.6
# of a processor, in addition to their work for the rest of the machine
KERNEL_SHARE: Final = 0.5
SMALL_MEMORY: Final = 64 * 1024**2


def connects(stage: Stage) -> list[Fact]:
    """The server admits and answers a new client."""
    began = time.monotonic()
    try:
        with stage.service.stub(VICTIM) as stub:
            stub.List(pb.ListRequest(page_size=1), timeout=stage.victim.deadline)
    except grpc.RpcError as error:
        found, held = why(error), False
    else:
        found, held = "yes", True
    return [Fact("a new connection is answered", f"{found} ({time.monotonic() - began:.2f} s)", held)]


def ends_in_time(stage: Stage) -> list[Fact]:
    """Jobs that wait for an almost blocked disk end when their time is over."""
    limits = pb.Limits()
    limits.CopyFrom(stage.lowest_io)
    limits.time_max_seconds = TIME_SECONDS
    began = time.monotonic()
    ids = [stage.job(UNSTOPPABLE, limits) for _ in range(UNSTOPPABLE_JOBS)]
    left = set(ids)

    def over() -> bool:
        for job_id in list(left):
            job = stage.stub.Get(pb.GetRequest(id=job_id), timeout=stage.victim.deadline).job
            if job.HasField("end"):
                left.remove(job_id)
        return not left

    try:
        wait_for(over, TIME_SECONDS + END_SECONDS)
        found = f"yes, {time.monotonic() - began:.1f} s after their start"
    except (AssertionError, grpc.RpcError):
        found = f"{len(left)} of {len(ids)} run {time.monotonic() - began:.0f} s after their start"
    return [Fact(f"jobs end at their time limit of {TIME_SECONDS} s", found, not left)]


def syncs_in_time(stage: Stage) -> list[Fact]:
    """Root's write to the same file system reaches the disk."""
    path = stage.service.state.parent / "synced"
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=1", "conv=fsync", "status=none"]
    return [_by_root("root's sync of another file ends", command, stage.victim.deadline)]


@contextmanager
def slow_lists(stage: Stage) -> Iterator[None]:
    """A job reads a cold directory."""
    directory = _directory_of_names(stage)
    _forget_directories(directory)
    with stage.jobs(["sh", "-c", f"while :; do ls -U {directory} >/dev/null; done"], limits=stage.lowest_io):
        yield


def lists_in_time(stage: Stage) -> list[Fact]:
    """Root lists the same directory."""
    command = ["ls", "-l", str(_directory_of_names(stage))]
    return [_by_root("root's ls -l of it ends", command, stage.victim.deadline)]


def _by_root(what: str, command: list[str], deadline: float) -> Fact:
    began = time.monotonic()
    try:
        run_as_root(command, deadline)
        held = True
    except TimeoutError:
        held = False
    return Fact(what, f"{time.monotonic() - began:.2f} s", held)


def _directory_of_names(stage: Stage) -> Path:
    directory = stage.cold.directory.parent / "names"
    if not directory.exists():
        directory.mkdir()
        for number in range(NAMES):
            (directory / f"{number:0200}").touch()
        subprocess.run(["sync", "-f", directory], check=True)
    return directory


def _forget_directories(path: Path) -> None:
    """Drop what the kernel has in memory of the disk's directories."""
    device = path.stat().st_dev
    # without the right to open the disk (a container) the cache stays warm, and the row shows less
    with suppress(FileNotFoundError, PermissionError):
        uevent = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent").read_text()
        name = dict(line.split("=") for line in uevent.splitlines())["DEVNAME"]
        disk = os.open(f"/dev/{name}", os.O_RDONLY)
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(disk)


def cold_programs(stage: Stage) -> Path:
    """Return programs of the host that no process runs."""
    directory = stage.cold.directory.parent / "programs"
    if not directory.exists():
        directory.mkdir()
        true = Path(shutil.which("true") or "/bin/true")
        for number in range(COLD_PROGRAMS):
            shutil.copy(true, directory / f"program-{number}")
        subprocess.run(["sync", "-f", directory], check=True)
    return directory


# --- shares


def share_of_cpu(stage: Stage) -> list[Fact]:
    """A job of the victim computes as much as all of the attacker's together, or up to its limit."""
    with stage.service.stub(VICTIM) as stub:
        request = pb.StartRequest(command=BUSY)
        job_id = stub.Start(request, timeout=stage.victim.deadline).job.id
        began, before = time.monotonic(), _cpu_seconds(stub, stage)
        mine, others, seconds = 0.0, 0.0, 0.0
        # processor time, not time by the clock: on a busy machine both may get little of it
        while mine + others < SHARE_SECONDS and seconds < stage.victim.deadline:
            time.sleep(SHARE_SECONDS / 10)
            mine, others = (now - then for now, then in zip(_cpu_seconds(stub, stage), before, strict=True))
            seconds = time.monotonic() - began
        stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=stage.victim.deadline)
    found = f"{mine / seconds:.2f} of a processor, the attacker's {others / seconds:.2f}"
    return [Fact("a job of the victim has", found, mine >= SHARE_LEAST * min(others, seconds))]


def _cpu_seconds(stub: JobWorkerServiceStub, stage: Stage) -> tuple[float, float]:
    """Return the use of the victim's and of the attacker's running jobs."""
    quotas = [
        each.GetQuota(pb.GetQuotaRequest(), timeout=stage.victim.deadline) for each in (stub, stage.stub)
    ]
    mine, others = (quota.use.cpu_usage_usec / 1e6 for quota in quotas)
    return mine, others


def keeps_its_memory(stage: Stage) -> list[Fact]:
    """A small job of the victim survives the attacker's use of memory."""
    fills = f'x = bytearray(b"x" * {SMALL_MEMORY}); import time; time.sleep({SHARE_SECONDS})'
    return [_victims_job(stage, f"a job of the victim with {SMALL_MEMORY >> 20} MiB", [*PYTHON, fills])]


def forks(stage: Stage) -> list[Fact]:
    """A job of the victim can start processes."""
    command = "n=0; while [ $n -lt 100 ]; do /bin/true || exit 1; n=$((n+1)); done"
    return [_victims_job(stage, "a job of the victim with 100 processes", ["sh", "-c", command])]


def writes(stage: Stage) -> list[Fact]:
    """A job of the victim has output, and pjwd keeps it."""
    return [
        _victims_job(stage, "a job of the victim that writes 1 MiB", ["head", "-c", "1048576", "/dev/zero"])
    ]


def _victims_job(stage: Stage, what: str, argv: list[str]) -> Fact:
    try:
        with stage.service.stub(VICTIM) as stub:
            request = pb.StartRequest(argv=pb.Argv(arguments=argv))
            job = stub.Start(request, timeout=stage.victim.deadline).job
            wait = pb.WaitRequest(id=job.id)
            job = stub.Wait(wait, timeout=stage.victim.deadline).job
    except grpc.RpcError as error:
        return Fact(what, why(error), held=False)
    reason = pb.EndReason.Name(job.reason).removeprefix("END_REASON_").lower()
    return Fact(what, f"{reason}, code {job.exit_code}", (job.exit_code, reason) == (0, "completed"))


# --- the host, out of sight


def kernel_threads(stage: Stage) -> list[Fact]:
    """The kernel's own threads, which no limit of a job counts, take little time for it."""
    before, began = _kernel_threads_seconds(), time.monotonic()
    time.sleep(SHARE_SECONDS)
    share = (_kernel_threads_seconds() - before) / (time.monotonic() - began)
    return [Fact("threads of the kernel use", f"{share:.2f} of a processor", share < KERNEL_SHARE)]


def _kernel_threads_seconds() -> float:
    # kthreadd is 2, and the parent of all of them
    ticks = 0
    for pid in children(2):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


_TAKE_TERMINALS: Final = """
import os, time
taken = []
try:
    while True:
        taken.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
except OSError:
    pass
print("ready", len(taken), flush=True)
time.sleep(1000)
"""
_WATCH: Final = """
import ctypes, os, select, sys
libc = ctypes.CDLL(None)
queue = libc.inotify_init1(0)
libc.inotify_add_watch(queue, sys.argv[1].encode(), 0x21)
print("ready", flush=True)
heard = select.select([queue], [], [], 5)[0]
print("heard" if heard else "nothing", flush=True)
"""
_LOCK: Final = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(1000)
"""
_CONNECT: Final = """
import socket, sys
try:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(sys.argv[1])
    print("ready reached")
except OSError as error:
    print("ready", error.strerror)
"""
_UEVENTS: Final = """
import socket
try:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15) as listener:
        listener.bind((0, 1))
    print("ready listens")
except OSError as error:
    print("ready", error.strerror)
"""


def terminals_left(stage: Stage) -> list[Fact]:
    """While one job holds all terminals that it can get, another job gets one, and so does the host."""
    with stage.jobs([*PYTHON, _TAKE_TERMINALS]) as [job_id]:
        taken = stage.output(job_id, b"ready").decode().split()[-1:]
        try:
            for descriptor in os.openpty():
                os.close(descriptor)
            host = Fact("the host has one more", "yes", held=True)
        except OSError as error:
            host = Fact("the host has one more", str(error), held=False)
        other = _victims_job(stage, "a job of the victim opens one", ["sh", "-c", ": <>/dev/ptmx"])
    return [Fact("one job has taken", " ".join(taken), bool(taken)), host, other]


def hears_nothing(stage: Stage) -> list[Fact]:
    """A job learns nothing of the files that root opens."""
    path = stage.cold.paths[0]
    with stage.jobs([*PYTHON, _WATCH, str(path)]) as [job_id]:
        stage.output(job_id, b"ready")
        path.read_bytes()
        said = stage.output(job_id, b"h")
    heard = b"heard" in said
    return [Fact("the job hears of root's reading", "yes" if heard else "no", bool(said) and not heard)]


def locks_nothing(stage: Stage) -> list[Fact]:
    """Root can lock a file that a job has locked."""
    path = stage.cold.paths[0]
    with stage.jobs([*PYTHON, _LOCK, str(path)]) as [job_id], path.open() as file:
        said = stage.output(job_id, b"ready")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            blocked = False
        except BlockingIOError:
            blocked = True
    return [Fact("root's lock is held up", "yes" if blocked else "no", bool(said) and not blocked)]


def reaches_nobody(stage: Stage) -> list[Fact]:
    """A socket on which a process of the host listens, and which everybody may write to."""
    path = stage.cold.directory.parent / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        with stage.jobs([*PYTHON, _CONNECT, str(path)]) as [job_id]:
            said = stage.output(job_id, b"ready").decode().strip()
    path.unlink()
    return [Fact("the job connects", said.removeprefix("ready "), bool(said) and said != "ready reached")]


# an address without a listener
PROXIED: Final = "127.1.77.7"
_ASK: Final = f"""
import socket, time
began = time.monotonic()
with socket.create_connection(("127.0.0.1", 3128), 20) as connection:
    connection.sendall(b"CONNECT {PROXIED}:443 HTTP/1.0\\r\\n\\r\\n")
    said = connection.recv(12).decode()
print("ready", said.split()[1], round(time.monotonic() - began, 3), flush=True)
"""
PROXY_SECONDS: Final = 5.0


def proxy_answers(stage: Stage) -> list[Fact]:
    """Another job gets answers meanwhile."""
    with stage.jobs([*PYTHON, _ASK], allow=[PROXIED]) as [job_id]:
        said = stage.output(job_id, b"ready").decode().split()
    held = len(said) == 3 and said[1] == "502" and float(said[2]) < PROXY_SECONDS
    return [Fact("another job asks its proxy", " ".join(said[1:]) or "is not answered", held)]


def no_uevents(stage: Stage) -> list[Fact]:
    """The socket of the kernel's events cannot be had."""
    with stage.jobs([*PYTHON, _UEVENTS]) as [job_id]:
        said = stage.output(job_id, b"ready").decode().strip()
    return [Fact("the job listens", said.removeprefix("ready "), bool(said) and said != "ready listens")]
