"""What a client may have at once."""

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest

from pjw.errors import LimitReachedError
from pjw.worker.quota import LOOK_BYTES, RunningJobs, StoredBytes, check_bytes
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


class State:
    """As much of a state directory as stored bytes use: what was written, and how often that was asked."""

    def __init__(self) -> None:
        self.stored = {"alice": 0, "bob": 0}
        self.looks = 0

    @property
    def store(self) -> "State":
        return self

    async def ended_bytes(self, client_name: str) -> tuple[int, int]:
        self.looks += 1
        await asyncio.sleep(0)
        return self.stored[client_name], sum(self.stored.values())


async def write(stored: StoredBytes, state: State, name: str, chunks: int, chunk_bytes: int) -> None:
    """One input, chunk by chunk; each is there when it was written."""
    for _ in range(chunks):
        async with stored.taken(name, chunk_bytes):
            await asyncio.sleep(0)
            state.stored[name] += chunk_bytes


def refusals(results: list[object]) -> int:
    """How many of these were refused; none failed otherwise."""
    assert all(result is None or isinstance(result, LimitReachedError) for result in results)
    return len([result for result in results if result is not None])


@pytest.mark.parametrize("quotas", [Quotas(stored_bytes_max=1000), Quotas(stored_bytes_total_max=1000)])
async def test_inputs_at_once_never_exceed_a_quota(quotas: Quotas) -> None:
    """However many a client, or all of them, write at the same time; each fills what is left."""
    state = State()
    stored = StoredBytes(cast("Any", state), {}, quotas)
    uploads: list[Awaitable[None]] = [
        write(stored, state, ("alice", "bob")[number % 2 if quotas.stored_bytes_total_max else 0], 100, 7)
        for number in range(20)
    ]
    assert refusals(await asyncio.gather(*uploads, return_exceptions=True)) == 20
    assert sum(state.stored.values()) == 1000 // 7 * 7


async def test_a_quota_costs_no_look_for_each_chunk() -> None:
    """One for LOOK_BYTES; none at all without a quota, and a new one after a change of the quota."""
    state = State()
    stored = StoredBytes(cast("Any", state), {}, Quotas(stored_bytes_max=10 * LOOK_BYTES))
    await write(stored, state, "alice", 128, LOOK_BYTES // 64)
    assert state.looks == 2
    stored.set_quotas(Quotas(stored_bytes_max=3 * LOOK_BYTES))
    await write(stored, state, "alice", 64, LOOK_BYTES // 64)
    with pytest.raises(LimitReachedError):
        await write(stored, state, "alice", 1, 1)
    stored.set_quotas(Quotas())
    looks = state.looks
    await write(stored, state, "alice", 100, LOOK_BYTES)
    assert state.looks == looks
