"""What benchmarks rest on: that the kernel's accounts have all of the processor time of lives."""

from pathlib import Path

from benchmarks import accounts
from tests.support.service import Service, wait_for

BUSY = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"


def cgroups_of(service: Service) -> list[str]:
    """Where the server and its launcher are."""
    return [Path(f"/proc/{pid}/cgroup").read_text() for pid in (service.pid, service.launcher_pid())]


def test_all_processor_time_is_in_an_account(service: Service) -> None:
    """What a job used is the jobs', and nothing is counted twice; afterwards all is where it was."""
    before = cgroups_of(service)
    with accounts.opened(service) as account:
        assert cgroups_of(service) != before
        start = account.now()
        job_id = service.start_job(BUSY)
        wait_for(lambda: service.job(job_id).HasField("end"))
        # the end is recorded before the last of the time is used: init still has to exit
        wait_for(lambda: f"job-{job_id}" not in [path.name for path in service.job_cgroups()])
        used = account.now() - start
    own = service.job(job_id).usage.cpu_usage_usec / 1e6
    # an init that was made ahead had used some of its own before
    assert 0.99 * own <= used.jobs < 1.5 * own
    assert min(used.server, used.launcher, used.spawning) > 0
    assert used.total == sum(used.parts().values())
    assert cgroups_of(service) == before
