"""A thread for calls that may wait for a disk: in order, one at a time, and nothing is lost or held."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from pjw.worker.one_thread import OneThread


@pytest.fixture
def thread() -> Iterator[OneThread]:
    """A thread of the test's own."""
    thread = OneThread("pjw-test")
    yield thread
    thread.close()
    assert "pjw-test" not in {each.name for each in threading.enumerate()}


async def test_calls_are_made_one_after_the_other_in_their_order(thread: OneThread) -> None:
    """Each gets what its own gives or raises; the event loop goes on meanwhile."""
    made: list[int] = []
    go = threading.Event()

    def call(number: int) -> str:
        if number == 0:
            assert go.wait(30)
        made.append(number)
        if number == 3:
            raise ValueError(number)
        return f"{threading.current_thread().name} {number}"

    calls = [asyncio.ensure_future(thread.run(call, number)) for number in range(6)]
    await asyncio.sleep(0.01)
    assert not any(each.done() for each in calls)
    go.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert made == list(range(6))
    assert isinstance(results[3], ValueError)
    assert [each for each in results if isinstance(each, str)] == [f"pjw-test {n}" for n in (0, 1, 2, 4, 5)]


async def test_nothing_is_done_for_who_has_gone(thread: OneThread) -> None:
    """A call whose turn has not come when its caller is cancelled; one that has begun goes on."""
    begun, go = threading.Event(), threading.Event()
    made: list[str] = []

    def first() -> None:
        begun.set()
        assert go.wait(30)
        made.append("first")

    calls = [
        asyncio.ensure_future(thread.run(first)),
        asyncio.ensure_future(thread.run(made.append, "second")),
    ]
    await asyncio.to_thread(begun.wait, 30)
    for each in calls:
        each.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    go.set()
    await thread.run(made.append, "third")
    assert made == ["first", "third"]


async def test_a_close_waits_for_what_was_asked_for() -> None:
    """And a thread that was never used is none."""
    thread, made = OneThread("pjw-test"), list[int]()
    unused = OneThread("pjw-unused")
    calls = [asyncio.ensure_future(thread.run(made.append, number)) for number in range(100)]
    await asyncio.sleep(0)
    thread.close()
    assert made == list(range(100))
    await asyncio.gather(*calls)
    unused.close()
