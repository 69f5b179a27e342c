"""Bounds for a start, a stop, a Get and a running job, compared with the kernel, peers and earlier commits.

    make bench SUITES=goals                                     # against COMMITS
    make bench SUITES=goals BENCH_ARGS="--against v0.1 --quick" # against that commit, with few samples
    make bench SUITES=goals BENCH_ARGS=--document               # and into docs/performance.md

Each goal is one ratio. Some are to figures of the same turn (the kernel's floor, bwrap, a call that does
nothing); the others are to the commit that is named first. All of them run in turns, in their default
configuration, with the same clients and libraries.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import against, pjwd, scale
from benchmarks.against import OURS, Found
from benchmarks.parts import NOTHING, nothing, timed
from benchmarks.peers import BWRAP
from benchmarks.processes import Memory
from benchmarks.report import Figure, markdown, median, quantity
from benchmarks.start import FLOOR, at_once, beside, one_by_one
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import CALL_SECONDS, Service

SUITE: Final = "goals"
# The reference for the costs, and the commit before the work on them.
COMMITS: Final = ("0f66bf0", "569c0ad")
CLIENTS: Final = 8
# a shell, and below it children, one of them in its own session
TREE: Final = "sleep 1000 & setsid sleep 1000 & (sleep 1000 & sleep 1000) & echo ready; wait"
FEW: Final = 10


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for one ratio."""

    name: str
    # the key of its figure
    key: str
    bound: float
    # the reference is the same figure of the first commit, and not the figure's own reference
    to_commit: bool = True
    more_is_better: bool = False


CPU: Final = f"CPU of one, {CLIENTS} clients"
START: Final = "start: until the command runs"
LIFE: Final = "start: whole life"
RATE: Final = f"start: rate, {CLIENTS} clients / {FLOOR}, 2 processes"
MEMORY: Final = "memory of a running job"
STOP: Final = "stop of a tree"
GET: Final = "Get, p50"
MANY: Final = "start beside many jobs"
GOALS: Final = (
    Goal("CPU of a life, 8 clients", f"start: {CPU} / {FLOOR}, 2 processes", 0.6),
    Goal("starts a second, 8 clients", RATE, 1.6, more_is_better=True),
    Goal("start until the command runs", f"{START} / {FLOOR}", 4.2, to_commit=False),
    Goal("whole life", f"{LIFE} / {FLOOR}", 4.5, to_commit=False),
    Goal("start until the command runs", f"{START} / {BWRAP}", 1.0, to_commit=False),
    Goal("memory of a running job, processes", f"{SUITE}: {MEMORY}, processes", 0.8),
    Goal("memory of a running job, kernel", f"{SUITE}: {MEMORY}, kernel", 0.8),
    Goal(GET, f"{SUITE}: {GET} / {NOTHING}", 1.3, to_commit=False),
    # 6 ms where the first commit takes 13
    Goal(STOP, f"{SUITE}: {STOP}", 6 / 13),
    Goal(MANY, f"{SUITE}: {MANY} / beside {FEW}", 1.3, to_commit=False),
)
# of them, if the machine can have this number
LEVELS: Final = (5000, 1000, 300)
QUICK_LEVELS: Final = (300,)


def lives(*, quick: bool) -> list[Figure]:
    """Measure all goals but the start with many jobs."""
    # on a separate pjwd: memory that it keeps of the later work belongs to no running job
    with pjwd.running() as service:
        memory = _memory(service, 100 if quick else 500)
    with ExitStack() as stack:
        service = stack.enter_context(pjwd.running())
        floors, peers = stack.enter_context(beside(service, BWRAP))
        single = one_by_one(service, floors, peers, rounds=40 if quick else 200)
        rate = at_once(service, floors, 2, 96 if quick else 512, [CLIENTS])
        wanted = {goal.key for goal in GOALS}
        figures = [
            figure for figure in single + rate if figure.key in wanted or figure.name.startswith(f"{CPU}: ")
        ]
        return [*figures, *memory, _get(service, 60 if quick else 300), _stop(service, 10 if quick else 40)]


def crowd(many: int) -> list[Figure]:
    """Measure a start with *many* jobs. It comes last: the machine is slower after it, until it boots."""
    with pjwd.running() as service, service.stub() as stub:
        jobs = scale.start_many(stub, FEW)
        [few] = scale.start_times(stub)
        jobs += scale.start_many(stub, many - FEW)
        [beside_many] = scale.start_times(stub)
        scale.stop_many(stub, jobs[FEW:])
        # once more, so that the machine's other work is in both
        few += scale.start_times(stub)[0]
        scale.stop_many(stub, jobs[:FEW])
    return [Figure(SUITE, MANY, median(beside_many) * 1e3, "ms", f"beside {FEW}", median(few) * 1e3)]


def _memory(service: Service, count: int) -> list[Figure]:
    with service.stub() as stub:
        # memory that a server keeps of its first calls belongs to no job
        scale.stop_many(stub, scale.start_many(stub, scale.WARM_UP))
        rest = scale.at_rest(service)
        before = Memory.now(rest)
        jobs = scale.start_many(stub, count)
        each = scale.undisturbed(
            lambda: Memory.now(scale.beside_jobs(service, len(rest), count)).each(before, count)
        )
        scale.stop_many(stub, jobs)
    return [
        Figure(SUITE, f"{MEMORY}, processes", each.processes, "KiB"),
        Figure(SUITE, f"{MEMORY}, kernel", each.kernel, "KiB"),
    ]


def _get(service: Service, rounds: int) -> Figure:
    job_id = service.start_job("true")
    with service.stub() as stub, nothing(service) as idle:
        found = [(timed(stub, job_id), timed(idle, job_id)) for _ in range(rounds)]
    # the first is for caches and connections
    ours, theirs = (median(times) * 1e3 for times in zip(*found[1:], strict=True))
    return Figure(SUITE, GET, ours, "ms", NOTHING, theirs)


def _stop(service: Service, rounds: int) -> Figure:
    with service.stub() as stub:
        return Figure(SUITE, STOP, median([_stop_once(stub) for _ in range(rounds)]) * 1e3, "ms")


def _stop_once(stub: JobWorkerServiceStub) -> float:
    job_id = stub.Start(pb.StartRequest(command=TREE), timeout=CALL_SECONDS).job.id
    said = stub.Logs(pb.LogsRequest(id=job_id), timeout=CALL_SECONDS)
    assert next(said).data == b"ready\n"
    began = time.perf_counter()
    job = stub.Stop(pb.StopRequest(id=job_id), timeout=CALL_SECONDS).job
    seconds = time.perf_counter() - began
    if job.reason != pb.END_REASON_STOPPED:
        raise RuntimeError(f"a job that was stopped ended so: {job}")
    said.cancel()
    return seconds


# --- against earlier commits


def compare(commits: Mapping[str, Path], *, quick: bool) -> tuple[str, int]:
    """Measure this tree and these commits in turns; return two tables, and the number of missed goals."""
    many = next(filter(scale.fits, QUICK_LEVELS if quick else LEVELS))
    found = against.measure(lambda: lives(quick=quick), commits)
    # Of this tree alone: it takes minutes, all later starts cost more, and an earlier commit
    # refused its 1,045th start for want of descriptors.
    found[OURS] |= against.measure(lambda: crowd(many), {}, turns=1)[OURS]
    text, missed = table(found, list(commits))
    return f'{text}\n\n"Many" are {many:,} jobs.\n\n{parts(found)}', missed


def table(found: Found, commits: Sequence[str]) -> tuple[str, int]:
    """Return the table of goals and the number of missed ones; some are to the first of *commits*."""
    rows = [_row(goal, found, commits) for goal in GOALS]
    head = ["what", OURS, *commits, "beside", "ratio", "goal", ""]
    return markdown([head, *rows]), sum(row[-1] != "met" for row in rows)


def _row(goal: Goal, found: Found, commits: Sequence[str]) -> list[str]:
    """Judge a goal: the value of each pjwd, with its ratio, and whether this tree's is good enough."""
    ratios = {name: _ratio(goal, found, name, commits[0]) for name in found}
    one = found[OURS].get(goal.key, [None])[0]
    if one is None or (ratio := ratios[OURS]) is None:
        return [goal.name, *[""] * (len(commits) + 3), _bound(goal), "not measured"]
    values = [_value(found[name].get(goal.key, []), ratios[name]) for name in (OURS, *commits)]
    if goal.to_commit:
        reference = commits[0]
    else:
        reference = f"{one.against}: {quantity(_middle(found[OURS][goal.key], reference=True), one.unit)}"
    met = ratio >= goal.bound if goal.more_is_better else ratio <= goal.bound
    return [goal.name, *values, reference, f"{ratio:.2f}", _bound(goal), "met" if met else "missed"]


def _ratio(goal: Goal, found: Found, name: str, base: str) -> float | None:
    figures = found[name].get(goal.key, [])
    if not goal.to_commit:
        ratios = [figure.ratio for figure in figures if figure.ratio is not None]
        return median(ratios) if ratios else None
    if not figures or not found[base].get(goal.key):
        return None
    return _middle(figures) / _middle(found[base][goal.key])


def _middle(figures: Sequence[Figure], *, reference: bool = False) -> float:
    return median([figure.reference if reference else figure.value for figure in figures])


def _value(figures: Sequence[Figure], ratio: float | None) -> str:
    if not figures:
        return ""
    text = quantity(_middle(figures), figures[0].unit)
    return text if ratio is None else f"{text} ({ratio:.2f})"


def _bound(goal: Goal) -> str:
    return f"{'≥' if goal.more_is_better else '≤'} {goal.bound:.3g}"


def parts(found: Found) -> str:
    """Return the processor time of a life by process, in a column for each pjwd."""
    start = f"start: {CPU}: "
    keys = [key for key in found[OURS] if key.startswith(start)]
    rows = [
        [key.removeprefix(start).partition(" / ")[0]]
        + [_value(figures.get(key, []), None) for figures in found.values()]
        for key in keys
    ]
    return markdown([["CPU of a life, 8 clients, of that", *found], *rows])
