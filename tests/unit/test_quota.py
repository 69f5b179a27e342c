"""The limits of each client: how many are let in, when the next one is, and what is kept in memory."""

import asyncio
from contextlib import AsyncExitStack

import msgspec
import pytest

from pjw.errors import LimitReachedError
from pjw.server import quota as quota_module
from pjw.server.quota import FORGET_ABOVE, PAUSED_MAX, ClientLimits, Quota
from tests.support.seen import texts_kept_by

SECOND = 10**9


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.ns = 10**15

    def __call__(self) -> int:
        return self.ns


@pytest.fixture(autouse=True)
def prompt_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse at once; the tests of the pause set their own."""
    monkeypatch.setattr(quota_module, "REFUSALS_PER_SECOND", 1e9)


async def started(quota: Quota, client: str = "alice") -> bool:
    """Whether a start is let in."""
    try:
        async with quota.call(client, "Start", stream=False):
            return True
    except LimitReachedError:
        return False


async def starts(quota: Quota, client: str = "alice") -> int:
    """How many starts are let in before one is refused."""
    count = 0
    while await started(quota, client):
        count += 1
    return count


def kept(quota: Quota) -> int:
    """How many clients are remembered for anything."""
    return len([text for text in texts_kept_by(quota) if text == "alice" or text.startswith("client-")])


@pytest.mark.parametrize(
    ("rate", "burst"), [(0.001, 1), (0.1, 1), (0.3, 3), (1, 10), (3, 30), (7, 70), (99.9, 999)]
)
async def test_a_burst_is_exact_and_comes_back_at_the_rate(rate: float, burst: int) -> None:
    """As many starts as the burst, not one more; each time that one takes, one more; at most the burst."""
    clock = Clock()
    quota = Quota(ClientLimits(starts_per_second=rate), clock)
    assert await starts(quota) == burst
    step = round(SECOND / rate)
    clock.ns += step - 1
    assert await starts(quota) == 0
    clock.ns += 1
    assert await starts(quota) == 1
    clock.ns += min(burst, 5) * step
    assert await starts(quota) == min(burst, 5)
    clock.ns += 10 * burst * step
    assert await starts(quota) == burst


async def test_each_client_has_its_own_starts_and_only_starts_are_counted() -> None:
    """bob is not held up by alice, and a client that is over its rate may call everything else."""
    quota = Quota(ClientLimits(starts_per_second=0.2), Clock())
    assert [await starts(quota, client) for client in ("alice", "bob", "alice")] == [2, 2, 0]
    async with quota.call("alice", "Get", stream=False), quota.call("alice", "Logs", stream=True):
        assert not await started(quota)


@pytest.mark.parametrize(
    ("limits", "method", "words"),
    [
        (ClientLimits(calls_max=2), "Get", "a client may have 2 calls under way at once"),
        (ClientLimits(followers_max=2), "Logs", "a client may follow 2 jobs at once"),
        (ClientLimits(followers_total_max=2), "Logs", "2 jobs may be followed at once on this server"),
    ],
)
async def test_what_is_under_way_is_counted_and_counted_off(
    limits: ClientLimits, method: str, words: str
) -> None:
    """The third is refused in words with a hint that names the key; when one has ended it is let in."""
    quota = Quota(limits, Clock())
    [key] = [name for name in limits.__struct_fields__ if getattr(limits, name) == 2]

    def call() -> "object":
        return quota.call("alice", method, stream=method == "Logs")

    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(call())  # type: ignore[arg-type]
        with pytest.raises(LimitReachedError) as caught:
            await stack.enter_async_context(call())  # type: ignore[arg-type]
        assert str(caught.value) == words
        assert caught.value.hint == f"try again later, or ask the operator for more (clients.{key})"
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(call())  # type: ignore[arg-type]
    assert kept(quota) == 0


async def test_the_total_is_for_all_and_the_rest_for_each() -> None:
    """Only the followers of all clients count together."""
    quota = Quota(ClientLimits(calls_max=1, followers_max=1, followers_total_max=2), Clock())
    async with AsyncExitStack() as stack:
        for client in ("alice", "bob"):
            await stack.enter_async_context(quota.call(client, "Get", stream=False))
            await stack.enter_async_context(quota.call(client, "Logs", stream=True))
        await stack.enter_async_context(quota.call("carol", "Get", stream=False))
        with pytest.raises(LimitReachedError, match="on this server"):
            await stack.enter_async_context(quota.call("carol", "Logs", stream=True))


async def test_waits_are_counted_by_themselves() -> None:
    """`pjw logs` follows a job and waits for it: it takes one place of each."""
    quota = Quota(ClientLimits(followers_max=2, followers_total_max=3), Clock())
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(quota.call("alice", "Logs", stream=True))
            await stack.enter_async_context(quota.call("alice", "Wait", stream=False))
        for method, stream, own, all_clients in (
            ("Logs", True, "a client may follow 2 jobs", "3 jobs may be followed"),
            ("Wait", False, "a client may wait for 2 jobs", "3 jobs may be waited for"),
        ):
            with pytest.raises(LimitReachedError, match=own):
                await stack.enter_async_context(quota.call("alice", method, stream=stream))
            await stack.enter_async_context(quota.call("bob", method, stream=stream))
            with pytest.raises(LimitReachedError, match=all_clients):
                await stack.enter_async_context(quota.call("bob", method, stream=stream))
    assert kept(quota) == 0


async def test_nought_is_no_limit() -> None:
    """Every limit can be lifted."""
    none = ClientLimits(starts_per_second=0, calls_max=0, followers_max=0, followers_total_max=0)
    quota = Quota(none, Clock())
    async with AsyncExitStack() as stack:
        for _ in range(2000):
            await stack.enter_async_context(quota.call("alice", "Start", stream=False))
            await stack.enter_async_context(quota.call("alice", "Logs", stream=True))
    assert kept(quota) == 0


async def test_a_call_that_fails_or_is_cancelled_is_counted_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """However a call ends, its place is free again, and that of a refused one that waits to be told."""
    quota = Quota(ClientLimits(calls_max=1), Clock())
    with pytest.raises(ValueError, match="broken"):
        async with quota.call("alice", "Get", stream=False):
            raise ValueError("broken")
    waiting = asyncio.Event()

    async def hold() -> None:
        async with quota.call("alice", "Get", stream=False):
            waiting.set()
            await asyncio.Event().wait()

    first = asyncio.create_task(hold())
    await waiting.wait()
    monkeypatch.setattr(quota_module, "REFUSALS_PER_SECOND", 1e-3)
    second = asyncio.create_task(hold())
    await settled()
    for task in (second, first):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert kept(quota) == 0


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("count", [1, 10, 100])
async def test_refusals_come_at_their_rate_however_many_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The n-th that waits is told after n turns: one client gets so many a second, and no more."""
    monkeypatch.setattr(quota_module, "REFUSALS_PER_SECOND", 100)
    quota = Quota(ClientLimits(starts_per_second=0.1), Clock())
    assert await started(quota)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    assert not any(await asyncio.gather(*(started(quota) for _ in range(count))))
    assert loop.time() - begin >= count / 100
    assert await started(quota, "bob")


async def test_what_a_call_is_refused_inside_waits_for_its_turn_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client at its limit of running jobs is no cheaper to refuse; one that waits is no call under way."""
    monkeypatch.setattr(quota_module, "REFUSALS_PER_SECOND", 100)
    quota = Quota(ClientLimits(calls_max=1), Clock())

    async def refused() -> None:
        with pytest.raises(LimitReachedError, match="no more may run"):
            async with quota.call("alice", "Start", stream=False):
                raise LimitReachedError("no more may run")

    loop = asyncio.get_running_loop()
    begin = loop.time()
    tasks = [asyncio.create_task(refused()) for _ in range(20)]
    await settled()
    assert not any(task.done() for task in tasks)
    async with quota.call("alice", "Get", stream=False):
        pass
    await asyncio.gather(*tasks)
    assert loop.time() - begin >= 20 / 100


async def test_only_so_many_refusals_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client asks beyond them is refused at once, so that they cannot fill the memory."""
    monkeypatch.setattr(quota_module, "REFUSALS_PER_SECOND", 1e-3)
    quota = Quota(ClientLimits(starts_per_second=0.1), Clock())
    assert await started(quota)
    tasks = [asyncio.create_task(started(quota)) for _ in range(PAUSED_MAX)]
    await settled()
    assert not any(task.done() for task in tasks)
    async with asyncio.timeout(20):
        assert not await started(quota)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # there is room for others
    again = asyncio.create_task(started(quota))
    await settled()
    assert not again.done()
    again.cancel()


async def test_clients_that_rest_are_forgotten() -> None:
    """A hundred thousand clients in a row leave no more behind than those whose starts are not back yet."""
    clock = Clock()
    quota = Quota(ClientLimits(starts_per_second=10), clock)
    for number in range(100_000):
        assert await started(quota, f"client-{number}")
        clock.ns += SECOND // 1000
        if number % 97 == 0:
            # a start is back after 0.1 s, in which 100 others come
            assert kept(quota) <= 2 * 100 + FORGET_ABOVE
    assert await starts(quota, "client-99999") == 99


@pytest.mark.parametrize(
    "value",
    [
        {"starts_per_second": -1},
        {"starts_per_second": float("nan")},
        {"starts_per_second": float("inf")},
        {"calls_max": -1},
        {"followers_max": 1.5},
        {"followers_total_max": True},
        {"nosuch": 1},
    ],
    ids=str,
)
def test_a_limit_that_cannot_be_is_refused(value: dict[str, object]) -> None:
    """Negative, endless, no number, no such key."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(value, ClientLimits)
