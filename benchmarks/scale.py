"""Measure the costs of a running job among many: memory, the next start, the processor while they sleep.

Its effects stay until the next boot, so this suite is the last: the kernel gives each new memory cgroup
room, 16 bytes, for each of the file systems that were ever mounted at once (the limit of its shrinkers never
falls), and jobs mount several each.
"""

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from benchmarks import pjwd
from benchmarks.processes import Memory, children, cpu_seconds, name_of, with_descendants
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from pjw.worker.settings import WAITING_INITS as POOL
from tests.support.service import Service, wait_for, waiting_ids

LEVELS: Final = (10, 100, 1000, 5000)
QUICK_LEVELS: Final = (10, 100, 300)
BWRAP_COUNT: Final = 100
REST_SECONDS: Final = 0.2
STARTS: Final = 30
WARM_UP: Final = 32
CONCURRENT: Final = 16
CALL_SECONDS: Final = 300
IDLE_SECONDS: Final = 3.0
QUICK_IDLE_SECONDS: Final = 1.0
SLEEP: Final = ("sleep", "100000")
BWRAP: Final = (
    *"bwrap --unshare-all --die-with-parent --ro-bind / / --proc /proc --dev /dev".split(),  # noqa: SIM905
    *SLEEP,
)
# An init and a command of each job, and the machine's other processes.
PROCESSES_PER_JOB: Final = 2
SPARE_PROCESSES: Final = 2000
# pjwd holds a pidfd of each job, and raises its soft limit to the hard one by itself.
SPARE_DESCRIPTORS: Final = 200

Found = TypeVar("Found")

# The most jobs in a row, for a machine that has no room for the last rows; 0: no bound.
jobs_max = 0

MEMORY_BOUND_KIB: Final = 250.0
START_GOAL: Final = 1.5
ATTEMPTS: Final = 10
IDLE_GOAL: Final = 0.01


def run(*, quick: bool) -> list[Figure]:
    """Run jobs that sleep: more at each level, and at the end none."""
    levels = [level for level in _levels(quick=quick) if fits(level)]
    bwrap = _bwrap_memory()
    with (
        pjwd.running() as service,
        service.stub() as stub,
        pjwd.running() as small,
        small.stub() as small_stub,
    ):
        start_many(small_stub, levels[0])
        idle_seconds = QUICK_IDLE_SECONDS if quick else IDLE_SECONDS
        return _climb(service, stub, small_stub, levels, idle_seconds, bwrap)


def _levels(*, quick: bool) -> tuple[int, ...]:
    levels = QUICK_LEVELS if quick else LEVELS
    return (*(level for level in levels if level < jobs_max), jobs_max) if jobs_max else levels


def fits(level: int) -> bool:
    """Whether the machine can have this number of jobs; prints the reason if it cannot."""
    for name, limit, need in (
        (
            "kernel.pid_max",
            int(Path("/proc/sys/kernel/pid_max").read_text()),
            PROCESSES_PER_JOB * level + SPARE_PROCESSES,
        ),
        (
            "the hard limit of open files",
            resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            level + SPARE_DESCRIPTORS,
        ),
    ):
        if limit < need:
            print(f"scale: no level of {level} jobs: {name} is {limit}", file=sys.stderr)
            return False
    return True


def _climb(
    service: Service,
    stub: JobWorkerServiceStub,
    small: JobWorkerServiceStub,
    levels: Sequence[int],
    idle_seconds: float,
    bwrap: Memory | None,
) -> list[Figure]:
    # once as below: memory that a server keeps of its first calls belongs to no job
    stop_many(stub, start_many(stub, WARM_UP))
    start_times(stub, small)
    rest, before = undisturbed(lambda: _rest(service))
    figures: list[Figure] = []
    jobs: list[int] = []
    starts: dict[int, tuple[list[float], ...]] = {}
    for level in levels:
        jobs += start_many(stub, level - len(jobs))
        memory, busy = undisturbed(lambda: _look(service, rest, level, idle_seconds))  # noqa: B023
        each = memory.each(before, level)
        figures += _memory_figures(level, each, bwrap if level == BWRAP_COUNT else None)
        figures.append(
            Figure(
                "scale",
                f"CPU while {level} jobs sleep",
                busy * 100,
                "%",
                "a core",
                100.0,
                IDLE_GOAL,
                held=Held.NEVER,
            )
        )
        starts[level] = start_times(stub, small)
    # Once more with the few jobs of the first level, so that the machine's other work is in both.
    first = levels[0]
    stop_many(stub, jobs[first:])
    for times, more in zip(starts[first], start_times(stub, small), strict=True):
        times.extend(more)
    stop_many(stub, jobs[:first])
    _require_nothing_left(service, stub, rest, len(jobs))
    few = median(starts[first][0]) * 1e3
    for level, (own, in_turns) in starts.items():
        name, value = f"start beside {level} jobs", median(own) * 1e3
        goal = START_GOAL if level != first else None
        figures.append(Figure("scale", name, value, "ms", f"beside {first}", few, goal))
        # this one includes the slowness of the whole machine, too
        figures.append(Figure("scale", name, value, "ms", f"a pjwd of {first}", median(in_turns) * 1e3))
    return figures


def _memory_figures(level: int, each: Memory, bwrap: Memory | None) -> list[Figure]:
    name = f"memory of each of {level} jobs"
    figures = [Figure("scale", name, each.processes, "KiB", "the bound", MEMORY_BOUND_KIB, 1.0)]
    if bwrap is not None:
        figures.append(
            Figure("scale", name, each.processes, "KiB", "bwrap", bwrap.processes, held=Held.IF_THERE)
        )
    # of the whole machine with its other work, so a ratio would be noise
    for whose, memory in (("jobs", each), ("bwraps", bwrap)):
        if memory is not None:
            name = f"memory of each of {level} {whose}"
            figures.append(Figure("scale", f"kernel's {name}", memory.kernel, "KiB"))
            figures.append(Figure("scale", f"available {name}", memory.available, "KiB"))
    return figures


def _rest(service: Service) -> tuple[int, Memory]:
    """Return the number of processes of a pjwd without a job, and their memory."""
    pids = at_rest(service)
    return len(pids), Memory.now(pids)


def _look(service: Service, rest: int, jobs: int, idle_seconds: float) -> tuple[Memory, float]:
    """Return the memory of all processes, and their part of a processor while no client calls."""
    pids = beside_jobs(service, rest, jobs)
    return Memory.now(pids), _idle_share(pids, idle_seconds)


def undisturbed(look: Callable[[], Found]) -> Found:
    """Look again when a process has gone: a mount of the host has the launcher replace waiting inits."""
    for _ in range(ATTEMPTS - 1):
        with suppress(FileNotFoundError, ProcessLookupError):
            return look()
    return look()


def at_rest(service: Service) -> list[int]:
    """Return all processes of a pjwd without a job: its own, and the inits that wait for the next jobs."""
    # always the same number, so that they are in no difference
    wait_for(lambda: len(waiting_ids(service.state)) == POOL)
    found = with_descendants([service.pid])
    while True:
        # a scratch directory is made before its init
        time.sleep(REST_SECONDS)
        before, found = found, with_descendants([service.pid])
        if before == found:
            return found


def beside_jobs(service: Service, rest: int, jobs: int) -> list[int]:
    """Return all processes of a pjwd: those *at rest*, and an init and a command of each job."""
    wait_for(lambda: len(waiting_ids(service.state)) == POOL)
    expected = rest + PROCESSES_PER_JOB * jobs
    wait_for(lambda: len(with_descendants([service.pid])) == expected)
    return with_descendants([service.pid])


def _start(stub: JobWorkerServiceStub) -> int:
    request = pb.StartRequest(argv=pb.Argv(arguments=SLEEP))
    return stub.Start(request, timeout=CALL_SECONDS).job.id


def start_many(stub: JobWorkerServiceStub, count: int) -> list[int]:
    """Start *count* jobs that sleep; return their ids."""
    with ThreadPoolExecutor(CONCURRENT) as threads:
        return list(threads.map(lambda _: _start(stub), range(count)))


def start_times(*stubs: JobWorkerServiceStub) -> tuple[list[float], ...]:
    """Return the seconds of starts at each server, in turns; the jobs are gone again."""
    jobs: tuple[list[int], ...] = tuple([] for _ in stubs)
    seconds: tuple[list[float], ...] = tuple([] for _ in stubs)
    for _ in range(STARTS):
        for stub, ids, times in zip(stubs, jobs, seconds, strict=True):
            began = time.perf_counter()
            ids.append(_start(stub))
            times.append(time.perf_counter() - began)
    for stub, ids in zip(stubs, jobs, strict=True):
        stop_many(stub, ids)
    return seconds


def stop_many(stub: JobWorkerServiceStub, jobs: Sequence[int]) -> None:
    """Kill these jobs."""

    def stop(job_id: int) -> None:
        job = pjwd.stop(stub, job_id)
        assert job.reason == pb.END_REASON_STOPPED, job

    with ThreadPoolExecutor(CONCURRENT) as threads:
        for _ in threads.map(stop, jobs):
            pass


def _idle_share(pids: Sequence[int], seconds: float) -> float:
    """Return the processor time of a second without calls."""
    time.sleep(0.5)  # work that the last call has left
    used, began = cpu_seconds(*pids), time.perf_counter()
    time.sleep(seconds)
    ended = time.perf_counter()
    return (cpu_seconds(*pids) - used) / (ended - began)


def _require_nothing_left(service: Service, stub: JobWorkerServiceStub, rest: int, at_least: int) -> None:
    beside_jobs(service, rest, 0)
    assert service.job_cgroups() == []
    assert service.scratch() == []
    states = [job.state for job in pjwd.jobs(stub)]
    assert set(states) == {pb.JOB_STATE_EXITED}, states
    assert len(states) >= at_least, f"{len(states)} jobs are listed, and {at_least} were started"


def _bwrap_memory() -> Memory | None:
    """Return the memory of each of many bwraps, as for jobs; None without bwrap."""
    if shutil.which("bwrap") is None:
        print("scale: no bwrap here", file=sys.stderr)
        return None
    with _bwraps(1):
        before = Memory.now([])
    with _bwraps(BWRAP_COUNT) as pids:
        return Memory.now(pids).each(before, BWRAP_COUNT)


@contextmanager
def _bwraps(count: int) -> Iterator[list[int]]:
    """Run *count* bwraps; give all their processes."""
    with ExitStack() as stack:
        roots = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(BWRAP, stdin=subprocess.DEVNULL))
            # before the wait of Popen.__exit__; the processes inside die with their parent
            stack.callback(process.kill)
            roots.append(process.pid)
        wait_for(lambda: all(_sleeps(pid) for pid in roots))
        yield with_descendants(roots)


def _sleeps(pid: int) -> bool:
    below = children(pid)
    return name_of(pid) == "sleep" if not below else any(_sleeps(child) for child in below)
