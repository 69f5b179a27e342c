"""Flags that one coroutine waits for, several at a time."""

import asyncio

import pytest

from pjw.worker.tasks import Flag, first_of
from tests.support.seen import kept_by


async def test_whichever_is_set_first() -> None:
    """Each of them ends the wait; one that is set already does so at once."""
    for number in range(3):
        flags = [Flag(), Flag(), Flag()]
        wait = asyncio.ensure_future(first_of(*flags))
        await asyncio.sleep(0)
        assert not wait.done()
        flags[number].set()
        await wait
        await first_of(*flags)


async def test_all_who_wait_are_woken() -> None:
    """And in the next turn of the loop: that is what it is for."""
    flag = Flag()
    waits = [asyncio.ensure_future(first_of(Flag(), flag)) for _ in range(3)]
    waits.append(asyncio.ensure_future(flag.wait()))
    await asyncio.sleep(0)
    flag.set()
    await asyncio.sleep(0)
    assert all(wait.done() for wait in waits)


async def test_what_was_taken_back() -> None:
    """Those who waited before go on; the next one waits."""
    flag = Flag()
    before = asyncio.ensure_future(flag.wait())
    await asyncio.sleep(0)
    flag.set()
    flag.clear()
    await before
    assert not flag.is_set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await flag.wait()


async def test_two_that_are_set_at_once() -> None:
    """One wait, one end."""
    first, second = Flag(), Flag()
    wait = asyncio.ensure_future(first_of(first, second))
    await asyncio.sleep(0)
    first.set()
    second.set()
    await wait


async def test_a_wait_that_was_cancelled_is_forgotten() -> None:
    """A flag that lives as long as pjwd keeps nothing of those who wait for it no more."""
    flag = Flag()
    wait = asyncio.ensure_future(flag.wait())
    await asyncio.sleep(0)
    wait.cancel()
    await asyncio.wait({wait})
    assert not any(isinstance(each, asyncio.Future) for each in kept_by(flag))
    flag.set()
