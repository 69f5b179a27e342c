"""Compare a gateway and two nodes with one pjwd, on one machine: with engine `pool`, and with a real Slurm.

Slurm's places are warm, or each job is of another kind, so that each needs a new place. All execute the
same `true`. Slurm is Debian's, unpacked and not installed (scripts/slurm-unpack).
"""

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from benchmarks import followers, pjwd
from benchmarks.clients import TRUE, connected
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from tests.support.cluster import Cluster, NodeService
from tests.support.service import Service, wait_for
from tests.support.slurm import SlurmNode
from tests.support.slurm_cluster import SlurmCluster

if TYPE_CHECKING:
    # the stub of both when it runs
    from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceAsyncStub

SUITE: Final = "cluster"
CLIENTS: Final = 16
POOL_GOAL: Final = 2.0
WARM_GOAL: Final = 2.5
RATE_GOAL: Final = 0.8
STREAM_GOAL: Final = 0.8
MIB: Final = 1024**2
# of each simulated node on any machine: the suite does not measure room
_CPUS: Final = 64
_MEMORY_MB: Final = 1_000_000
_BOUNDLESS: Final = pjwd.CONFIG.partition("[job_users]")[0].format(calls=pjwd.CALLS)
_QUEUE: Final = "[queue]\nrunning_max = 0\n"


class _Pool(Cluster):
    def prepare(self, node: NodeService) -> None:
        node.config = _with_room(node.config or "")

    def change_gateway(self, config: str) -> str:
        return config + _BOUNDLESS


class _Slurm(SlurmCluster):
    def prepare(self, node: NodeService) -> None:
        super().prepare(node)
        node.config = _with_room(node.config or "")

    def change_gateway(self, config: str) -> str:
        return super().change_gateway(config) + _BOUNDLESS

    def slurm_node(self, name: str) -> SlurmNode:
        return SlurmNode(name, prefix=self.apart[name].prefix, cpus=_CPUS, memory_mb=_MEMORY_MB)


def _with_room(config: str) -> str:
    room = f"cpu_max_millicores = {_CPUS * 1000}\nmemory_max_bytes = 0\n"
    return config.replace("cpu_max_millicores = 3000\n", room) + _BOUNDLESS


def run(*, quick: bool) -> list[Figure]:
    """Measure all rows of the suite; in each round each contestant has one turn."""
    rounds, lives, count, size = (2, 10, 64, 64 * MIB) if quick else (5, 20, 256, 256 * MIB)
    with ExitStack() as stack:
        services = {
            "directly": stack.enter_context(pjwd.running(more=_QUEUE)),
            "pool": _begun(stack, _Pool).gateway,
        }
        slurm = _begun(stack, lambda directory: _Slurm(directory, keys="warm_seconds = 3\n"))
        services["warm places"] = services["new places"] = slurm.gateway
        took: defaultdict[str, list[float]] = defaultdict(list)
        rates: defaultdict[str, list[float]] = defaultdict(list)
        kinds = _Kinds()
        for turn in range(rounds + 1):
            for name, service in services.items():
                if name == "new places":
                    # warm places would take their room
                    wait_for(lambda: not slurm.slurm.jobs())
                kind = kinds.new if name == "new places" else kinds.same
                cold = name == "new places"
                one = asyncio.run(_lives(service, 1, lives // 4 if cold else lives, kind))
                many = asyncio.run(_lives(service, CLIENTS, count // 4 if cold else count, kind))
                if turn:
                    # makes connections and warms caches
                    took[name] += one.each
                    rates[name].append(len(many.each) / many.seconds)
        streams = _streams({name: services[name] for name in ("directly", "pool")}, size, rounds)
        return [*_figures(took, rates), streams]


_Made = TypeVar("_Made", bound=Cluster)


def _begun(stack: ExitStack, make: Callable[[Path], _Made]) -> _Made:
    made = make(Path(tempfile.mkdtemp(prefix="pjw-bench-", dir=pjwd.DIRECTORY)))
    stack.callback(made.close)
    return made


class _Kinds:
    """The limits of memory by which Slurm's places differ."""

    def __init__(self) -> None:
        self._megabytes = 64

    def same(self) -> int:
        return 64 * MIB

    def new(self) -> int:
        self._megabytes += 1
        return self._megabytes * MIB


class _Lived:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.each: Final[list[float]] = []


async def _lives(service: Service, clients: int, count: int, memory: Callable[[], int]) -> _Lived:
    """Run jobs by several clients at once, each from its start to its end."""
    left = iter(range(count))
    lived = _Lived()

    async def work(stub: "JobWorkerServiceAsyncStub") -> None:
        for _ in left:
            request = pb.StartRequest(
                argv=pb.Argv(arguments=[TRUE]), limits=pb.Limits(memory_max_bytes=memory())
            )
            began = time.perf_counter()
            job_id = (await stub.Start(request)).job.id
            job = (await stub.Wait(pb.WaitRequest(id=job_id))).job
            lived.each.append(time.perf_counter() - began)
            if job.exit_code or job.reason != pb.END_REASON_COMPLETED:
                raise RuntimeError(f"true did not end as it should: {job}")

    async with AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(connected(service)) for _ in range(clients)]
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for stub in stubs:
                tasks.create_task(work(stub))
        lived.seconds = time.perf_counter() - began
    return lived


def _streams(services: dict[str, Service], size: int, rounds: int) -> Figure:
    """Stream finished output to one reader: through the gateway, and from a pjwd."""
    rates: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(followers.running(service.address, service.pid, service.certs, 1))
            for name, service in services.items()
        }
        jobs = {
            name: pjwd.finished_job(service, f"head -c {size} /dev/zero", size)
            for name, service in services.items()
        }
        for turn in range(rounds + 1):
            for name, reader in readers.items():
                seconds = reader.stream(jobs[name], 0, size).seconds
                if turn:
                    rates[name].append(size / seconds / 1e6)
    return Figure(
        SUITE, "output through the gateway", median(rates["pool"]), "MB/s", "directly",
        median(rates["directly"]), STREAM_GOAL, more_is_better=True, held=Held.NEVER,
    )  # fmt: skip


def _figures(took: dict[str, list[float]], rates: dict[str, list[float]]) -> list[Figure]:
    figures = []
    for name, goal, rate_goal in (
        ("pool", POOL_GOAL, RATE_GOAL),
        ("warm places", WARM_GOAL, RATE_GOAL),
        ("new places", None, None),
    ):
        figures += [
            Figure(
                SUITE, f"a job, {name}", 1e3 * median(took[name]), "ms", "directly",
                1e3 * median(took["directly"]), goal, held=Held.NEVER,
            ),
            Figure(
                SUITE, f"jobs, {CLIENTS} at once, {name}", median(rates[name]), "jobs/s", "directly",
                median(rates["directly"]), rate_goal, more_is_better=True, held=Held.NEVER,
            ),
        ]  # fmt: skip
    return figures
