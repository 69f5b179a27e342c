"""Several pjwd on one host: whose user ids their jobs have."""

import os
import select
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.support.scene import config_of
from tests.support.service import Service
from tests.support.worker_harness import uid_range


@pytest.fixture
def two(make_service: Callable[..., Service]) -> tuple[Service, Service]:
    """Two services of the defaults, of which neither has run."""
    return make_service(), make_service()


def user_of_a_job(service: Service) -> int:
    """The user id that a job has."""
    return int(service.ok("run", "id -u"))


def test_defaults_share_no_user_id(two: tuple[Service, Service]) -> None:
    """Neither jobs nor servers, and after a restart the same ones."""
    one, _ = two
    users = [user_of_a_job(service.start()) for service in two]
    servers = [os.stat(f"/proc/{service.pid}").st_uid for service in two]
    assert len({*users, *servers}) == 4
    one.stop(signal.SIGKILL)
    one.start()
    assert (user_of_a_job(one), os.stat(f"/proc/{one.pid}").st_uid) == (users[0], servers[0])


def test_an_overlap_is_refused_until_the_other_has_ended(two: tuple[Service, Service]) -> None:
    """In words that name the other one; when that was killed, its range is free."""
    one, other = two
    first = uid_range()
    one.config, other.config = config_of(first), config_of(first + 10)
    one.start()
    refused = subprocess.run(other.command(), capture_output=True, text=True, timeout=60, check=False)
    assert refused.stderr == (
        f"pjwd: error: cannot have user ids {first + 10} to {first + 1009} for jobs: another pjwd on this"
        f" host, with the state directory {one.state}, has {first} to {first + 999}\n"
        "hint: give one of the two another range: uid_first and uid_count below [job_users]\n"
    )
    launcher = os.pidfd_open(one.launcher_pid())
    signal.pidfd_send_signal(launcher, signal.SIGKILL)
    assert select.select([launcher], [], [], 30)[0]
    os.close(launcher)
    one.stop(signal.SIGKILL)
    assert user_of_a_job(other.start()) == first + 10
