"""Compare a start with an image and one without: the same program, by the same client, in turns.

A job with an image has one more mount, an overlay, and its end removes what that overlay held. In each turn
the waiting inits were made for that turn's kind of job, as for a client that starts one job after the other.
A turn of `crun run` in an overlay goes between (overlaid.py). crun is a local program without a network. So
we compare it with the parts of pjw that do the same for a job: launcher, spawner, init and the command, and
not the server with its TLS, its table and its answers. At the end comes the memory of many sleeping jobs.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import accounts, overlaid, pjwd, scale
from benchmarks.processes import Memory, with_descendants
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.images import have_image, small_root
from tests.support.service import Service, wait_for

SUITE: Final = "images"
GOAL: Final = 1.5
CRUN_GOAL: Final = 0.6
PLAIN: Final = pb.StartRequest(argv=pb.Argv(arguments=["/bin/true"]))
IN_IMAGE: Final = pb.StartRequest(argv=pb.Argv(arguments=["/bin/true"]), image="small")
# of each turn, until the launcher's guesses are right
_UNTIMED: Final = 8


def run(*, quick: bool) -> list[Figure]:
    """Measure the time of a start, the processor time of a life, and the memory of many."""
    rounds, count = (3, 40) if quick else (7, 200)
    times: dict[str, list[float]] = {"plain": [], "image": []}
    cpu: dict[str, list[float]] = {"plain": [], "image": [], "local": [], "crun": []}
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        directory.chmod(0o755)
        service = stack.enter_context(pjwd.running())
        root = small_root(Path(directory) / "root", ["true", "sleep"])
        have_image(service.state, "small", root)
        crun = stack.enter_context(overlaid.opened(directory, root))
        stub = stack.enter_context(service.stub())
        _lives(stub, PLAIN, _UNTIMED)
        with accounts.opened(service) as used:
            for _ in range(rounds):
                for what, request in (("plain", PLAIN), ("image", IN_IMAGE)):
                    _lives(stub, request, _UNTIMED)
                    before = used.now()
                    times[what] += _lives(stub, request, count)
                    spent = used.now() - before
                    cpu[what].append(spent.total / count)
                    if what == "image":
                        cpu["local"].append((spent.total - spent.server) / count)
                if crun is not None:
                    cpu["crun"].append(crun.seconds(count) / count)
        figures = _figures(times, cpu)
        # the last: after many jobs everything costs more
        return figures + _memory(service, stub, 50 if quick else 500)


def _figures(times: dict[str, list[float]], cpu: dict[str, list[float]]) -> list[Figure]:
    start, life = "start with an image", "processor time of a life with an image"
    in_image = median(cpu["image"]) * 1000
    figures = [
        Figure(
            SUITE, start, median(times["image"]) * 1000, "ms", "without", median(times["plain"]) * 1000, GOAL
        ),
        Figure(SUITE, life, in_image, "ms", "without", median(cpu["plain"]) * 1000, held=Held.NEVER),
    ]
    if cpu["crun"]:
        name, theirs = "crun run with an overlay", median(cpu["crun"]) * 1000
        local = median(cpu["local"]) * 1000
        figures.append(
            Figure(
                SUITE, f"{life}, without the server's", local, "ms", name, theirs, CRUN_GOAL, held=Held.NEVER
            )
        )
    return figures


def _memory(service: Service, stub: JobWorkerServiceStub, count: int) -> list[Figure]:
    """Return the memory that each of many sleeping jobs adds, of processes and of the kernel."""
    found: dict[str, float] = {}
    for image in ("", "small"):
        request = pb.StartRequest(argv=pb.Argv(arguments=["/bin/sleep", "3600"]), image=image)
        # the first ones bring the shared memory
        first = [stub.Start(request).job.id for _ in range(_UNTIMED)]
        rest, before = scale.undisturbed(lambda: _all_of(service))
        jobs = [stub.Start(request).job.id for _ in range(count)]
        _, now = scale.undisturbed(lambda: _all_of(service, rest + scale.PROCESSES_PER_JOB * count))  # noqa: B023
        each = now.each(before, count)
        found[image] = each.processes + each.kernel
        scale.stop_many(stub, [*first, *jobs])
    name = f"memory of each of {count} jobs with an image"
    return [Figure(SUITE, name, found["small"], "KiB", "without", found[""], held=Held.NEVER)]


def _all_of(service: Service, expected: int = 0) -> tuple[int, Memory]:
    """Return the number of processes of a pjwd and its jobs, and their memory."""
    pids = scale.at_rest(service)
    if expected:
        wait_for(lambda: len(with_descendants([service.pid])) == expected)
        pids = with_descendants([service.pid])
    return len(pids), Memory.now(pids)


def _lives(stub: JobWorkerServiceStub, request: pb.StartRequest, count: int) -> list[float]:
    """Run *count* lives, one after the other; return the seconds of each start."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        job_id = stub.Start(request).job.id
        found.append(time.perf_counter() - began)
        job = stub.Wait(pb.WaitRequest(id=job_id)).job
        if job.exit_code or job.reason != pb.END_REASON_COMPLETED:
            raise RuntimeError(f"job {job_id} ended otherwise: {job.reason}")
    return found
