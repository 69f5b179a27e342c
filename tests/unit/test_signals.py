"""Signals for the server's loop: none is lost, however many come and whichever thread they reach."""

import asyncio
import signal
import threading
from pathlib import Path

import pytest

from pjw.server.serve import Signals
from tests.support.service import wait_for

SECONDS = 30


def test_none_is_lost_in_a_storm(capfd: pytest.CaptureFixture[str]) -> None:
    """More signals than a socket holds while the loop is busy: the last, of another kind, is acted on."""

    async def storm() -> int:
        asked, counted = asyncio.Event(), 0

        def count() -> None:
            nonlocal counted
            counted += 1

        with Signals() as signals:
            signals.handle(signal.SIGUSR1, count)
            signals.handle(signal.SIGUSR2, asked.set)
            for _ in range(10_000):
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
            async with asyncio.timeout(SECONDS):
                await asked.wait()
        return counted

    assert asyncio.run(storm()) > 0
    assert capfd.readouterr() == ("", "")


def test_a_signal_wakes_an_idle_loop() -> None:
    """Also when the kernel gives it to another thread, as it may when the main thread waits."""
    waits = Path(f"/proc/self/task/{threading.get_native_id()}/wchan")

    def send() -> None:
        # do_epoll_wait or ep_poll, and not the futex of Python's own lock
        wait_for(lambda: "ep" in waits.read_text())
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    async def wait() -> None:
        asked, thread = asyncio.Event(), threading.Thread(target=send)
        with Signals() as signals:
            signals.handle(signal.SIGUSR1, asked.set)
            thread.start()
            async with asyncio.timeout(SECONDS):
                await asked.wait()
        thread.join()

    asyncio.run(wait())


def test_what_was_before_comes_back() -> None:
    """Handlers and the descriptor that wakes: no signal reaches a loop that is gone."""
    before = signal.getsignal(signal.SIGUSR1)

    async def handle() -> None:
        with Signals() as signals:
            signals.handle(signal.SIGUSR1, lambda: None)
            signals.handle(signal.SIGUSR1, lambda: None)
            assert signal.getsignal(signal.SIGUSR1) is not before

    asyncio.run(handle())
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1
