"""The victim: a client that starts, asks, reads and stops in turn, with a deadline for each."""

import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

OPERATIONS: Final = ("start", "Get", "read", "stop")
# After two failed calls of a turn we stop it: each may take as long as its deadline.
ENOUGH_FAILURES: Final = 2
SLEEP: Final = pb.StartRequest(argv=pb.Argv(arguments=["sleep", "1000"]))
COLD_FILES: Final = 64
COLD_BYTES: Final = 1024**2
READ: Final = ("head", "-c", "4")


class ColdFiles:
    """Files of the host that everybody may read, and whose pages can be dropped."""

    def __init__(self, directory: Path) -> None:
        """Make the files in an empty directory."""
        directory.mkdir()
        self.directory: Final = directory
        self.paths: Final = [directory / f"file-{number:02}" for number in range(COLD_FILES)]
        # the files that the victim reads; during an attack on one file only that one
        self.wanted = self.paths
        for path in self.paths:
            with path.open("wb") as file:
                file.write(os.urandom(COLD_BYTES))
                os.fsync(file.fileno())
        self.evict()

    def evict(self, *paths: Path) -> None:
        """Drop the pages of *paths*, or of all files, as any user that can open a file may."""
        for path in paths or self.paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def cold_one(self) -> Path:
        """Return a random file that is not in the page cache, or only for a reader that waits for it."""
        path = random.choice(self.wanted)  # noqa: S311 - whichever
        self.evict(path)
        return path


@dataclass(slots=True)
class Samples:
    """The duration of each operation, and the failed ones."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in OPERATIONS})
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Samples") -> None:
        """Add the samples of another turn."""
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self.failures += other.failures


class Victim:
    """A client that goes on with its work during an attack."""

    def __init__(self, stub: JobWorkerServiceStub, cold: ColdFiles, deadline: float) -> None:
        """*deadline*: seconds after which an operation hangs."""
        self._stub: Final = stub
        self._cold: Final = cold
        self.deadline: Final = deadline

    def work(self, count: int) -> Samples:
        """The four operations *count* times, or until enough of them have failed."""
        samples = Samples()
        for _ in range(count):
            if len(samples.failures) >= ENOUGH_FAILURES:
                break
            self._once(samples)
        return samples

    def _once(self, samples: Samples) -> None:
        job_id = 0

        def start() -> None:
            nonlocal job_id
            job_id = self._stub.Start(SLEEP, timeout=self.deadline).job.id

        if self._timed("start", start, samples):
            self._timed(
                "Get", lambda: self._stub.Get(pb.GetRequest(id=job_id), timeout=self.deadline), samples
            )
        path = self._cold.cold_one()
        self._timed("read", lambda: run_as_root([*READ, str(path)], self.deadline), samples)
        if job_id:
            request = pb.StopRequest(id=job_id, grace=Duration())
            self._timed("stop", lambda: self._stub.Stop(request, timeout=self.deadline), samples)

    @staticmethod
    def _timed(name: str, operation: Callable[[], object], samples: Samples) -> bool:
        began = time.perf_counter()
        try:
            operation()
        except (TimeoutError, grpc.RpcError) as error:
            samples.failures.append(f"{name} {why(error)}")
            return False
        samples.seconds[name].append(time.perf_counter() - began)
        return True


def run_as_root(command: Sequence[str], deadline: float) -> None:
    """Run a process of the host's root to its end; TimeoutError when it does not end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        # one that waits in the kernel perhaps does not end now; our own end does not wait for it
        with suppress(subprocess.TimeoutExpired):
            process.wait(deadline)
        raise TimeoutError from None


def why(error: Exception) -> str:
    """Return the fault of a call or a read in words."""
    if not isinstance(error, grpc.RpcError):
        return "hangs" if isinstance(error, TimeoutError) else str(error)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "hangs"
    return f"fails: {error.code().name} {error.details()}"


def why_not_stopped(error: Exception | None) -> str:
    """Return the fault of a stop; none where the server took the start back after its caller had gone."""
    taken_back = isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.NOT_FOUND
    return "" if error is None or taken_back else why(error)
