"""A start with an image beside one without: the same program, by the same client, in turns.

A job with an image has one more mount, an overlay, and its end removes what that overlay held. In each turn
the waiting inits were made for that turn's kind of job, as for a client that starts one job after the other.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from benchmarks.processes import cpu_seconds
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.images import have_image, small_root

SUITE: Final = "images"
GOAL: Final = 1.5
PLAIN: Final = pb.StartRequest(argv=pb.Argv(arguments=["/bin/true"]))
IN_IMAGE: Final = pb.StartRequest(argv=pb.Argv(arguments=["/bin/true"]), image="small")
# of each turn, until the guesses are right
_UNTIMED: Final = 8


def run(*, quick: bool) -> list[Figure]:
    """Measure the time of a start, and the processor time of a life."""
    rounds, count = (3, 40) if quick else (7, 200)
    times: dict[str, list[float]] = {"plain": [], "image": []}
    cpu: dict[str, list[float]] = {"plain": [], "image": []}
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        service = stack.enter_context(pjwd.running())
        have_image(service.state, "small", small_root(Path(directory) / "root", ["true"]))
        pids = (service.pid, service.launcher_pid())
        with service.stub() as stub:
            for _ in range(rounds):
                for what, request in (("plain", PLAIN), ("image", IN_IMAGE)):
                    _lives(stub, request, _UNTIMED)
                    before = cpu_seconds(*pids)
                    times[what] += _lives(stub, request, count)
                    cpu[what].append((cpu_seconds(*pids) - before) / count)
    return [
        Figure(
            SUITE,
            "start with an image",
            median(times["image"]) * 1000,
            "ms",
            "without",
            median(times["plain"]) * 1000,
            GOAL,
        ),
        Figure(
            SUITE,
            "processor time of a life with an image",
            median(cpu["image"]) * 1000,
            "ms",
            "without",
            median(cpu["plain"]) * 1000,
            held=Held.NEVER,
        ),
    ]


def _lives(stub: JobWorkerServiceStub, request: pb.StartRequest, count: int) -> list[float]:
    """So many lives one after the other; how long each start took."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        job_id = stub.Start(request).job.id
        found.append(time.perf_counter() - began)
        job = stub.Wait(pb.WaitRequest(id=job_id)).job
        if job.exit_code or job.reason != pb.END_REASON_COMPLETED:
            raise RuntimeError(f"job {job_id} ended otherwise: {job.reason}")
    return found
