"""What all jobs together may use of the host (S5): the sums of `[host]`, in the instance's own cgroup."""

import math
from collections.abc import Callable
from pathlib import Path

from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.host import default_sums
from tests.support.service import CALL_SECONDS, Service, instance_cgroups

MIB = 1024**2


def sums_of(service: Service) -> dict[str, float]:
    """The sums in the files of the instance's cgroup, of v1 or v2; processor time in thousandths."""
    found: dict[str, float] = {}
    for directory in instance_cgroups(service.state):
        for path in (path for path in directory.iterdir() if path.is_file()):
            match path.name:
                case "memory.max" | "memory.limit_in_bytes":
                    found["memory"] = _number(path)
                case "pids.max":
                    found["pids"] = _number(path)
                case "cpu.max":
                    quota, period = path.read_text().split()
                    found["cpu"] = math.inf if quota == "max" else int(quota) * 1000 / int(period)
                case "cpu.cfs_quota_us":
                    period = (directory / "cpu.cfs_period_us").read_text()
                    quota = path.read_text()
                    found["cpu"] = math.inf if int(quota) < 0 else int(quota) * 1000 / int(period)
    return found


def _number(path: Path) -> float:
    text = path.read_text().strip()
    # the kernel of v1 says "none" as the largest number of pages
    return math.inf if text == "max" or int(text) > 2**62 else int(text)


def test_jobs_have_a_part_of_the_host_by_default(make_service: Callable[..., Service]) -> None:
    """Four fifths of its memory and processes, nine tenths of its processors."""
    service = make_service().start()
    sums = default_sums()
    found = sums_of(service)
    assert found["pids"] == sums.pids_max
    assert 0 <= sums.memory_max_bytes - found["memory"] < MIB
    assert abs(found["cpu"] - sums.cpu_max_millicores) < 10


def test_the_operator_sets_them_and_a_restart_takes_them(make_service: Callable[..., Service]) -> None:
    """Also beside a job that runs; 0 is no sum."""
    service = make_service(config="[host]\nmemory_max_bytes = 268435456\npids_max = 100\n").start()
    job_id = service.start_job("exec sleep 1000")
    found = sums_of(service)
    assert (found["memory"], found["pids"]) == (256 * MIB, 100)
    service.stop()
    service.config = "[host]\nmemory_max_bytes = 0\npids_max = 0\ncpu_max_millicores = 0\n"
    service.start()
    assert sums_of(service) == {"memory": math.inf, "pids": math.inf, "cpu": math.inf}
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING


def test_the_sum_of_memory_holds_though_each_limit_is_higher(make_service: Callable[..., Service]) -> None:
    """The job that takes most is killed for it, and another client's job goes on."""
    service = make_service(config="[host]\nmemory_max_bytes = 134217728\n").start()
    small = service.start_job("exec sleep 1000", "bob")
    with service.stub() as stub:
        program = ["/usr/bin/python3", "-I", "-S", "-c", "x = b'x' * (300 << 20)"]
        limits = pb.Limits(memory_max_bytes=512 * MIB)
        request = pb.StartRequest(argv=pb.Argv(arguments=program), limits=limits)
        job = stub.Start(request, timeout=CALL_SECONDS).job
        job = stub.Wait(pb.WaitRequest(id=job.id), timeout=CALL_SECONDS).job
    assert job.signal == 9
    assert service.job(small, "bob").state == pb.JOB_STATE_RUNNING
