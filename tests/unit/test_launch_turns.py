"""Whose launch goes on: so many of a client, and another's is not behind them."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from pjw.worker import launch_turns
from pjw.worker.launch_turns import (
    AT_ONCE_ALONE,
    AT_ONCE_WITH_OTHERS,
    RECENT_SECONDS,
    LaunchTurns,
)
from tests.support.seen import texts_kept_by


async def test_a_client_has_so_many_at_a_time_in_order() -> None:
    """Each that is over lets the one go on that has waited longest; it may have failed, or be cancelled."""
    now = 0.0
    turns, begun, over = LaunchTurns(lambda: now), list[int](), [asyncio.Event() for _ in range(10)]

    async def launch(number: int) -> None:
        async with turns.turn("alice"):
            begun.append(number)
            await over[number].wait()
            if number == 1:
                raise OSError("told")

    tasks = [asyncio.create_task(launch(number)) for number in range(10)]
    await settled()
    assert begun == list(range(AT_ONCE_ALONE))
    over[0].set()
    over[1].set()
    tasks[2].cancel()
    # one that waits
    tasks[AT_ONCE_ALONE].cancel()
    await settled()
    assert begun == [number for number in range(AT_ONCE_ALONE + 4) if number != AT_ONCE_ALONE]
    for event in over:
        event.set()
    with pytest.raises(OSError, match="told"):
        await tasks[1]
    await asyncio.wait(tasks)
    now += RECENT_SECONDS + 0.1
    await forgotten(turns)


async def test_another_is_not_behind_them() -> None:
    """S10: however many one client has waiting."""
    turns, over = LaunchTurns(), asyncio.Event()

    async def launch() -> None:
        async with turns.turn("alice"):
            await over.wait()

    tasks = [asyncio.create_task(launch()) for _ in range(100)]
    await settled()
    async with asyncio.timeout(1), turns.turn("bob"):
        over.set()
    await asyncio.wait(tasks)


async def test_beside_others_a_client_has_fewer_at_a_time() -> None:
    """Until nobody else has launched for a while; then as many as before go on."""
    now, begun = 0.0, list[int]()
    turns, over = LaunchTurns(lambda: now), [asyncio.Event() for _ in range(20)]

    async def launch(number: int) -> None:
        async with turns.turn("alice"):
            begun.append(number)
            await over[number].wait()

    async def end(number: int) -> int:
        """End one launch; how many are under way then."""
        over[number].set()
        await settled()
        return len(begun) - sum(event.is_set() for event in over)

    tasks = [asyncio.create_task(launch(number)) for number in range(20)]
    await settled()
    assert len(begun) == AT_ONCE_ALONE
    async with turns.turn("bob"):
        pass
    under_way = [await end(number) for number in range(AT_ONCE_ALONE)]
    assert under_way == [max(AT_ONCE_WITH_OTHERS, AT_ONCE_ALONE - number) for number in range(1, 5)]
    assert begun == list(range(len(begun)))
    now += RECENT_SECONDS + 0.1
    assert await end(AT_ONCE_ALONE) == AT_ONCE_ALONE
    for event in over:
        event.set()
    await asyncio.wait(tasks)
    now += RECENT_SECONDS + 0.1
    await forgotten(turns)


async def test_a_launch_that_takes_long_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a disk, say. But a client never has more at a time than one that is alone."""
    monkeypatch.setattr(launch_turns, "SLOW_SECONDS", 0.01)
    now = 0.0
    turns, begun, over = LaunchTurns(lambda: now), asyncio.Queue[int](), asyncio.Event()

    async def launch(number: int) -> None:
        async with turns.turn("alice"):
            begun.put_nowait(number)
            await over.wait()

    async with turns.turn("bob"):
        pass
    tasks = [asyncio.create_task(launch(number)) for number in range(AT_ONCE_ALONE + 2)]
    async with asyncio.timeout(1):
        assert [await begun.get() for _ in range(AT_ONCE_ALONE)] == list(range(AT_ONCE_ALONE))
    # the timers of all of them are over
    await asyncio.sleep(0.02)
    assert begun.empty()
    over.set()
    await asyncio.wait(tasks)
    now += RECENT_SECONDS + 0.1
    await forgotten(turns)


async def forgotten(turns: LaunchTurns) -> None:
    """Nothing is kept of a client that has not launched for a while, once another one has some at a time."""
    async with AsyncExitStack() as stack:
        for _ in range(AT_ONCE_WITH_OTHERS + 1):
            await stack.enter_async_context(turns.turn("carol"))
    assert "carol" in texts_kept_by(turns)
    assert "alice" not in texts_kept_by(turns)


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)
