"""Measure the server's memory: with much output, with many followers, with some of them stalled."""

import time
from contextlib import ExitStack
from typing import Final

from benchmarks import followers, grpc_source, pjwd, processes
from benchmarks.report import Figure, Held
from tests.support.service import Service

MIB: Final = 1024**2
KIB: Final = 1024
MANY: Final = 1000
STALLED: Final = 10
# each first reads this much, so that it gets the largest chunks when it stalls
READ_FIRST: Final = 8 * MIB
# Caches fill and allocators keep their memory, with output of any size.
HOLDING_BOUND: Final = 2 * MIB
STREAMING_BOUND: Final = 8 * MIB
STALLED_BOUND: Final = 1 * MIB


def run(*, quick: bool) -> list[Figure]:
    """Measure all rows of the suite, on a separate server."""
    size = (256 if quick else 1024) * MIB
    many = 200 if quick else MANY
    with ExitStack() as stack:
        service = stack.enter_context(pjwd.running())
        source, source_pid = stack.enter_context(grpc_source.running(service.certs, size))
        figures = _output(service, size)
        figures += _followers(service, source, source_pid, many)
        return figures


def _output(service: Service, size: int) -> list[Figure]:
    """Measure output that is written, held and streamed, each against a sixteenth of it."""
    small, name = size // 16, f"{size // MIB} MiB of output"
    with followers.running(service.address, service.pid, service.certs, 1) as follower:
        # this loads imports and caches
        follower.stream(pjwd.finished_job(service, f"head -c {small} /dev/zero", small), size=small)
        before = processes.pss_bytes(service.pid)
        job_id = pjwd.finished_job(service, f"head -c {size} /dev/zero", size)
        held = processes.pss_bytes(service.pid) - before
        peaks = []
        for part in (small, size):
            processes.forget_peak(service.pid)
            follower.stream(job_id, size - part, part)
            peaks.append(processes.peak_rss_bytes(service.pid))
    streaming = max(0, peaks[1] - peaks[0])
    return [
        _bounded(f"growth while {name} are written and held", max(0, held), HOLDING_BOUND),
        _bounded(f"growth of the peak, {name} streamed in place of a sixteenth", streaming, STREAMING_BOUND),
    ]


def _followers(service: Service, source: str, source_pid: int, many: int) -> list[Figure]:
    """Measure followers of a silent job, of pjwd and of gRPC alone; then a few more that stall."""
    silent = service.start_job("exec sleep 1000")
    big = pjwd.finished_job(service, f"head -c {64 * MIB} /dev/zero", 64 * MIB)
    idle = many - STALLED
    with ExitStack() as stack:
        before = settled(source_pid)
        running = followers.running(source, source_pid, service.certs, idle)
        with running as theirs:
            theirs.hold(0)
            bare = (settled(source_pid) - before) / idle
        before = settled(service.pid)
        running = followers.running(service.address, service.pid, service.certs, many)
        ours = stack.enter_context(running)
        ours.hold(silent, last=idle)
        each = (settled(service.pid) - before) / idle
        # The last are connected but idle so far: the growth is the cost of stalling.
        before = settled(service.pid)
        ours.hold(big, READ_FIRST, first=idle)
        stalled = (settled(service.pid) - before) / STALLED
    return [
        Figure("memory", f"each of {idle} followers", each / KIB, "KiB", "grpcio", bare / KIB),
        _bounded(f"a stalled follower ({STALLED} of {many})", max(0.0, stalled), STALLED_BOUND),
    ]


def settled(pid: int) -> int:
    """Return the memory of a process, once it does not change any more."""
    now = processes.pss_bytes(pid)
    while True:
        time.sleep(0.5)
        before, now = now, processes.pss_bytes(pid)
        if abs(now - before) < 64 * KIB:
            return now


def _bounded(name: str, value: float, bound: float) -> Figure:
    # may be 0, and then any other value would be infinitely worse
    return Figure("memory", name, value / MIB, "MiB", "bound", bound / MIB, 1, held=Held.NEVER)
