"""A real pjwd for a benchmark: installed, with its defaults, but without limits for clients."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import BIN, CALL_SECONDS, Service, end_all, wait_for
from tests.support.worker_harness import UIDS, uid_range

# the usual place of a service's state: on a disk with executable files; /tmp may be neither
DIRECTORY: Final = "/var/lib"
# keys that would bound the benchmark itself; and users that no other program on the machine has
CONFIG: Final = """
[clients]
starts_per_second = 0
calls_max = 0
followers_max = 0
followers_total_max = 0
running_max = 0
running_total_max = 0
{calls}
[job_users]
uid_first = {uid_first}
uid_count = {uid_count}
{port}"""
# Bounds that an early commit lacks: it would refuse these keys.
CALLS: Final = "calls_per_second = 0\nconnections_max = 0"
PORT: Final = """
[port]
unproven_max = 4096
unproven_per_address_max = 4096
streams_per_connection_max = 1000
"""
_KEYS: Final = """
from pjw.server.config import ServerConfig
print(*ServerConfig.__struct_fields__, *ServerConfig().clients.__struct_fields__)
"""


# The pjwd that is measured: this tree's, or for a while that of another commit (against.py).
THIS: Final = BIN / "pjwd"
_program = THIS


def program() -> Path:
    """Return the pjwd that is measured."""
    return _program


@contextmanager
def measured(other: Path) -> Iterator[None]:
    """Measure another pjwd, for as long as the context."""
    global _program  # noqa: PLW0603 - suites have no argument for it, and need none
    before, _program = _program, other
    try:
        yield
    finally:
        _program = before


@cache
def keys(other: Path) -> frozenset[str]:
    """Return the keys of the configuration of a pjwd, and those below [clients]."""
    python = other.with_name("python")
    return frozenset(subprocess.check_output([python, "-c", _KEYS], text=True).split())


def config() -> str:
    """Return a configuration for the pjwd that is measured, without bounds."""
    known = keys(_program)
    return CONFIG.format(
        uid_first=uid_range(),
        uid_count=UIDS,
        calls=CALLS if "calls_per_second" in known else "",
        port=PORT if "port" in known else "",
    )


@contextmanager
def directory() -> Iterator[Path]:
    """Give an empty directory on a disk, for as long as the context."""
    path = Path(tempfile.mkdtemp(prefix="pjw-bench-", dir=DIRECTORY))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def running(clients: Sequence[str] = ("alice",), more: str = "") -> Iterator[Service]:
    """Give a service of these clients, with *more* configuration; at the end all of it is removed."""
    with directory() as path:
        service = Service(path, list(clients), config() + more)
        service.pjwd = program()
        try:
            yield service.start()
            _stop_jobs(service)
            code = service.stop()
            if code or "Traceback" in service.log.read_text():
                raise RuntimeError(f"pjwd ended with {code}:\n{service.log.read_text()[-3000:]}")
        finally:
            try:
                if service.process is not None:
                    service.stop()
            finally:
                end_all(service.state)


def start(service: Service, arguments: Sequence[str]) -> int:
    """Start a job by its argv; return its id."""
    with service.stub() as stub:
        request = pb.StartRequest(argv=pb.Argv(arguments=arguments))
        return stub.Start(request, timeout=CALL_SECONDS).job.id


def finished_job(service: Service, command: str, size: int) -> int:
    """Run a job to its end; return its id. Raises when it failed, or has not written *size* bytes."""
    job_id = service.start_job(command)
    wait_for(lambda: service.job(job_id).HasField("end"), CALL_SECONDS)
    job = service.job(job_id)
    if (job.exit_code, job.output_bytes) != (0, size):
        raise RuntimeError(f"a job that should write {size} bytes ended so:\n{job}")
    return job_id


def stop(stub: JobWorkerServiceStub, job_id: int) -> pb.Job:
    """Kill a job; return it after its end. Calls for many at once may take long."""
    return stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=5 * CALL_SECONDS).job


def delete(service: Service, job_id: int) -> None:
    """Forget a job that has ended; its output leaves the page cache too."""
    with service.stub() as stub:
        stub.Delete(pb.DeleteRequest(id=job_id), timeout=CALL_SECONDS)


def jobs(stub: JobWorkerServiceStub, after: int = 0) -> Iterator[pb.Job]:
    """Yield every job with an id above *after*, page by page."""
    token = str(after) if after else ""
    while True:
        page = stub.List(pb.ListRequest(page_token=token), timeout=CALL_SECONDS)
        yield from page.jobs
        token = page.next_page_token
        if not token:
            return


def _stop_jobs(service: Service) -> None:
    with service.stub() as stub:
        for job in jobs(stub):
            if not job.HasField("end"):
                stop(stub, job.id)
