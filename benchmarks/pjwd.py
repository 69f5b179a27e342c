"""A real pjwd for a benchmark: defaults, but no limit on what one client may ask for."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from tests.service import CALL_SECONDS, Service, wait_for
from tests.soak.__main__ import end_all
from tests.worker_harness import UIDS, uid_range

# what a job writes must be on a disk, and /tmp may be none
DIRECTORY: Final = "/var/tmp"  # noqa: S108
CONFIG: Final = """
[clients]
starts_per_second = 0
calls_max = 0
followers_max = 0
running_max = 0
[job_users]
uid_first = {uid_first}
uid_count = {uid_count}
"""


@contextmanager
def running() -> Iterator[Service]:
    """A service of one client, alice; at the end, or after a failure, it and its jobs are gone."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-bench-", dir=DIRECTORY))
    config = CONFIG.format(uid_first=uid_range(), uid_count=UIDS)
    service = Service(directory, ["alice"], config)
    try:
        yield service.start()
        stop_jobs(service)
        code = service.stop()
        if code or "Traceback" in service.log.read_text():
            raise RuntimeError(f"pjwd ended with {code}:\n{service.log.read_text()[-3000:]}")
    finally:
        if service.process is not None:
            service.stop()
        end_all(service)
        shutil.rmtree(directory)


def stop_jobs(service: Service) -> None:
    """Kill every job that runs."""
    with service.stub() as stub:
        for job in stub.List(pb.ListRequest()).jobs:
            if not job.HasField("end"):
                stub.Stop(pb.StopRequest(id=job.id, grace=Duration()), timeout=CALL_SECONDS)


def finished_job(service: Service, command: str, size: int) -> int:
    """Run a job to its end; its id. Raises when it failed, or has not written *size* bytes."""
    job_id = service.start_job(command)
    wait_for(lambda: service.job(job_id).HasField("end"), CALL_SECONDS)
    job = service.job(job_id)
    if (job.exit_code, job.output_bytes) != (0, size):
        raise RuntimeError(f"a job that should write {size} bytes ended so:\n{job}")
    return job_id


def delete(service: Service, job_id: int) -> None:
    """Forget a job that has ended; its output leaves the page cache too."""
    with service.stub() as stub:
        stub.Delete(pb.DeleteRequest(id=job_id), timeout=CALL_SECONDS)
