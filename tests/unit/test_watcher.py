"""What the launcher's one thread waits for: whoever is due is called, and nobody else."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pjw.launcher.processes import Watcher


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    """One of our own."""
    made = Watcher()
    yield made
    made.close()


@pytest.fixture
def readable() -> Iterator[Callable[[], int]]:
    """Make descriptors that can be read at once."""
    with ExitStack() as stack:

        def make() -> int:
            ours, theirs = os.pipe()
            for descriptor in (ours, theirs):
                stack.callback(os.close, descriptor)
            os.write(theirs, b"x")
            return ours

        yield make


def test_what_one_does_may_end_the_watch_of_another(watcher: Watcher, readable: Callable[[], int]) -> None:
    """Both are due in one turn, and whoever is called first takes the other's away."""
    called: list[int] = []
    pair = readable(), readable()

    def watch(one: int, other: int) -> None:
        def on_readable() -> None:
            called.append(one)
            watcher.unwatch(other)

        watcher.watch(one, on_readable)

    watch(*pair)
    watch(*reversed(pair))
    assert watcher.run_once(0)
    assert len(called) == 1


def test_another_takes_the_place(watcher: Watcher, readable: Callable[[], int]) -> None:
    """Of two who watch one descriptor the later one is called; also where one who is due put it there."""
    called: list[str] = []
    first, second = readable(), readable()
    watcher.watch(first, lambda: called.append("never"))

    def on_readable() -> None:
        called.append("first")
        watcher.watch(second, lambda: called.append("later"))

    watcher.watch(first, on_readable)
    watcher.watch(second, lambda: called.append("second"))
    watcher.run_once(0)
    assert called in (["first"], ["second", "first"])
    watcher.unwatch(first)
    called.clear()
    watcher.run_once(0)
    assert called == ["later"]


def test_a_number_that_was_closed_is_watched_again(watcher: Watcher) -> None:
    """The kernel gives it to the next file; whoever closed it may have forgotten to say so."""
    ours, theirs = os.pipe()
    watcher.watch(ours, lambda: None)
    os.close(ours)
    os.close(theirs)
    called: list[str] = []
    again, theirs = os.pipe()
    try:
        assert again == ours
        os.write(theirs, b"x")
        watcher.watch(again, lambda: called.append("again"))
        assert watcher.run_once(0)
        assert called == ["again"]
        watcher.unwatch(again)
        watcher.unwatch(again)
        assert not watcher.run_once(0)
    finally:
        os.close(again)
        os.close(theirs)


def test_many_at_once(watcher: Watcher, readable: Callable[[], int]) -> None:
    """All are called, however many are due."""
    called: set[int] = set()

    def watch(descriptor: int) -> None:
        def on_readable() -> None:
            called.add(descriptor)
            watcher.unwatch(descriptor)

        watcher.watch(descriptor, on_readable)

    descriptors = {readable() for _ in range(100)}
    for descriptor in descriptors:
        watch(descriptor)
    while watcher.run_once(0):
        pass
    assert called == descriptors
