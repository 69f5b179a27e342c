"""The soak's clients and readers: threads that ask for anything at any time, and believe nothing."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import grpc

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.soak.tasks import Task, make
from tests.support.service import Service

RUNNING_MAX: Final = 6
CALL_SECONDS: Final = 30
CUT_SHORT: Final = "starts whose init was killed before the answer"
BAD_PROGRAM: Final = "/nonexistent"
# What a call may end with while processes are killed; all else is a finding.
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_BAD: Final = (
    (pb.StartRequest(command=" "), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.StartRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.StartRequest(command="true", limits=pb.Limits(pids_max=1)), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.StartRequest(argv=pb.Argv(arguments=[BAD_PROGRAM])), grpc.StatusCode.FAILED_PRECONDITION),
)


class Ledger:
    """What was asked and answered, and what went wrong; shared by all threads."""

    def __init__(self) -> None:
        self.stop: Final = threading.Event()
        self.findings: Final[list[str]] = []
        self.counts: Final[dict[str, int]] = {}
        self.init_killed: Final[set[int]] = set()
        self._lock: Final = threading.Lock()

    def count(self, name: str, more: int = 1) -> None:
        """Add to a figure of the report."""
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + more

    def find(self, text: str) -> None:
        """Note what may not be."""
        with self._lock:
            self.findings.append(text)
        print(f"soak: finding: {text}", flush=True)


class _Thread(threading.Thread):
    """Repeats one thing until the end; an error that is not expected is a finding."""

    def __init__(self, service: Service, ledger: Ledger, client: str, seed: str) -> None:
        super().__init__(name=seed)
        self.chance: Final = random.Random(seed)
        self.service, self.ledger, self.client = service, ledger, client

    def run(self) -> None:
        """Until the end."""
        with self.service.stub(self.client) as stub:
            while not self.ledger.stop.is_set():
                try:
                    self.turn(stub)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.CANCELLED:
                        self.ledger.count("calls that a server cancelled as it ended")
                    elif error.code() is grpc.StatusCode.INTERNAL:
                        self.ledger.count(CUT_SHORT)  # judged at the end by the server's log
                    elif error.code() not in _LOST:
                        self.ledger.find(f"{self.name}: {error.code()}: {error.details()}")
                    self.ledger.count("calls cut off")
                    self.ledger.stop.wait(0.2)
                except Exception as error:  # noqa: BLE001  a thread must not end in silence
                    self.ledger.find(f"{self.name}: {error!r}")

    def turn(self, stub: JobWorkerServiceStub) -> None:
        """One thing."""
        raise NotImplementedError


class Client(_Thread):
    """Starts, stops, lists and looks, as one client; keeps its tasks by token."""

    def __init__(self, service: Service, ledger: Ledger, client: str, seed: str) -> None:
        super().__init__(service, ledger, client, seed)
        self.tasks: Final[dict[str, Task]] = {}
        self._running: Final[dict[int, Task]] = {}

    def turn(self, stub: JobWorkerServiceStub) -> None:
        """Any call of a client's."""
        calls: list[Callable[[JobWorkerServiceStub], None]] = [self._start_one] * 6
        calls += [self._look] * 3 + [self._stop_one, self._list, self._bad]
        self.chance.choice(calls)(stub)
        self.ledger.stop.wait(self.chance.uniform(0, 0.15))

    def a_task(self, chance: random.Random) -> Task | None:
        """Any task that has a job, for a reader; newer ones above all."""
        tasks = [task for task in list(self.tasks.values())[-40:] if task.job_id is not None]
        return chance.choice(tasks) if tasks else None

    def _start_one(self, stub: JobWorkerServiceStub) -> None:
        if len(self._running) >= RUNNING_MAX:
            self._look(stub)
            return
        task = make(self.chance, f"{self.client}-{len(self.tasks)}")
        self.tasks[task.token] = task
        began = time.monotonic()
        task.job_id = stub.Start(task.request(), timeout=CALL_SECONDS).job.id
        self.ledger.count("starts")
        if time.monotonic() - began > 5:
            self.ledger.count("starts that took more than 5 s")
        self._running[task.job_id] = task

    def _look(self, stub: JobWorkerServiceStub) -> None:
        if not self._running:
            return
        job_id = self.chance.choice(list(self._running))
        job = stub.Get(pb.GetRequest(id=job_id), timeout=CALL_SECONDS).job
        self.ledger.count("gets")
        if job.HasField("end"):
            del self._running[job_id]
        elif self._running[job_id].reason == pb.END_REASON_STOPPED and self.chance.random() < 0.3:
            self._end(stub, job_id)

    def _stop_one(self, stub: JobWorkerServiceStub) -> None:
        if self._running:
            self._end(stub, self.chance.choice(list(self._running)))

    def _end(self, stub: JobWorkerServiceStub, job_id: int) -> None:
        request = pb.StopRequest(id=job_id)
        request.grace.seconds = self.chance.choice([0, 1, 5])
        self._running[job_id].stop_asked = True
        job = stub.Stop(request, timeout=CALL_SECONDS).job
        self.ledger.count("stops")
        if not job.HasField("end"):
            self.ledger.find(f"the stop of job {job_id} was answered before its end")
        del self._running[job_id]

    def _list(self, stub: JobWorkerServiceStub) -> None:
        page = stub.List(pb.ListRequest(page_size=self.chance.choice([1, 10, 100])), timeout=CALL_SECONDS)
        self.ledger.count("lists")
        if any(job.client_name != self.client for job in page.jobs):
            self.ledger.find(f"{self.client} was shown a job of another")

    def _bad(self, stub: JobWorkerServiceStub) -> None:
        request, expected = self.chance.choice(_BAD)
        try:
            stub.Start(request, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise  # as of any call
            if error.code() not in (expected, *_LOST):
                self.ledger.find(f"a bad request was answered {error.code()}: {error.details()}")
            self.ledger.count("bad requests")
            return
        self.ledger.find(f"a bad request was accepted: {request}")


class Reader(_Thread):
    """Follows jobs of one client: to the end, with stalls, away in the middle, on at the exact byte."""

    def __init__(self, client: Client, seed: str) -> None:
        super().__init__(client.service, client.ledger, client.client, seed)
        self._of: Final = client

    def turn(self, stub: JobWorkerServiceStub) -> None:
        """Follow one job."""
        task = self._of.a_task(self.chance)
        if task is None:
            self.ledger.stop.wait(0.2)
            return
        manner = self.chance.choice(["read", "read", "stall", "vanish"])
        offset = 0
        # cut off by a kill, it goes on where it was
        for _ in range(100):
            with suppress(grpc.RpcError):
                offset, ended = self._read(stub, task, offset, manner)
                if ended or manner == "vanish":
                    break
            offset = self._offset
            if self.ledger.stop.wait(0.3):
                break
        self.ledger.count("reads")

    _offset = 0

    def _read(self, stub: JobWorkerServiceStub, task: Task, offset: int, manner: str) -> tuple[int, bool]:
        self._offset = offset
        call = stub.Logs(pb.LogsRequest(id=task.job_id or 0, offset=offset), timeout=60)
        try:
            for number, response in enumerate(call):
                end = self._offset + len(response.data)
                if response.data != task.output(self._offset, end):
                    self.ledger.find(f"a reader of job {task.job_id} saw other bytes at {self._offset}")
                self._offset = end
                self.ledger.count("bytes read", len(response.data))
                if manner == "stall" and number == 1:
                    self.ledger.stop.wait(self.chance.uniform(0, 3))
                if self.ledger.stop.is_set() or (manner == "vanish" and number == 2):
                    return self._offset, False
            return self._offset, True
        finally:
            call.cancel()
