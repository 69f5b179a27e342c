"""A pjwd with jobs of two clients and a reader under way, for a fault to happen to, and what it promises.

Each promise is a method, named as its column in docs/reliability.md: a test of a fault calls those that hold.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from pjw.worker.settings import WAITING_INITS
from tests.support.service import BIN, Service, wait_for, waiting_ids
from tests.support.worker_harness import UIDS, processes_where

# What a client may wait at most while another's trouble goes on.
OTHERS_SECONDS: Final = 30
# A line each 5 ms until it is told to end; then it says how many there were, and exits with 7.
STEADY: Final = """
import os, select, sys
os.mkfifo("ask")
ask, count = os.open("ask", os.O_RDWR), 0
while not select.select([ask], [], [], 0.005)[0]:
    line = b"line %d of output\\n" % count
    while line:
        line = line[os.write(1, line):]
    count += 1
os.write(1, b"%d lines\\n" % count)
sys.exit(7)
"""
STEADY_CODE: Final = 7


def whole(output: bytes) -> bool:
    """Whether this is all that STEADY wrote: no gap, no repeat, no byte of another."""
    lines = output.splitlines(keepends=True)
    count = len(lines) - 1
    return output == b"".join(b"line %d of output\n" % n for n in range(count)) + b"%d lines\n" % count


class Scene:
    """alice and bob each have a steady job, and bob a reader of his; `service` runs them."""

    def __init__(self, service: Service, uid_first: int) -> None:
        """Take a running service over whose jobs have users of their own (`config_of`)."""
        self.service: Final = service
        self._channels: Final = ExitStack()
        self._stubs: Final[dict[str, JobWorkerServiceStub]] = {}
        self._uid_first: Final = uid_first
        # what a first job leaves open for good (a thread, a client's number) is no leak
        service.ok("logs", str(service.start_job("echo warm")))
        wait_for(lambda: not service.job_cgroups())
        self._idle: Final = self._descriptors()
        self.job = self.start_steady("alice")
        self.other = self.start_steady("bob")
        self._inits: Final = {job_id: self.init_pid(job_id) for job_id in (self.job, self.other)}
        self._seen: Final = service.directory / "seen"
        self._errors: Final = service.directory / "seen.errors"
        self._reader = self._follow()

    def stub(self, client: str) -> JobWorkerServiceStub:
        """Typed calls over a connection that is kept, and made again after a restart (`wait_for_ready`)."""
        if client not in self._stubs:
            self._stubs[client] = self._channels.enter_context(self.service.stub(client))
        return self._stubs[client]

    def job_of(self, job_id: int, client: str) -> pb.Job:
        """A job as it is now."""
        request = pb.GetRequest(id=job_id)
        return self.stub(client).Get(request, timeout=OTHERS_SECONDS, wait_for_ready=True).job

    def jobs_of(self, client: str) -> dict[int, pb.Job]:
        """All jobs of a client, by id."""
        found: dict[int, pb.Job] = {}
        request = pb.ListRequest()
        while True:
            # a page of long commands is a short one
            page = self.stub(client).List(request, timeout=OTHERS_SECONDS, wait_for_ready=True)
            found |= {job.id: job for job in page.jobs}
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    # --- the jobs

    def start_steady(self, client: str) -> int:
        """Start a steady job, and wait until it writes; its id."""
        command = pb.StartRequest(argv=pb.Argv(arguments=["/usr/bin/python3", "-I", "-S", "-c", STEADY]))
        job_id = self.stub(client).Start(command, timeout=OTHERS_SECONDS).job.id
        wait_for(lambda: self.output_size(job_id) > 0)
        return job_id

    def init_pid(self, job_id: int) -> int:
        """The pid, outside, of a job's init."""
        return self.service.init_pid(job_id)

    def output_size(self, job_id: int) -> int:
        """How much a job has written."""
        return (self.service.state / "jobs" / str(job_id) / "output").stat().st_size

    def tell(self, job_id: int) -> None:
        """Tell a steady job to end."""
        ask = os.open(self.service.state / "scratch" / str(job_id) / "ask", os.O_WRONLY | os.O_NONBLOCK)
        os.write(ask, b"end\n")
        os.close(ask)

    def _follow(self) -> "subprocess.Popen[bytes]":
        with self._seen.open("wb") as seen, self._errors.open("wb") as errors:
            reader = subprocess.Popen(
                [str(BIN / "pjw"), "logs", str(self.other)],
                env=self.service.environment("bob"),
                stdin=subprocess.DEVNULL,
                stdout=seen,
                stderr=errors,
            )
        # a stream that has not begun is not taken up again: that would hide a wrong address
        wait_for(lambda: self._seen.stat().st_size > 0)
        return reader

    # --- the service

    def restart(self, *, killed: bool = True) -> None:
        """Start pjwd again, once both of its processes have ended."""
        process = self.service.process
        assert process is not None
        code = process.wait(OTHERS_SECONDS)
        assert not killed or code != 0
        self.service.process = None
        self.service.start()

    def kill(self, pid: int) -> None:
        """SIGKILL."""
        os.kill(pid, signal.SIGKILL)

    @contextmanager
    def frozen(self, pid: int) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    # --- the promises

    def goes_on(self) -> None:
        """The jobs that ran still run, in the same init, and write."""
        for job_id, init in self._inits.items():
            size = self.output_size(job_id)
            wait_for(lambda: self.output_size(job_id) > size)  # noqa: B023
            assert self.init_pid(job_id) == init

    def others_unharmed(self) -> None:
        """bob can do all that he could, each within a deadline, and his reader reads on."""
        size = self._seen.stat().st_size
        assert self.jobs_of("bob")[self.other].state == pb.JOB_STATE_RUNNING
        assert self.job_of(self.other, "bob").state == pb.JOB_STATE_RUNNING
        stub = self.stub("bob")
        own = stub.Start(pb.StartRequest(command="echo mine; exec sleep 100"), timeout=OTHERS_SECONDS).job
        logs = stub.Logs(pb.LogsRequest(id=own.id), timeout=OTHERS_SECONDS)
        assert next(logs).data == b"mine\n"
        ended = stub.Stop(pb.StopRequest(id=own.id), timeout=OTHERS_SECONDS).job
        assert (ended.reason, b"".join(r.data for r in logs)) == (pb.END_REASON_STOPPED, b"")
        wait_for(lambda: self._seen.stat().st_size > size)

    def end_known(self, clock_moved: int = 0) -> None:
        """Told to end, the jobs end, and how is known: code, reason, times by the clock, usage."""
        for job_id, client in ((self.job, "alice"), (self.other, "bob")):
            self.tell(job_id)
            wait_for(lambda: self.job_of(job_id, client).HasField("end"))  # noqa: B023
            job = self.job_of(job_id, client)
            assert (job.state, job.reason) == (pb.JOB_STATE_EXITED, pb.END_REASON_COMPLETED)
            assert (job.exit_code, job.HasField("signal")) == (STEADY_CODE, False)
            took = job.end.ToNanoseconds() / 1e9 - job.start.ToNanoseconds() / 1e9
            assert clock_moved < took < clock_moved + 3600
            assert job.usage.cpu_usage_usec > 0

    def output_whole(self) -> None:
        """After the end: every byte, for who asks now and for who has read all along."""
        output = b""
        for job_id, client in ((self.job, "alice"), (self.other, "bob")):
            request = pb.LogsRequest(id=job_id)
            output = b"".join(r.data for r in self.stub(client).Logs(request, timeout=OTHERS_SECONDS))
            assert whole(output), output[-200:]
        assert self._reader.wait(OTHERS_SECONDS) == 0, self._errors.read_text()
        assert self._seen.read_bytes() == output

    def nothing_left(self) -> None:
        """Once no job runs: no cgroup, scratch directory, process, mount or descriptor."""
        for client in ("alice", "bob"):
            for job in self.jobs_of(client).values():
                if not job.HasField("end"):
                    request = pb.StopRequest(id=job.id, grace=Duration())
                    self.stub(client).Stop(request, timeout=OTHERS_SECONDS)
        self._end_reader()
        self._close_channels()
        wait_for(lambda: self.remains() == [], OTHERS_SECONDS)
        wait_for(lambda: all(now <= idle for now, idle in zip(self._descriptors(), self._idle, strict=True)))

    def remains(self) -> list[str]:
        """What jobs leave while they run, and what must be gone after a failed start."""
        state = str(self.service.state)
        scratch = [str(path) for path in self.service.scratch()]
        first = self._uid_first
        processes = processes_where(lambda status: first <= int(status["Uid"].split()[0]) < first + UIDS)
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {state}/" in line]
        groups = [str(group) for group in self.service.job_cgroups()]
        return groups + scratch + [f"process {pid}" for pid in processes] + mounts

    def remains_of_others(self) -> list[str]:
        """What is there beside the two steady jobs."""
        known = {f"job-{n}" for n in self._inits} | {str(n) for n in self._inits}
        return [path for path in self.remains() if path.startswith("/") and Path(path).name not in known]

    def _descriptors(self) -> tuple[int, int]:
        # an init that waits is two of the launcher's
        waiting = len(waiting_ids(self.service.state))
        launcher = len(os.listdir(f"/proc/{self.service.launcher_pid()}/fd"))
        return self.service.descriptors(), launcher - 2 * waiting

    def _end_reader(self) -> None:
        self._reader.kill()
        self._reader.wait()

    def _close_channels(self) -> None:
        self._channels.close()
        self._stubs.clear()

    def close(self) -> None:
        """Leave no process, also after a failure."""
        self._end_reader()
        self._close_channels()
        if self.service.process is not None and self.service.process.poll() is not None:
            self.service.process = None
            self.service.start()


def config_of(uid_first: int, waiting_inits: int = WAITING_INITS) -> str:
    """The configuration of a service whose jobs' processes can be told from those of all others."""
    return f"waiting_inits = {waiting_inits}\n[job_users]\nuid_first = {uid_first}\nuid_count = {UIDS}\n"
