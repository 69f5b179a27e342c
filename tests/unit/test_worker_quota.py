"""What a client may have at once."""

import pytest

from pjw.errors import LimitReachedError
from pjw.worker.quota import RunningJobs, check_bytes
from pjw.worker.settings import Quotas


def test_each_client_has_its_own_number() -> None:
    """A client at its quota is refused in words, and another is not; an end makes room."""
    running = RunningJobs(Quotas(running_max=2))
    for name in ("alice", "alice", "bob"):
        running.take(name)
    with pytest.raises(LimitReachedError, match="2 jobs of alice are running, and no more may") as caught:
        running.take("alice")
    assert "clients.running_max" in (caught.value.hint or "")
    running.take("bob")
    running.give_back("alice")
    running.take("alice")


def test_a_total_is_for_all() -> None:
    """Whoever comes last is refused."""
    running = RunningJobs(Quotas(running_total_max=2))
    running.take("alice")
    running.take("bob")
    with pytest.raises(LimitReachedError, match="2 jobs are running on this server"):
        running.take("carol")
    running.give_back("alice")
    running.take("carol")


def test_jobs_that_run_already_are_counted() -> None:
    """After a restart with a lower quota they go on, and nothing is started until enough have ended."""
    running = RunningJobs(Quotas(running_max=1))
    running.adopt("alice")
    running.adopt("alice")
    running.give_back("alice")
    with pytest.raises(LimitReachedError):
        running.take("alice")
    running.give_back("alice")
    running.take("alice")


def test_a_client_without_jobs_costs_nothing() -> None:
    """Nothing is kept of who has none running, however many there have been."""
    running = RunningJobs(Quotas())
    for number in range(1000):
        running.take(f"client-{number}")
        running.give_back(f"client-{number}")
    assert not running._running


def test_zero_is_no_limit() -> None:
    """The library limits nobody unless it is told to."""
    running = RunningJobs(Quotas())
    for _ in range(1000):
        running.take("alice")
    check_bytes(Quotas(), "alice", 2**60, 2**60)


def test_stored_bytes() -> None:
    """At the quota, not only beyond it; one's own and everybody's are told apart."""
    check_bytes(Quotas(stored_bytes_max=10, stored_bytes_total_max=20), "alice", 9, 19)
    with pytest.raises(LimitReachedError, match="alice have 10 bytes of output and input, and at most 10"):
        check_bytes(Quotas(stored_bytes_max=10), "alice", 10, 10)
    with pytest.raises(LimitReachedError, match="the output and input of all jobs are 20 bytes"):
        check_bytes(Quotas(stored_bytes_max=10, stored_bytes_total_max=20), "alice", 0, 20)
