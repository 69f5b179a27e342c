"""Compare the queue with starts at once: its rates of jobs in and out, and another client's wait for a turn.

All execute the same `true`, the same number at a time. A drained job costs its client one call (Wait), and a
start at once two, so the ratio is a client's, and not that of the server's work alone. task-spooler,
where it is installed, is a queue without isolation, without limits and without a network. Slurm, where it is
installed, is a queue for many machines: here one, without isolation and limits, and all jobs are one call.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import arrays, pjwd
from benchmarks.clients import TRUE, connected, run_many
from benchmarks.processes import cpu_seconds, own_cpu_seconds
from benchmarks.report import Figure, Held, median
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import CALL_SECONDS, Service

if TYPE_CHECKING:
    # the stub of both when it runs
    from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceAsyncStub

SUITE: Final = "queue"
SLOTS: Final = 8
DRAIN_GOAL: Final = 0.9
ENQUEUE_GOAL: Final = 1000.0
# the most that one call may have
_BATCH: Final = 500
CONFIG: Final = f"""
[queue]
running_max = {SLOTS}
cpu_max_millicores = 0
memory_max_bytes = 0
"""


def run(*, quick: bool) -> list[Figure]:
    """Measure all of it."""
    rounds, count, many = (3, 96, 2_000) if quick else (5, 512, 10_000)
    with ExitStack() as stack:
        service = stack.enter_context(pjwd.running(("alice", "bob"), CONFIG))
        directly: list[float] = []
        drained: list[float] = []
        of_arrays: list[float] = []
        # Of server and launcher and the processes that they have collected. On a busy machine rates say less.
        directly_cpu: list[float] = []
        drained_cpu: list[float] = []
        pids = (service.pid, service.launcher_pid())
        for _ in range(rounds):
            # in turns: a shared machine affects both alike
            used = [cpu_seconds(*pids)]
            directly.append(count / asyncio.run(run_many(service, SLOTS, count)))
            used.append(cpu_seconds(*pids))
            drained.append(count / asyncio.run(_drain(service, count)))
            used.append(cpu_seconds(*pids))
            directly_cpu.append((used[1] - used[0]) / count)
            drained_cpu.append((used[2] - used[1]) / count)
            of_arrays.append(arrays.drained(service, count, SLOTS))
        taken, between, taken_cpu = asyncio.run(_another_beside_many(service, many))
        figures = [
            Figure(
                SUITE,
                f"drain, {SLOTS} slots",
                median(drained),
                "jobs/s",
                "started at once",
                median(directly),
                DRAIN_GOAL,
                more_is_better=True,
            ),
            Figure(
                SUITE,
                f"drain of an array, {SLOTS} slots",
                median(of_arrays),
                "jobs/s",
                "started at once",
                median(directly),
                DRAIN_GOAL,
                more_is_better=True,
            ),
            Figure(
                SUITE,
                "CPU of a drained job",
                1e3 * median(drained_cpu),
                "ms",
                "started at once",
                1e3 * median(directly_cpu),
                1 / DRAIN_GOAL,
            ),
            Figure(
                SUITE,
                f"CPU of a job that is put there, {_BATCH} a call",
                1e3 * taken_cpu,
                "ms",
                "the bound",
                1e3 / ENQUEUE_GOAL,
                1.0,
                held=Held.NEVER,
            ),
            Figure(
                SUITE,
                f"enqueue, {_BATCH} a call",
                taken,
                "jobs/s",
                "the bound",
                ENQUEUE_GOAL,
                1.0,
                more_is_better=True,
                held=Held.NEVER,
            ),
            # those that pjwd was starting just then, and perhaps one more in the slot that became free
            Figure(
                SUITE,
                f"jobs of alice's {many:,} that begin before bob's one",
                between,
                "jobs",
                "the slots",
                SLOTS,
                1.0,
                held=Held.NEVER,
            ),
        ]
        figures += arrays.waiting(CONFIG, rounds=rounds)
        for name, rate in (
            ("task-spooler", _spooled(Path(stack.enter_context(pjwd.directory())), count)),
            ("Slurm", _by_slurm(Path(stack.enter_context(pjwd.directory())), count)),
        ):
            if rate is not None:
                figures.append(
                    Figure(
                        SUITE, f"drain, {SLOTS} slots", median(drained), "jobs/s", name, rate,
                        more_is_better=True, held=Held.IF_THERE,
                    )
                )  # fmt: skip
        return figures


async def _drain(service: Service, count: int) -> float:
    """Put *count* jobs into the queue; return the seconds until the last one has ended."""
    async with AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(connected(service)) for _ in range(SLOTS)]
        began = time.perf_counter()
        ids = await _submit(stubs[0], count)

        async def wait(stub: "JobWorkerServiceAsyncStub", mine: Sequence[int]) -> None:
            for job_id in mine:
                job = (await stub.Wait(pb.WaitRequest(id=job_id))).job
                if job.exit_code or job.reason != pb.END_REASON_COMPLETED:
                    raise RuntimeError(f"a job of the queue ended so:\n{job}")

        async with asyncio.TaskGroup() as tasks:
            for number, stub in enumerate(stubs):
                tasks.create_task(wait(stub, ids[number::SLOTS]))
        return time.perf_counter() - began


async def _submit(stub: "JobWorkerServiceAsyncStub", count: int, *, held: bool = False) -> list[int]:
    job = pb.QueuedJob(start=pb.StartRequest(argv=pb.Argv(arguments=[TRUE])), held=held)
    ids: list[int] = []
    while len(ids) < count:
        request = pb.SubmitRequest(jobs=[job] * min(_BATCH, count - len(ids)))
        ids += [each.id for each in (await stub.Submit(request, timeout=CALL_SECONDS)).jobs]
    return ids


async def _another_beside_many(service: Service, many: int) -> tuple[float, int, float]:
    """Return the jobs a second that alice can put there, and how many of them begin before bob's one.

    And the processor seconds of the server for each of a fifth as many, held so that none begins meanwhile.
    """
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(connected(service))
        bob = await stack.enter_async_context(connected(service, "bob"))
        used = own_cpu_seconds(service.pid)
        waiting = await _submit(alice, many // 5, held=True)
        used = own_cpu_seconds(service.pid) - used
        for job_id in waiting:
            await alice.Stop(pb.StopRequest(id=job_id))
        began = time.perf_counter()
        ids = await _submit(alice, many)
        taken = time.perf_counter() - began
        [bobs] = await _submit(bob, 1)
        ended = (await bob.Wait(pb.WaitRequest(id=bobs))).job
        jobs = [each async for each in _listed(alice)]
        begun = {job.id: job.start.ToNanoseconds() for job in jobs if job.HasField("start")}
        asked, own = ended.queued.ToNanoseconds(), ended.start.ToNanoseconds()
        between = sum(asked < begun.get(job_id, 0) < own for job_id in ids)
        for job in jobs:
            if job.state == pb.JOB_STATE_QUEUED:
                await alice.Stop(pb.StopRequest(id=job.id))
        return many / taken, between, used / len(waiting)


async def _listed(stub: "JobWorkerServiceAsyncStub") -> AsyncGenerator[pb.Job, None]:
    token = ""
    while True:
        page = await stub.List(pb.ListRequest(page_token=token), timeout=CALL_SECONDS)
        for job in page.jobs:
            yield job
        token = page.next_page_token
        if not token:
            return


def _spooled(directory: Path, count: int) -> float | None:
    """Return the rate of task-spooler, where that is installed."""
    # the name that Debian gives it; another program is called ts
    program = shutil.which("tsp")
    if program is None:
        return None
    environment = {**os.environ, "TS_SOCKET": str(directory / "socket"), "TMPDIR": str(directory)}

    def tsp(*arguments: str) -> str:
        return subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout

    tsp("-S", str(SLOTS))
    try:
        began = time.perf_counter()
        ids = [tsp("-n", TRUE).strip() for _ in range(count)]
        for each in ids[-SLOTS:]:
            tsp("-w", each)
        return count / (time.perf_counter() - began)
    finally:
        tsp("-K")


# For one machine; it is configured with one processor for each slot of the queue.
_SLURM: Final = """
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={directory}/controller
SlurmdSpoolDir={directory}/node
SlurmctldPidFile={directory}/controller.pid
SlurmdPidFile={directory}/node.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=defer,batch_sched_delay=0,sched_min_interval=0,default_queue_depth=10000
MaxArraySize=100001
MaxJobCount=100000
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={slots} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
{more}
"""
_SLURM_SECONDS: Final = 60.0


def _by_slurm(directory: Path, count: int) -> float | None:
    """Return the rate of Slurm, where it is installed and runs here."""
    if shutil.which("sbatch") is None or _slurm_program("slurmctld") is None:
        return None
    try:
        with _slurm(directory) as environment:

            def ask(*arguments: str) -> str:
                return subprocess.run(
                    arguments, env=environment, cwd=directory, capture_output=True, text=True, check=True
                ).stdout.strip()

            _wait_for_slurm(lambda: "idle" in ask("sinfo", "--noheader", "--format", "%t"))
            began = time.perf_counter()
            ask(
                *("sbatch", f"--array=1-{count}", "--cpus-per-task=1", "--output=/dev/null"),
                *("--wrap", f"exec {TRUE}"),
            )
            _wait_for_slurm(lambda: not ask("squeue", "--noheader"), count)
            return count / (time.perf_counter() - began)
    except (subprocess.SubprocessError, TimeoutError) as error:
        words = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        print(f"left out: Slurm: {words}", file=sys.stderr)
        return None


def _slurm_program(name: str) -> str | None:
    # Debian has a suffix, and a link without it where its packages are set up
    return shutil.which(name) or shutil.which(f"{name}-wlm")


def _wait_for_slurm(condition: Callable[[], bool], seconds: float = 0.0) -> None:
    deadline = time.monotonic() + _SLURM_SECONDS + seconds
    # it sends no event
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not answer in time")
        time.sleep(0.1)


@contextmanager
def _slurm(directory: Path) -> Iterator[dict[str, str]]:
    """Give a separate Slurm on this machine, and the environment of its commands."""
    for name in ("controller", "node"):
        (directory / name).mkdir()
    config = directory / "slurm.conf"
    with ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [each.getsockname()[1] for each in free]
    # set where its packages are unpacked, not installed
    plugins = os.environ.get("SLURM_PLUGINS")
    config.write_text(
        _SLURM.format(
            host=socket.gethostname().partition(".")[0], directory=directory, ports=ports, slots=SLOTS,
            more=f"PluginDir={plugins}" if plugins else "",
        )
    )  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(config)}
    controller, node, step = map(_slurm_program, ("slurmctld", "slurmd", "slurmstepd"))
    with ExitStack() as stack:
        for command in ([controller, "-D", "-i"], [node, "-D", "-d", step]):
            log = stack.enter_context((directory / f"{len(os.listdir(directory))}.log").open("wb"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # type: ignore[arg-type]
            stack.callback(process.wait)
            stack.callback(process.terminate)
        yield environment
