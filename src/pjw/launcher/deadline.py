"""Deadlines for calls that may block for ever: the launcher's only thread serves all jobs."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Never

# The launcher drops a line that stderr does not take in this time: a full pipe, a terminal stopped by Ctrl-S.
SAY_SECONDS: Final = 1.0


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Make a call that may block; return whether it came back in time.

    Only in the main thread, and not nested.
    """
    # flock(2), fcntl(2) and write(2) have no deadline; a signal handler that raises ends their wait
    former = signal.signal(signal.SIGALRM, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        call()
    except TimeoutError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return True


def say(text: str) -> None:
    """Write a line to stderr, unless stderr does not take it within SAY_SECONDS."""
    data = f"pjwd: launcher: {text}\n".encode(errors="backslashreplace")
    with suppress(OSError):
        within(SAY_SECONDS, lambda: os.write(2, data))


def _on_alarm(number: int, frame: object) -> Never:
    raise TimeoutError
