"""A pjwd for a benchmark: as it is installed, with the defaults, but for the limits of a client."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pjw.v1 import job_worker_pb2 as pb
from tests.service import Service, wait_for

# what would bound the benchmark itself
CONFIG: Final = """\
[clients]
starts_per_second = 0
calls_max = 0
followers_max = 0
followers_total_max = 0
running_max = 0
running_total_max = 0
"""


@contextmanager
def open_service() -> Iterator[Service]:
    """A service on a disk; at the end every job is stopped, and nothing is left."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-bench-", dir="/var/lib"))
    service = Service(directory, clients=["alice"], config=CONFIG)
    try:
        service.start()
        yield service
    finally:
        try:
            if service.process is not None:
                _stop_jobs(service)
                service.stop()
        finally:
            shutil.rmtree(directory)


def _stop_jobs(service: Service) -> None:
    with service.stub() as stub:
        token = ""
        while True:
            page = stub.List(pb.ListRequest(page_token=token))
            for job in page.jobs:
                if not job.HasField("end"):
                    request = pb.StopRequest(id=job.id)
                    request.grace.seconds = 0
                    stub.Stop(request)
            token = page.next_page_token
            if not token:
                break
    wait_for(lambda: not service.job_cgroups())


def cpu_seconds(*pids: int) -> float:
    """Processor time of these processes and of all their children that they have collected."""
    ticks = 0
    for pid in pids:
        # behind the name, which may hold anything: state is the first, utime to cstime are 12 to 15
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / 100
