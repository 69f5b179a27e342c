"""A pjwd with its defaults, a victim, and the means of an attacker; at the end all of it is removed."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration

from benchmarks import pjwd
from benchmarks.attack.victim import ColdFiles, Victim, why_not_stopped
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.disks import small_disk
from tests.support.service import Service, end_all, instance_cgroups, wait_for
from tests.support.worker_harness import PROJECT, UIDS, uid_range

# the usual place of a service's state: on a disk whose files jobs can execute
DIRECTORY: Final = Path("/var/lib")
VICTIM: Final = "victim"
ATTACKER: Final = "attacker"
PYTHON: Final = ("/usr/bin/python3", "-I", "-S", "-c")
BUSY: Final = "while :; do :; done"
# Below the floors, so the server refuses it once there are floors; and the floors' defaults then.
TINY_IO: Final = 2
FLOOR_BYTES: Final = 1024**2
FLOOR_OPERATIONS: Final = 100
STOP_SECONDS: Final = 15.0
# A client launches a hundred jobs. The jobs that run already take processor time from the later launches.
LAUNCH_SECONDS: Final = 180.0
# Sums so small that an excess endangers no machine that this runs on; only if pjwd has such sums.
HOST_MEMORY: Final = min(1024**3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
HOST: Final = {"memory_max_bytes": HOST_MEMORY, "pids_max": 4096}
BASE_CONFIG: Final = "stop_grace_seconds = 1\n{more}\n[job_users]\nuid_first = {first}\nuid_count = {count}\n"


class Stage:
    """One service with both clients."""

    def __init__(
        self,
        service: Service,
        cold: ColdFiles,
        victim: Victim,
        stub: JobWorkerServiceStub,
        disk: Path | None,
    ) -> None:
        """*stub*: calls of the attacker. *disk*: a small one with jobs' scratch."""
        self.service: Final = service
        self.cold: Final = cold
        self.victim: Final = victim
        self.stub: Final = stub
        self.disk: Final = disk
        # faults of the attacker's own jobs, which must end too
        self.failures: Final[list[str]] = []
        self._lowest: pb.Limits | None = None

    @property
    def lowest_io(self) -> pb.Limits:
        """The lowest limits of disk IO that the server lets a client have."""
        if self._lowest is None:
            self._lowest = self._find_lowest()
        return self._lowest

    def _find_lowest(self) -> pb.Limits:
        tiny, floor, none = (TINY_IO, TINY_IO), (FLOOR_BYTES, FLOOR_OPERATIONS), (0, 0)
        for (rbps, riops), (wbps, wiops) in ((tiny, tiny), (floor, floor), (none, tiny), (none, floor)):
            limits = pb.Limits(io_rbps_max=rbps, io_riops_max=riops, io_wbps_max=wbps, io_wiops_max=wiops)
            try:
                self.stop(self.job(["true"], limits))
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
            else:
                return limits
        raise RuntimeError("the server takes neither tiny limits of disk IO nor its floors")

    def job(self, program: str | Sequence[str], limits: pb.Limits | None = None) -> int:
        """Start one of the attacker's jobs: a command for the shell, or an argv."""
        return self.stub.Start(_request(program, limits), timeout=self.victim.deadline).job.id

    def stop(self, job_id: int) -> pb.Job:
        """Kill one of the attacker's jobs."""
        return self.stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=STOP_SECONDS).job

    @contextmanager
    def jobs(
        self,
        program: str | Sequence[str],
        count: int = 1,
        limits: pb.Limits | None = None,
        allow: Sequence[str] = (),
    ) -> Iterator[list[int]]:
        """Run *count* jobs, which may reach these names on the network, for as long as the context."""
        # at once: the last of many would wait for the work of the first ones
        request, timeout = _request(program, limits), LAUNCH_SECONDS
        request.allow.extend(allow)
        calls = [self.stub.Start.future(request, timeout=timeout) for _ in range(count)]
        ids = [call.result().job.id for call in calls if call.exception() is None]
        try:
            for call in calls:
                call.result()
            yield ids
        finally:
            self.stop_all(ids)

    def stop_all(self, ids: Sequence[int]) -> None:
        """Stop these jobs at once, each within the deadline."""
        calls = [
            (job_id, self.stub.Stop.future(pb.StopRequest(id=job_id, grace=Duration()), timeout=STOP_SECONDS))
            for job_id in ids
        ]
        failed = len(self.failures)
        for job_id, call in calls:
            if words := why_not_stopped(call.exception()):
                self.failures.append(f"stop of job {job_id} of the attacker {words}")
        if len(self.failures) > failed:
            lift(self.service)

    @contextmanager
    def program(self, name: str, *arguments: object) -> Iterator[None]:
        """Run one of the attacker's programs (attackers.py), for as long as the context."""
        command = [sys.executable, "-B", "-m", "benchmarks.attack.attackers", name, self.service.address]
        command += [str(self.service.certs), *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"the attacker's program {name} ended")
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the attacker's program {name} ended with {process.returncode}")
        finally:
            # it ends with its input
            process.stdin.close()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def output(self, job_id: int, expected: bytes, seconds: float = STOP_SECONDS) -> bytes:
        """Return a job's output, once *expected* is in it, or when the time is over."""
        path = self.service.state / "jobs" / str(job_id) / "output"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                if expected in (text := path.read_bytes()):
                    return text
            time.sleep(0.02)
        return b""

    def end_what_runs(self) -> None:
        """Stop the attacker's remaining jobs."""
        states = [pb.JOB_STATE_STARTING, pb.JOB_STATE_RUNNING, pb.JOB_STATE_STOPPING]
        while jobs := self.stub.List(pb.ListRequest(states=states), timeout=STOP_SECONDS).jobs:
            failures = len(self.failures)
            self.stop_all([job.id for job in jobs])
            if len(self.failures) > failures:
                return

    def is_clean(self) -> bool:
        """Whether the next attack may use this stage: nothing of the last one is left."""
        if self.failures:
            return False
        try:
            wait_for(lambda: not self.service.job_cgroups(), STOP_SECONDS)
        except AssertionError:
            return False
        return True


def _request(program: str | Sequence[str], limits: pb.Limits | None) -> pb.StartRequest:
    if isinstance(program, str):
        return pb.StartRequest(command=program, limits=limits)
    return pb.StartRequest(argv=pb.Argv(arguments=program), limits=limits)


@contextmanager
def open_stage(
    deadline: float,
    base: Path = DIRECTORY,
    *,
    disk_megabytes: int = 0,
    files_max: int = 0,
    clients: str = "",
    network: str = "",
) -> Iterator[Stage]:
    """Open a service below *base*: with scratch or all of its state on a small disk, or with few open files.

    *clients*, *network*: lines for these tables of the configuration.
    """
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="pjw-attack-", dir=base))
        stack.callback(shutil.rmtree, directory)
        directory.chmod(0o755)
        (directory / "pjwd").mkdir()
        described = subprocess.check_output([pjwd.program(), "config", "show"], text=True)
        disk = None
        if disk_megabytes:
            # mkfs's default
            disk = stack.enter_context(small_disk(disk_megabytes, reserved_percent=5))
        own_scratch = disk is not None and "scratch_dir" in described
        config = f'scratch_dir = "{disk}"\n' if own_scratch else ""
        service = _LimitedService(
            directory / "pjwd", [VICTIM, ATTACKER], _config(config, described, clients, network)
        )
        service.files_max = files_max
        service.pjwd = pjwd.program()
        if disk is not None and not own_scratch:
            service.state = disk / "state"
        cold = ColdFiles(directory / "cold")
        stack.callback(_end, service)
        service.start()
        stub = stack.enter_context(service.stub(VICTIM))
        attacker = stack.enter_context(service.stub(ATTACKER))
        stage = Stage(service, cold, Victim(stub, cold, deadline), attacker, disk)
        # this makes connections, caches and the waiting inits
        stage.victim.work(3)
        yield stage


def _config(more: str, described: str, clients: str, network: str) -> str:
    host = "".join(f"{key} = {value}\n" for key, value in HOST.items() if f"host.{key}" in described)
    text = BASE_CONFIG.format(more=more, first=uid_range(), count=UIDS)
    tables = {"host": host, "clients": clients, "network": network}
    return text + "".join(f"[{name}]\n{lines}" for name, lines in tables.items() if lines)


class _LimitedService(Service):
    """A pjwd with a hard limit of open files."""

    files_max = 0

    def command(self, *extra: str) -> list[str]:
        """The command line of pjwd."""
        limit = ["prlimit", f"--nofile={self.files_max}"] if self.files_max else []
        return [*limit, *super().command(*extra)]


def _end(service: Service) -> None:
    """End pjwd and every job, also jobs that their limits keep from ending."""
    lift(service)
    try:
        if service.process is not None:
            service.stop()
    except subprocess.TimeoutExpired:
        assert service.process is not None
        service.process.kill()
        service.process.wait()
    finally:
        lift(service)
        end_all(service.state)


def lift(service: Service) -> None:
    """Remove every limit of disk IO from its jobs, if pjwd fails to: so that this run can end."""
    for instance in instance_cgroups(service.state):
        for directory, _, names in os.walk(instance):
            for name in names:
                if name == "io.max" or (name.startswith("blkio.throttle.") and name.endswith("_device")):
                    _lift_in(Path(directory, name))


def _lift_in(path: Path) -> None:
    with suppress(FileNotFoundError, OSError):
        for line in path.read_text().splitlines():
            device = line.split()[0]
            none = "rbps=max wbps=max riops=max wiops=max" if path.name == "io.max" else "0"
            path.write_text(f"{device} {none}")
