"""Whose launch goes on: so many of a client, and another's is not behind them."""

import asyncio

import pytest

from pjw.worker.launch_turns import AT_ONCE_OF_ONE, LaunchTurns


async def test_a_client_has_so_many_at_a_time_in_order() -> None:
    """Each that is over lets the one go on that has waited longest; it may have failed, or be cancelled."""
    turns, begun, over = LaunchTurns(), list[int](), [asyncio.Event() for _ in range(10)]

    async def launch(number: int) -> None:
        async with turns.turn("alice"):
            begun.append(number)
            await over[number].wait()
            if number == 1:
                raise OSError("told")

    tasks = [asyncio.create_task(launch(number)) for number in range(10)]
    await settled()
    assert begun == list(range(AT_ONCE_OF_ONE))
    over[0].set()
    over[1].set()
    tasks[2].cancel()
    # one that waits
    tasks[AT_ONCE_OF_ONE].cancel()
    await settled()
    assert begun == [number for number in range(AT_ONCE_OF_ONE + 4) if number != AT_ONCE_OF_ONE]
    for event in over:
        event.set()
    with pytest.raises(OSError, match="told"):
        await tasks[1]
    await asyncio.wait(tasks)
    assert turns._lines == {}


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


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)
