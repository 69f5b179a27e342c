"""How many descriptors are left for a start: exact, whatever has taken the others."""

import gc
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pjw.errors import LimitReachedError
from pjw.worker.host import SPARE_DESCRIPTORS, Descriptors


@pytest.fixture
def limit() -> Iterator[int]:
    """A limit of descriptors that is not far, given back after the test."""
    # sockets of earlier tests would otherwise be collected, and so closed, in the midst of a count
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    lower = highest + 3 * SPARE_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_all(stack: ExitStack) -> list[int]:
    """Open sockets and files in turn until the kernel gives no more; the stack closes them."""
    taken: list[int] = []
    while True:
        try:
            if len(taken) % 2:
                descriptor = os.open("/dev/null", os.O_RDONLY)
            else:
                descriptor = socket.socket(socket.AF_INET).detach()
        except OSError:
            return taken
        stack.callback(os.close, descriptor)
        taken.append(descriptor)


@pytest.mark.parametrize("where", ["the first", "the last", "every other"])
def test_what_is_left_is_counted_with_sockets_open(limit: int, where: str) -> None:
    """As many as a start needs will do, wherever they are in the table; one fewer is refused."""
    descriptors = Descriptors()
    descriptors.require()
    with ExitStack() as stack:
        taken = take_all(stack)
        assert taken[-1] == limit - 1
        with pytest.raises(LimitReachedError, match="cannot start a job: "):
            descriptors.require()
        places = {
            "the first": taken[:SPARE_DESCRIPTORS],
            "the last": taken[-SPARE_DESCRIPTORS:],
            "every other": taken[: 2 * SPARE_DESCRIPTORS : 2],
        }[where]
        stack.pop_all()
        for descriptor in set(taken) - set(places):
            stack.callback(os.close, descriptor)
        for descriptor in places[1:]:
            os.close(descriptor)
        with pytest.raises(LimitReachedError):
            descriptors.require()
        os.close(places[0])
        descriptors.require()
    # nothing of a look stays open
    with ExitStack() as stack:
        assert take_all(stack) == taken


def test_a_look_opens_nothing_while_there_is_plenty(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start would pay for each descriptor that it opens to see whether it can."""
    descriptors = Descriptors()

    def opens(*_: object) -> int:
        raise AssertionError("a descriptor was opened")

    monkeypatch.setattr(os, "dup", opens)
    monkeypatch.setattr(os, "open", opens)
    descriptors.require()


def test_another_limit_is_noticed(limit: int) -> None:
    """An operator may lower it while pjwd runs (prlimit)."""
    descriptors = Descriptors()
    descriptors.require()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (SPARE_DESCRIPTORS - 1, hard))
    with pytest.raises(LimitReachedError):
        descriptors.require()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    descriptors.require()
