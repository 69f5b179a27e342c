"""Measure the delay of a line from a job to its follower, and through a pipe to a reader at its end.

The writer puts the time into each line, and the reader looks at the same clock (CLOCK_MONOTONIC: a job has no
separate time namespace). The writer pauses at random, so that it does not run in step with other timers.
"""

import itertools
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from benchmarks import followers, grpc_source, pjwd
from benchmarks.followers import Followers, stamps
from benchmarks.grpc_source import LINE_PAUSE_SECONDS, LINES_DELAY_SECONDS
from benchmarks.report import Figure, Held, median, percentile
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import Service

# arguments: the number of lines, the mean pause in seconds, the seconds to wait for followers first
WRITER: Final = """
import os, random, sys, time
count, pause, delay = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
time.sleep(delay)
for _ in range(count):
    time.sleep(random.uniform(0.5, 1.5) * pause)
    os.write(1, b"%d\\n" % time.monotonic_ns())
"""
# an interpreter that jobs can see; ours may be where they cannot look
PYTHON: Final = "/usr/bin/python3"
PAUSE_SECONDS: Final = 0.004
MANY: Final = 1000
# Joining takes processor time too, so that of lines is a difference: many lines less these few.
FEW_LINES: Final = 2
FANNED: Final = 900


def run(*, quick: bool) -> list[Figure]:
    """Measure all rows of the suite; the pipe and the job take turns."""
    count, rounds, count_of_many = (100, 3, 4) if quick else (400, 10, 40)
    pipe: list[int] = []
    alone: list[int] = []
    among: list[int] = []
    with pjwd.running() as service, ExitStack() as stack:
        for _ in range(rounds):
            pipe += through_pipe(count)
            alone += through_job(service, count)
        others = followers.running(service.address, service.pid, service.certs, MANY - 1)
        crowd = stack.enter_context(others)
        # of other jobs, which are silent
        silent = [service.start_job("exec sleep 1000") for _ in range(9)]
        for number, job_id in enumerate(silent):
            crowd.hold(job_id, first=number * 111, last=(number + 1) * 111)
        for _ in range(rounds):
            among += through_job(service, count)
        stack.close()
        several = followers.running(service.address, service.pid, service.certs, MANY)
        together = of_many(service, stack.enter_context(several), count_of_many)
        stack.close()
        fanned, bare = fan_out(service, 12 if quick else 40, turns=1 if quick else 3)
    return [
        *_figures("1 follower", alone, pipe, goal=1),
        *_figures(f"1 of {MANY}, the others on silent jobs", among, pipe),
        *_figures(f"all of {MANY} on the same job", together, pipe),
        Figure("line", f"to each of {FANNED}, server CPU", fanned * 1e6, "us", "grpcio", bare * 1e6),
    ]


def _figures(who: str, late: list[int], pipe: list[int], goal: float | None = None) -> list[Figure]:
    above = (median(late) - median(pipe)) / 1e6
    p99 = percentile(late, 0.99) / 1e6
    bound = "bound" if goal else "1 ms"
    # only the ratio of the medians is that of two measurements, and steady
    return [
        Figure("line", f"{who}, p50 above a pipe", above, "ms", bound, 1, goal, held=Held.NEVER),
        Figure("line", f"{who}, p50", median(late) / 1e6, "ms", "a pipe", median(pipe) / 1e6),
        Figure("line", f"{who}, p99", p99, "ms", "a pipe", percentile(pipe, 0.99) / 1e6, held=Held.NEVER),
    ]


def _command(count: int, pause: float, delay: float) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", WRITER, str(count), str(pause), str(delay)]


def through_pipe(count: int) -> list[int]:
    """Return the delay of each line of a child, in ns."""
    late: list[int] = []
    with subprocess.Popen(_command(count, PAUSE_SECONDS, 0), stdout=subprocess.PIPE, bufsize=0) as writer:
        assert writer.stdout is not None
        while data := writer.stdout.read(65536):
            received = time.monotonic_ns()
            late += [ns for _, ns in stamps(data, received)]
    return _checked(late, count, count, writer.returncode)


def through_job(service: Service, count: int) -> list[int]:
    """Return the delay of each line that a followed job wrote, in ns."""
    late: list[int] = []
    lines = 0
    with service.stub() as stub:
        call = stub.Logs(pb.LogsRequest(id=pjwd.start(service, _command(count, PAUSE_SECONDS, 0.2))))
        call.initial_metadata()
        joined = time.monotonic_ns()
        for answer in call:
            received = time.monotonic_ns()
            came = list(stamps(answer.data, received))
            lines += len(came)
            late += [ns for written, ns in came if written > joined]
    return _checked(late, lines, count, 0)


def of_many(service: Service, crowd: Followers, count: int) -> list[int]:
    """Return the delay of each line to each of many followers of one job, in ns."""
    job_id = pjwd.start(service, _command(count, LINE_PAUSE_SECONDS, LINES_DELAY_SECONDS))
    late: list[int] = []
    for one in crowd.lines(job_id)[0]:
        late += _checked(one, count, count, 0)
    return late


def fan_out(service: Service, count: int, turns: int) -> tuple[float, float]:
    """Return the processor seconds of a line to one of many followers, for pjwd and bare gRPC."""
    found: dict[str, list[float]] = {"pjwd": [], "bare": []}
    ids = itertools.count(-1, -1)
    with ExitStack() as stack:
        source, source_pid = stack.enter_context(grpc_source.running(service.certs, 0))
        ours, theirs = (
            stack.enter_context(followers.running(address, pid, service.certs, FANNED))
            for address, pid in ((service.address, service.pid), (source, source_pid))
        )

        def through_pjwd(lines: int) -> float:
            command = _command(lines, LINE_PAUSE_SECONDS, LINES_DELAY_SECONDS)
            return _cpu_of(ours, pjwd.start(service, command), 0, lines)

        def through_source(lines: int) -> float:
            return _cpu_of(theirs, next(ids), lines, lines)

        contestants: dict[str, Callable[[int], float]] = {"pjwd": through_pjwd, "bare": through_source}
        for _ in range(turns):
            for name, through in contestants.items():
                few, many = through(FEW_LINES), through(FEW_LINES + count)
                found[name].append((many - few) / count / FANNED)
    return median(found["pjwd"]), median(found["bare"])


def _cpu_of(crowd: Followers, job_id: int, offset: int, lines: int) -> float:
    late, seconds = crowd.lines(job_id, offset)
    if not all(late):
        raise RuntimeError(f"of {lines} lines none came to some of {FANNED} followers")
    return seconds


def _checked(late: list[int], lines: int, count: int, code: int) -> list[int]:
    # lines from before the follower are few: the writer waits for it
    if lines != count or code or len(late) < 0.9 * count or min(late) < 0:
        raise RuntimeError(f"{lines} of {count} lines came, {len(late)} in time, exit code {code}")
    return late
