"""Real workers on a state directory of their own, and the proof that nothing of them stays behind.

Run as a program it is a worker in a process of its own, which a test can kill: see WorkerProcess.
"""

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from pjw.model import ExitStatus, Job, JobSpec, Limits
from pjw.output.inotify import Inotify
from pjw.worker import Part, Worker, WorkerSettings
from pjw.worker.launcher_process import LauncherProcess
from pjw.worker.state_dir import StateDir
from tests.support.service import instance_cgroups, job_cgroups, job_scratch, tell, wait_for

MIB: Final = 1024**2
DEADLINE_SECONDS: Final = 60
PROJECT: Final = Path(__file__).resolve().parents[2]

# Each bench has users of its own, so that whatever still runs as one of them was its job's. Others
# may run tests on this machine at the same time: hence the random first one.
UIDS: Final = 1000
_uid_ranges: Final = itertools.count(random.randrange(1_901_000_000, 2_000_000_000, UIDS), UIDS)


def uid_range() -> int:
    """The first of UIDS user ids that no other test has."""
    return next(_uid_ranges)


class BenchWorker(Worker):
    """A worker whose table a test may look into."""

    def __init__(self, state: StateDir, launcher: LauncherProcess, settings: WorkerSettings) -> None:
        super().__init__(state, launcher, settings)
        self.store: Final = state.store


class Bench:
    """A state directory, the workers that were opened on it, and what they may leave: nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self.state: Final = directory / "state"
        self.settings = WorkerSettings(uid_first=uid_range(), uid_count=UIDS, stop_grace_seconds=5)
        self.workers: Final[list[Worker]] = []

    async def open(self, **settings: Any) -> BenchWorker:
        """Open a worker; *settings* replace some of this bench's, for later ones too."""
        self.changed(**settings)
        worker = await BenchWorker.open(str(self.state), self.settings)
        self.workers.append(worker)
        return worker

    def changed(self, **settings: Any) -> WorkerSettings:
        """The settings of this bench from now on."""
        self.settings = WorkerSettings(**{**_members(self.settings), **settings})
        return self.settings

    async def close(self, worker: Worker) -> None:
        """Close a worker."""
        self.workers.remove(worker)
        await worker.close()

    async def finish(self) -> None:
        """Stop every job, close every worker; then nothing may be left."""
        for worker in list(self.workers):
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await worker.gone()
                await self.close(worker)
        if not self.workers and (self.state / "jobs.sqlite").exists():
            await self.open()
        for worker in list(self.workers):
            for job in await worker.list():
                await worker.stop(job.id, grace_seconds=0)
            # what a launcher has not removed when it ends is left to the next one
            self.check_nothing_remains()
            await self.close(worker)
        self.check_nothing_remains()
        assert instance_cgroups(self.state) == []
        assert not any((self.state / "scratch").glob("*"))

    def remains(self) -> list[str]:
        """All that jobs leave while they run: cgroups, scratch directories, processes."""
        cgroups = [str(path) for path in self.cgroups()]
        return cgroups + [str(path) for path in self.scratch()] + [str(pid) for pid in self.processes()]

    def check_nothing_remains(self) -> None:
        """Of no job anything is left, or is but a moment later: an end is told before the last removals."""
        wait_for(lambda: self.remains() == [])

    def cgroups(self, job_id: int | None = None) -> list[Path]:
        """The cgroups of all jobs of this bench, or of one: several on v1, one on v2."""
        found = sorted(job_cgroups(self.state))
        return [path for path in found if job_id is None or path.name == f"job-{job_id}"]

    def scratch(self) -> list[Path]:
        """The scratch directories of jobs."""
        return job_scratch(self.state)

    def scratch_of(self, job_id: int) -> list[Path]:
        """The scratch directory of a job, if it has one."""
        return [path for path in self.scratch() if path.name == str(job_id)]

    def processes(self) -> list[int]:
        """Every process on this host with a user id of this bench's jobs, zombies too."""
        first = self.settings.uid_first
        return processes_where(lambda status: first <= int(status["Uid"].split()[0]) < first + UIDS)

    def init_pid(self, job_id: int) -> int:
        """The pid, outside, of a job's init."""
        pids = (self.cgroups(job_id)[0] / "cgroup.procs").read_text().split()
        [init] = [int(pid) for pid in pids if status_words(int(pid)).get("NSpid", "").split()[-1:] == ["1"]]
        return init

    def tell(self, job_id: int) -> None:
        """Send a line to a job that began with ASK."""
        tell(self.state, job_id)

    def output(self, job_id: int) -> bytes:
        """What a job has written so far, read behind the worker's back."""
        return (self.state / "jobs" / str(job_id) / "output").read_bytes()

    async def wait_for_output(self, job_id: int, text: bytes) -> None:
        """Wait until a job has written *text*, whoever runs it."""
        path = self.state / "jobs" / str(job_id) / "output"
        inotify, changed = Inotify(), asyncio.Event()
        watch = inotify.watch(str(path), changed.set)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while text not in path.read_bytes():
                    await changed.wait()
                    changed.clear()
        finally:
            inotify.unwatch(watch)
            inotify.close()


@asynccontextmanager
async def open_bench(directory: Path | None = None) -> AsyncIterator[Bench]:
    """A bench; at the end there may be no cgroup, scratch directory, process, descriptor or task of it."""
    descriptors, tasks = open_descriptors(), asyncio.all_tasks()
    # not tmp_path: pytest keeps the last three, jobs write much, and a job has a /tmp of its own
    own = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib")) if directory is None else directory
    bench = Bench(own)
    try:
        yield bench
        async with asyncio.timeout(DEADLINE_SECONDS):
            await bench.finish()
        # only new ones: threads that gRPC has kept from earlier tests may close theirs meanwhile
        check_no_new_descriptors(descriptors)
        await asyncio.sleep(0)  # what was cancelled last ends now
        assert asyncio.all_tasks() - tasks - {asyncio.current_task()} == set()
    finally:
        await _tear_down(bench)
        if directory is None:
            shutil.rmtree(own)


async def _tear_down(bench: Bench) -> None:
    """After a failure: leave the machine clean all the same, without pjw's help."""
    for worker in list(bench.workers):
        await bench.close(worker)
    for cgroup in bench.cgroups():
        for pid in (cgroup / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    for parent in instance_cgroups(bench.state):
        for directory, _, _ in os.walk(parent, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)


def _members(settings: WorkerSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in WorkerSettings.__dataclass_fields__}


def processes_where(condition: Callable[[dict[str, str]], bool]) -> list[int]:
    """The processes on this host whose /proc/PID/status fulfils a condition."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in pids if (status := status_words(pid)) and condition(status)]


def status_words(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status; none of a process that is not there."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def launchers_of(pid: int) -> list[int]:
    """The launchers that a process has started, whether they still run or not."""
    children = [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in _children(pid, task)]
    return [child for child in children if _was_launcher(child)]


def _children(pid: int, task: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    except FileNotFoundError:
        return []


def _was_launcher(pid: int) -> bool:
    # A zombie has no command line any more; a test process has no other children called python.
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"pjw.launcher" in line or (not line and status_words(pid).get("Name", "").startswith("python"))


def open_descriptors() -> dict[str, str]:
    """What this process has open, by number."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the directory itself, just closed
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def check_no_new_descriptors(before: dict[str, str]) -> None:
    """Nothing is open that was not before, or is but a moment longer: threads of ours use files too.

    Eventfds are not counted: pjw makes none, and a gRPC that an earlier test keeps makes its own anew
    whenever this process forks.
    """

    def new() -> set[tuple[str, str]]:
        found = open_descriptors().items() - before.items()
        return {(number, what) for number, what in found if what != "anon_inode:[eventfd]"}

    try:
        wait_for(lambda: not new())
    except AssertionError:
        raise AssertionError(f"descriptors are left open: {sorted(new())}") from None


async def run(
    worker: Worker, command: str | Sequence[str], client: str = "local", **limits: int
) -> tuple[Job, bytes]:
    """Run a job to its end; its final snapshot and all its output."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        job = await worker.start(JobSpec(command, limits), client)
        output = await read_all(worker, job.id)
        return await worker.wait(job.id), output


async def run_in_session(
    worker: Worker, command: str | Sequence[str], client: str = "local"
) -> tuple[ExitStatus | None, bytes, bytes]:
    """Run a command in a job of its own that only sleeps; how it ended, and both its outputs."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        job = await worker.start(JobSpec(["sleep", "600"]), client)
        session = await worker.exec(job.id, JobSpec(command), client)
        parts = [Part(session=session.number, stderr=stderr) for stderr in (False, True)]
        outputs = [b"".join([data async for data in worker.logs(job.id, part)]) for part in parts]
        ended = await worker.wait_session(job.id, session.number)
        await worker.stop(job.id, 0)
        return ended.exit_status, outputs[0], outputs[1]


async def start(worker: Worker, command: str | Sequence[str], client: str = "local", **limits: int) -> Job:
    """Start a job."""
    return await worker.start(JobSpec(command, limits), client)


async def start_said(
    worker: Worker, command: str | Sequence[str], text: bytes, client: str = "local", **limits: int
) -> Job:
    """Start a job, and wait until it has written *text*."""
    job = await worker.start(JobSpec(command, limits), client)
    await read_until(worker, job.id, text)
    return job


async def read_all(worker: Worker, job_id: int, offset: int = 0) -> bytes:
    """A job's output until its end."""
    return b"".join([chunk async for chunk in worker.logs(job_id, Part(offset=offset))])


async def read_until(worker: Worker, job_id: int, text: bytes) -> bytes:
    """A job's output until *text* has come."""
    got = b""
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(worker.logs(job_id)) as chunks:
        async for chunk in chunks:
            got += chunk
            if text in got:
                return got
    raise AssertionError(f"job {job_id} ended without saying {text!r}: {got!r}")


# At the beginning of a script; from then on `read line <&3` waits for Bench.tell.
ASK: Final = "mkfifo ask; exec 3<>ask; "


def python(script: str) -> list[str]:
    """The argv that runs a script by the system's Python, which a job may read."""
    return ["/usr/bin/python3", "-I", "-S", "-c", script]


# --- a worker that can be killed


class WorkerProcess:
    """A worker in a process of its own. Speaks lines of JSON on its stdin and stdout."""

    def __init__(self, bench: Bench) -> None:
        settings = bench.settings
        given = {"uid_first": settings.uid_first, "uid_count": settings.uid_count}
        self.process: Final = subprocess.Popen(
            [sys.executable, "-B", "-m", "tests.support.worker_harness", str(bench.state), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
        )
        assert self.read() == {"ready": True}
        [self.launcher_pid] = launchers_of(self.process.pid)

    def write(self, **request: Any) -> None:
        """Ask for something; `read` has the answers in the order of their coming."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, command: str, *, request_id: str = "", **limits: int) -> int:
        """Start a job; its id."""
        self.write(do="start", command=command, limits=limits, request_id=request_id)
        job_id: int = self.read()["started"]
        return job_id

    def kill(self, *, launcher_first: bool = False) -> None:
        """SIGKILL, to the launcher as well if wanted; return when they have ended."""
        with_pidfd = os.pidfd_open(self.launcher_pid)
        try:
            if launcher_first:
                signal.pidfd_send_signal(with_pidfd, signal.SIGKILL)
            self.process.kill()
            self.process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            os.close(with_pidfd)


async def _serve(state: str, settings: WorkerSettings) -> None:
    worker = await Worker.open(state, settings)
    requests = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(requests), sys.stdin
    )
    print(json.dumps({"ready": True}), flush=True)
    tasks = set()
    while line := await requests.readline():
        tasks.add(asyncio.ensure_future(_answer(worker, json.loads(line))))
    # stdin is closed only by the death of the test: leave its jobs to nobody
    for job in await worker.list():
        await worker.stop(job.id, grace_seconds=0)


async def _answer(worker: Worker, request: dict[str, Any]) -> None:
    if request["do"] == "start":
        spec = JobSpec(request["command"], request["limits"], request_id=request.get("request_id", ""))
        job = await worker.start(spec)
        print(json.dumps({"started": job.id}), flush=True)
    else:
        job = await worker.stop(request["id"], request["grace"])
        print(json.dumps({"stopped": job.id}), flush=True)


NO_LIMITS: Final = Limits(**dict.fromkeys((name for name, _ in Limits().items()), 0))

if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], WorkerSettings(**json.loads(sys.argv[2]))))
