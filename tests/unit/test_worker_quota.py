"""What a client may have at once."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pjw.errors import InvalidJobError, LimitReachedError
from pjw.model import TOO_DEEP, Limits, Share, Sums
from pjw.worker.disk import TreeUse
from pjw.worker.host import resources
from pjw.worker.quota import LOOK_BYTES, RunningJobs, StoredBytes, check_bytes, most_of_one_job
from pjw.worker.settings import Quotas, Shares, WorkerSettings
from tests.support.seen import texts_kept_by

LIMITS = Limits()
GIB = 1024**3


def test_each_client_has_its_own_number() -> None:
    """A client at its quota is refused in words, and another is not; an end makes room."""
    running = RunningJobs(WorkerSettings(quotas=Quotas(running_max=2)))
    for name in ("alice", "alice", "bob"):
        running.take(name, LIMITS)
    with pytest.raises(LimitReachedError, match="2 jobs of alice are running, and no more may") as caught:
        running.take("alice", LIMITS)
    assert "clients.running_max" in (caught.value.hint or "")
    running.take("bob", LIMITS)
    running.give_back("alice", LIMITS)
    running.take("alice", LIMITS)


def test_a_total_is_for_all() -> None:
    """Whoever comes last is refused."""
    running = RunningJobs(WorkerSettings(quotas=Quotas(running_total_max=2)))
    running.take("alice", LIMITS)
    running.take("bob", LIMITS)
    with pytest.raises(LimitReachedError, match="2 jobs are running on this server"):
        running.take("carol", LIMITS)
    running.give_back("alice", LIMITS)
    running.take("carol", LIMITS)


def test_jobs_that_run_already_are_counted() -> None:
    """After a restart with a lower quota they go on, and nothing is started until enough have ended."""
    running = RunningJobs(WorkerSettings(quotas=Quotas(running_max=1)))
    running.adopt("alice", LIMITS)
    running.adopt("alice", LIMITS)
    running.give_back("alice", LIMITS)
    with pytest.raises(LimitReachedError):
        running.take("alice", LIMITS)
    running.give_back("alice", LIMITS)
    running.take("alice", LIMITS)


def test_a_client_without_jobs_costs_nothing() -> None:
    """Nothing is kept of who has none running, however many there have been."""
    running = RunningJobs(WorkerSettings(quotas=Quotas()))
    for number in range(1000):
        running.take(f"client-{number}", LIMITS)
        running.give_back(f"client-{number}", LIMITS)
    assert not [text for text in texts_kept_by(running) if text.startswith("client-")]


def of_memory(memory_max_bytes: int) -> Limits:
    """The limits of a job with so much memory."""
    return Limits(memory_max_bytes=memory_max_bytes)


def overcommitted(factor: float, sums: Sums = Sums(memory_max_bytes=4 * GIB)) -> RunningJobs:  # noqa: B008  frozen
    """With a sum for all, and half of that for alice."""
    alice = Share(sums=Sums(memory_max_bytes=sums.memory_max_bytes // 2))
    return RunningJobs(
        WorkerSettings(sums=sums, memory_overcommit=factor, shares=Shares(by_name={"alice": alice}))
    )


def test_memory_is_promised_up_to_a_factor_of_the_sum() -> None:
    """A start that does not fit is refused, without a word of what others have; an end makes room."""
    running = overcommitted(1.5)
    for _ in range(6):
        running.take("bob", of_memory(GIB))
    with pytest.raises(LimitReachedError) as caught:
        running.take("carol", of_memory(2 * 1024**2))
    assert str(caught.value) == (
        "cannot start the job with a memory limit of 2M (2097152 bytes): this server has no room for that now"
    )
    assert caught.value.limit == "memory_overcommit"
    running.give_back("bob", of_memory(GIB))
    running.take("carol", of_memory(GIB))


def test_a_client_s_own_sum_of_memory_is_multiplied_too() -> None:
    """Though there is room for others."""
    running = overcommitted(1)
    running.take("alice", of_memory(GIB))
    with pytest.raises(LimitReachedError, match=r"jobs of alice have 1G \(1073741824 bytes\) of the 2G "):
        running.take("alice", of_memory(GIB + 1))
    running.take("bob", of_memory(2 * GIB))
    running.take("alice", of_memory(GIB))
    with pytest.raises(LimitReachedError, match="this server has no room"):
        running.take("bob", of_memory(GIB))


def test_what_never_fits_is_another_error() -> None:
    """To wait for the end of a job would be of no use."""
    running = overcommitted(1)
    with pytest.raises(InvalidJobError, match=r"all jobs of alice together may have 2G \(2147483648 bytes\)"):
        running.take("alice", of_memory(2 * GIB + 1))
    with pytest.raises(InvalidJobError, match="with no memory limit: all jobs of alice"):
        running.take("alice", of_memory(0))
    assert running.of("alice") == (0, 0)


def test_without_a_limit_a_job_may_have_all_memory() -> None:
    """It is promised that; without a sum what the host has is what can be promised."""
    running = overcommitted(1)
    running.take("bob", of_memory(0))
    assert running.of("bob") == (1, 4 * GIB)
    with pytest.raises(LimitReachedError):
        running.take("bob", LIMITS)
    running.give_back("bob", of_memory(0))
    assert running.of("bob") == (0, 0)
    assert overcommitted(2, Sums()).memory_max("bob") == (0, 2 * resources().memory_max_bytes)


def test_no_factor_promises_any_memory() -> None:
    """A thousand jobs with the default limit start on a small host. A reload sets a factor, or none."""
    running = overcommitted(0)
    for _ in range(1000):
        running.take("alice", LIMITS)
    running.reconfigure(overcommitted(1).settings)
    with pytest.raises(LimitReachedError, match=r"have 500G \(536870912000 bytes\) of the 2G"):
        running.take("alice", LIMITS)


def test_one_job_has_no_more_than_all_of_its_client() -> None:
    """What a client is told of a job's limits is what a job can have: not a ceiling above that."""
    ceiling = Limits(memory_max_bytes=8 * GIB, pids_max=0, cpu_max_millicores=2000)
    sums = Sums(memory_max_bytes=4 * GIB, pids_max=100, cpu_max_millicores=8000)
    assert most_of_one_job(ceiling, sums, 2 * GIB) == replace(
        ceiling, memory_max_bytes=2 * GIB, pids_max=100, cpu_max_millicores=2000
    )
    assert most_of_one_job(ceiling, Sums(), 0) == ceiling


def test_adopted_jobs_are_promised_their_memory() -> None:
    """After a restart what runs counts, though it is more than may be."""
    running = overcommitted(1)
    running.adopt("bob", of_memory(8 * GIB))
    with pytest.raises(LimitReachedError):
        running.take("carol", LIMITS)


def test_zero_is_no_limit() -> None:
    """The library limits nobody unless it is told to."""
    running = RunningJobs(WorkerSettings(quotas=Quotas()))
    for _ in range(1000):
        running.take("alice", LIMITS)
    check_bytes(Quotas(), "alice", 2**60, 2**60)


def test_stored_bytes() -> None:
    """At the quota, not only beyond it; one's own and everybody's are told apart."""
    check_bytes(Quotas(stored_bytes_max=10, stored_bytes_total_max=20), "alice", 9, 19)
    with pytest.raises(
        LimitReachedError,
        match=r"alice have 10B \(10 bytes\) of output, artifacts, input, scratch, workspaces and images,",
    ):
        check_bytes(Quotas(stored_bytes_max=10), "alice", 10, 10)
    with pytest.raises(
        LimitReachedError,
        match="this server has no room for more output, artifacts, input, scratch, workspaces and images",
    ):
        check_bytes(Quotas(stored_bytes_max=10, stored_bytes_total_max=20), "alice", 0, 20)


async def test_what_nobody_can_count_is_in_no_other_s_way() -> None:
    """A tree that is too deep is too much for its client, and not for the sum of all."""
    live = {1: SimpleNamespace(job=SimpleNamespace(id=1, client_name="alice"))}
    quotas = Quotas(stored_bytes_max=100, stored_bytes_total_max=1000)
    scratch = {1: TreeUse(TOO_DEEP, TOO_DEEP)}
    stored = StoredBytes(cast("Any", State()), cast("Any", live), scratch, quotas)
    await stored.check("bob")
    with pytest.raises(LimitReachedError, match="the jobs of alice have"):
        await stored.check("alice")


class State:
    """As much of a state directory as stored bytes use: what was written, and how often that was asked."""

    def __init__(self) -> None:
        self.stored = {"alice": 0, "bob": 0}
        self.looks = 0

    @property
    def store(self) -> "State":
        return self

    def output_size(self, _: object) -> int:
        return 0

    artifacts_size = input_size = output_size

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
    stored = StoredBytes(cast("Any", state), {}, {}, quotas)
    uploads: list[Awaitable[None]] = [
        write(stored, state, ("alice", "bob")[number % 2 if quotas.stored_bytes_total_max else 0], 100, 7)
        for number in range(20)
    ]
    assert refusals(await asyncio.gather(*uploads, return_exceptions=True)) == 20
    assert sum(state.stored.values()) == 1000 // 7 * 7


async def test_a_quota_costs_no_look_for_each_chunk() -> None:
    """One for LOOK_BYTES; none at all without a quota, and a new one after a change of the quota."""
    state = State()
    stored = StoredBytes(cast("Any", state), {}, {}, Quotas(stored_bytes_max=10 * LOOK_BYTES))
    await write(stored, state, "alice", 128, LOOK_BYTES // 64)
    assert state.looks == 2
    stored.reconfigure(WorkerSettings(quotas=Quotas(stored_bytes_max=3 * LOOK_BYTES)))
    await write(stored, state, "alice", 64, LOOK_BYTES // 64)
    with pytest.raises(LimitReachedError):
        await write(stored, state, "alice", 1, 1)
    stored.reconfigure(WorkerSettings())
    looks = state.looks
    await write(stored, state, "alice", 100, LOOK_BYTES)
    assert state.looks == looks
