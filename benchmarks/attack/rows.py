"""The table of attacks: their work, their reference, and the facts that must hold during each.

This module bounds the use of the machine by each attack: others share the machine, and a server without
bounds would pass the whole attack on to it.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.attack import facts
from benchmarks.attack.stage import BUSY, HOST_MEMORY, PYTHON, Stage
from benchmarks.attack.verdict import Fact
from benchmarks.attack.victim import COLD_FILES
from pjw.v1 import job_worker_pb2 as pb

MIB: Final = 1024**2
Attack = Callable[[Stage], AbstractContextManager[object]]
Facts = Callable[[Stage], list[Fact]]

IDLE_CONNECTIONS: Final = 5000
# fewer than these connections, so that a server that admits all of them has none left
FEW_FILES: Final = 4096
# a loop device, which the virtual machine lacks
SMALL_DISK: Final = {"disk_megabytes": 256}
# the setting of docs/configuration.md for a shared machine; without it one client may take all
SHARED_MEMORY: Final = {"clients": f"memory_max_bytes = {HOST_MEMORY // 2}\n"}
FULL_SECONDS: Final = 10.0
SILENT_FOLLOWERS: Final = 900
# together half as much again as the sum of the stage's configuration
MEMORY_JOBS: Final = 12
MEMORY_EACH: Final = HOST_MEMORY // 8 // MIB * MIB
BOMBS: Final = 4
# No process listens here: the proxy parses a request for this address and looks it up, but cannot connect.
NAMES: Final = {"network": f'hosts = ["{facts.PROXIED}"]\nprivate = ["127.1.0.0/16"]\n'}
PROXY_ASKERS: Final = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One attack."""

    name: str
    entry: str
    what: str
    attack: Attack
    # the busy loop of the same client that the victim's times are compared with; None: facts alone
    beside: Attack | None
    # asked while the attack goes on
    facts: Facts = lambda _: []
    # whether it attacks the kernel: those run in the virtual machine too
    kernel: bool = False
    # the only version of cgroups on which it can be judged, and why
    only: str = ""
    stage: dict[str, Any] = field(default_factory=dict)


# --- references


def busy_job(stage: Stage) -> AbstractContextManager[object]:
    """A job that computes."""
    return stage.jobs(BUSY)


def busy_calls(stage: Stage) -> AbstractContextManager[object]:
    """A client that asks without a pause."""
    return stage.program("calls")


@contextmanager
def busy_starts(stage: Stage) -> Iterator[None]:
    """A client that starts a job and stops it, one after the other."""
    with _then_nothing("storm", 1)(stage):
        yield


# --- attacks by jobs

_EVICT_AND_READ: Final = """
import os, sys
files = [os.open(name, os.O_RDONLY) for name in sys.argv[1:]]
print("ready", flush=True)
while True:
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(file, 1 << 17, 0)
"""
# advice returns at once: the reads wait in the throttle, each with its pages locked
_ADVISE: Final = """
import os, sys, time
files = [os.open(name, os.O_RDONLY) for name in sys.argv[1:]]
print("ready", flush=True)
while True:
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    for at in range(0, 1 << 20, 1 << 17):
        for file in files:
            os.posix_fadvise(file, at, 1 << 17, os.POSIX_FADV_WILLNEED)
    time.sleep(0.1)
"""
_MANY_READERS: Final = """
import os, sys
for name in sys.argv[1:]:
    if os.fork() == 0:
        file = os.open(name, os.O_RDONLY)
        while True:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(file, 1 << 17, 0)
print("ready", flush=True)
os.wait()
"""


_ASK_PROXY: Final = f"""
import os, socket
for number in range({PROXY_ASKERS}):
    if os.fork() == 0:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", 3128)) as connection:
                    if number % 2:
                        connection.sendall(b"GET http://{facts.PROXIED}/ HTTP/1.1\\r\\nX: ")
                        while True:
                            connection.sendall(b"x" * 4096)
                    connection.sendall(b"CONNECT {facts.PROXIED}:443 HTTP/1.0\\r\\n\\r\\n")
                    while connection.recv(65536):
                        pass
            except OSError:
                pass
print("ready", flush=True)
os.wait()
"""


@contextmanager
def _ask_proxy(stage: Stage) -> Iterator[None]:
    with stage.jobs([*PYTHON, _ASK_PROXY], allow=[facts.PROXIED]) as [job_id]:
        stage.output(job_id, b"ready")
        yield


def _slow_reads(program: str, count: int = COLD_FILES) -> Attack:
    """Return slow reads of *count* files, of which the victim wants one."""

    @contextmanager
    def attack(stage: Stage) -> Iterator[None]:
        stage.cold.evict()
        stage.cold.wanted = stage.cold.paths[:count]
        names = map(str, stage.cold.wanted)
        with stage.jobs([*PYTHON, program, *names], limits=stage.lowest_io) as [job_id]:
            stage.output(job_id, b"ready")
            yield
        stage.cold.wanted = stage.cold.paths

    return attack


@contextmanager
def _slow_syncs(stage: Stage) -> Iterator[None]:
    lowest = stage.lowest_io
    with _then_nothing("syncs", lowest.io_wbps_max, lowest.io_wiops_max, warm_seconds=1)(stage):
        yield


@contextmanager
def _unstoppable(stage: Stage) -> Iterator[None]:
    lowest = stage.lowest_io
    # the time limit is over then, and a stop is about to give up
    with _then_nothing("unstoppable", lowest.io_wbps_max, lowest.io_wiops_max, warm_seconds=3)(stage):
        yield


_HOLD_MEMORY: Final = f"""
held = []
for _ in range({MEMORY_EACH // MIB - 16}):
    held.append(bytearray(b"x" * {MIB}))
print("ready", flush=True)
while True:
    for piece in held:
        for at in range(0, len(piece), 4096):
            piece[at] = 1
"""


def _memory(stage: Stage) -> AbstractContextManager[object]:
    limits = pb.Limits(memory_max_bytes=MEMORY_EACH)
    return stage.jobs([*PYTHON, _HOLD_MEMORY], MEMORY_JOBS, limits)


def _bombs(stage: Stage) -> AbstractContextManager[object]:
    return stage.jobs("f() { f | f & }; while :; do f; done", BOMBS)


# without an end of the line: a terminal discards data that it has no room for, so this never stops
_WRITE_TERMINALS: Final = """
import os
pairs = []
try:
    while len(pairs) < 100:
        pairs.append(os.openpty())
except OSError:
    pass
for ours, _ in pairs:
    os.set_blocking(ours, False)
print("ready", len(pairs), flush=True)
while True:
    for ours, _ in pairs:
        try:
            os.write(ours, b"x" * 4096)
        except BlockingIOError:
            pass
"""


def _terminals(stage: Stage) -> AbstractContextManager[object]:
    return stage.jobs([*PYTHON, _WRITE_TERMINALS])


def _thrash(stage: Stage) -> AbstractContextManager[object]:
    # a file without blocks: pages are made of nothing, as fast as they can be
    return stage.jobs("truncate -s 4G f; while :; do cat f >/dev/null; done")


def _busy(count: int) -> Attack:
    return lambda stage: stage.jobs(BUSY, count)


# --- attacks over the port, by programs


def _program(name: str, *arguments: object) -> Attack:
    return lambda stage: stage.program(name, *arguments)


@contextmanager
def _cold_launches(stage: Stage) -> Iterator[None]:
    programs = facts.cold_programs(stage)
    lowest = stage.lowest_io
    with stage.program("launches", programs, lowest.io_rbps_max, lowest.io_riops_max):
        yield
    stage.end_what_runs()


def _then_nothing(name: str, *arguments: object, warm_seconds: float = 0.5) -> Attack:
    """A program that starts jobs, some time after its beginning; then its jobs are stopped."""

    @contextmanager
    def attack(stage: Stage) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(stage.end_what_runs)
            stack.enter_context(stage.program(name, *arguments))
            time.sleep(warm_seconds)
            yield

    return attack


def _filled(what: str) -> Attack:
    """Fill the disk of the state directory, as far as the server permits it."""

    def is_full(stage: Stage) -> bool:
        assert stage.disk is not None
        status = os.statvfs(stage.disk)
        return min(status.f_bavail / status.f_blocks, status.f_favail / status.f_files) < 0.01

    @contextmanager
    def attack(stage: Stage) -> Iterator[None]:
        with _then_nothing("fill", what)(stage):
            over = time.monotonic() + FULL_SECONDS
            while not is_full(stage) and time.monotonic() < over:
                time.sleep(0.05)
            yield

    return attack


@contextmanager
def _nothing(stage: Stage) -> Iterator[None]:
    yield


ROWS: Final = (
    Row("s1-file", "S1", "a job evicts a file of the host and reads it, at the lowest limit of IO",
        _slow_reads(_EVICT_AND_READ, 1), busy_job, kernel=True),
    Row("s1-many", "S1", "as many processes of a job as there are files read them at the lowest limit",
        _slow_reads(_MANY_READERS), busy_job, kernel=True),
    Row("s1-ahead", "S1", "a job has whole files read ahead (WILLNEED) at the lowest limit",
        _slow_reads(_ADVISE), busy_job, kernel=True),
    Row("s1-names", "S1", "a job lists a cold directory at the lowest limit of IO",
        facts.slow_lists, busy_job, facts.lists_in_time, kernel=True),
    Row("s2-fsync", "S2", "six jobs sync at the lowest limit of IO, are stopped, and come again",
        _unstoppable, busy_job, facts.ends_in_time, kernel=True),
    Row("s2-sync", "S2", "two jobs sync 64 MiB each at the lowest limit of IO, and come again",
        _slow_syncs, busy_job, facts.syncs_in_time, kernel=True),
    Row("s3-reset", "S3", "calls begun and reset without a pause on one connection",
        _program("reset"), busy_calls, facts.connects),
    Row("s3-pipelined", "S3", "Gets pipelined on four connections, as many as each may have",
        _program("pipelined"), busy_calls, facts.connects),
    Row("s4-idle", "S4", f"{IDLE_CONNECTIONS} connections without a word; pjwd may have {FEW_FILES} files",
        _program("idle", IDLE_CONNECTIONS), busy_calls, facts.connects, stage={"files_max": FEW_FILES}),
    Row("s4-handshakes", "S4", f"{IDLE_CONNECTIONS} connections that leave their TLS handshake half done",
        _program("handshakes", IDLE_CONNECTIONS), busy_calls, facts.connects, stage={"files_max": FEW_FILES}),
    Row("s5-six", "S5", "six jobs that compute",
        _busy(6), busy_job, facts.share_of_cpu, kernel=True),
    Row("s5-hundred", "S5", "a hundred jobs that compute",
        _busy(100), busy_job, facts.share_of_cpu),
    Row("s5-memory", "S5", f"{MEMORY_JOBS} jobs that fill {MEMORY_EACH // MIB} MiB each and go on writing it",
        _memory, busy_job, facts.keeps_its_memory, kernel=True, stage=SHARED_MEMORY),
    Row("s5-bombs", "S5", f"fork bombs in {BOMBS} jobs",
        _bombs, busy_job, facts.forks, kernel=True),
    Row("s6-bytes", "S6", "jobs fill the disk below their scratch directories",
        _filled("bytes"), busy_job, facts.writes, stage=SMALL_DISK),
    Row("s6-inodes", "S6", "jobs fill that disk with names",
        _filled("inodes"), busy_job, facts.writes, stage=SMALL_DISK),
    Row("s6-trees", "S6", "jobs leave trees of directories thousands of levels deep to remove",
        _then_nothing("trees"), busy_starts, kernel=True),
    Row("s7-writers", "S7", "a job writes to a hundred terminals",
        _terminals, busy_job, facts.kernel_threads, kernel=True),
    Row("s7-terminals", "S7", "a job takes all terminals that there are",
        _nothing, None, facts.terminals_left, kernel=True),
    Row("s8-watch", "S8", "a job watches which programs of the host are executed (inotify)",
        _nothing, None, facts.hears_nothing, kernel=True),
    Row("s8-lock", "S8", "a job locks a file of the host (flock)",
        _nothing, None, facts.locks_nothing, kernel=True),
    Row("s8-socket", "S8", "a job connects to a socket of the host",
        _nothing, None, facts.reaches_nobody, kernel=True),
    Row("s9-uevents", "S9", "a job listens to the kernel's events of devices",
        _nothing, None, facts.no_uevents, kernel=True),
    Row("s10-launches", "S10", "four starts at a time of cold programs at the lowest limit of IO",
        _cold_launches, busy_starts, kernel=True),
    Row("egress", "F11", f"{PROXY_ASKERS} processes ask their proxy, half of them without an end",
        _ask_proxy, busy_job, facts.proxy_answers, stage=NAMES),
    Row("pings", "S3", "PING frames without a pause", _program("pings"), busy_calls, facts.connects),
    Row("settings", "S3", "SETTINGS without a pause", _program("settings"), busy_calls, facts.connects),
    Row("lists", "S3", "16 lists at a time with filters that match nothing",
        _then_nothing("lists"), busy_calls),
    Row("followers", "S3", f"{SILENT_FOLLOWERS} followers of an output, none of which reads",
        _then_nothing("followers", SILENT_FOLLOWERS, warm_seconds=3), busy_calls),
    Row("storm", "S3", "starts and stops, eight at a time",
        _then_nothing("storm", 8), busy_starts),
    Row("inputs", "S6", "input as fast as it goes for four jobs that read none of it",
        _then_nothing("inputs"), busy_starts),
    Row("outputs", "S6", "four jobs write output as fast as it goes",
        _then_nothing("outputs"), busy_starts),
    Row("thrash", "S1", "a job reads a file that is larger than its memory, again and again",
        _thrash, busy_job),
)  # fmt: skip

# Rows that do not hold yet, or not with certainty, and why. The full form runs them all the same, as it does
# when they are named; CI and the virtual machine leave them out.
OPEN: Final = {
    "s1-many": "64 readers keep the disk busy: 8 to 18 x; on a disk of its own (--queue) it holds",
    "s2-fsync": "the disk is busy with the syncs: start 4 to 5 x; with --queue wbt_lat_usec=2000 2.9 x",
    "s4-handshakes": "one of three runs of CI missed it; it held in each run elsewhere",
    "s5-hundred": "p50 at most 1.4 x; the p99 of a start or a stop, two samples of 200, was 5.2 and 5.7 x",
    "s5-bombs": "p50 at most 1.0 x, p99 10 to 27 x: processes wait for a processor, kernel threads too",
    "s7-writers": "sixteen terminals keep the kernel as busy as a hundred: 1.7 processors; start was 3.2 x",
    "outputs": "four jobs keep the disk busy: stop 6 x; --queue wbt_lat_usec=2000: 1.7 x, p99 of a read 9 x",
}
