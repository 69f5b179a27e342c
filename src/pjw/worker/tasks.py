"""Tasks and flags. A task without an awaiting caller is held until it ends, and never dies without a report.

A task of one job, or of one call, that fails is an error in the log, and the rest goes on. A task that
everything needs all along is another matter: without it pjwd would keep jobs for ever, or measure nothing,
and look well. When such a task dies by a bug, the program that runs it ends: `failed`.
"""

import asyncio
import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

from pjw.errors import LauncherGoneError, PjwError

log: Final = logging.getLogger(__name__)


class Background:
    """Background tasks, and whether one has died that pjw needs."""

    def __init__(self) -> None:
        self._tasks: Final[set[asyncio.Task[object]]] = set()
        # set when a task that is kept has died
        self.failed: Final = asyncio.Event()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run in the background; log an error."""
        self._hold(coroutine).add_done_callback(log_failure)

    def keep(self, what: str, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a task that all work needs; *what* names it. Any error but the launcher's end sets `failed`."""
        self._hold(coroutine).add_done_callback(partial(self._on_end, what))

    async def close(self) -> None:
        """Cancel all, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # for the callbacks of a task that had ended already: from Python 3.12 on gather leaves them waiting
        await asyncio.sleep(0)

    def _hold(self, coroutine: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_end(self, what: str, task: asyncio.Task[object]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LauncherGoneError):
            log.critical("%s: the task has died, and pjw cannot go on without it", what, exc_info=error)
            self.failed.set()


def log_failure(task: asyncio.Future[Any]) -> None:
    """Log the error that ended a task, unless it was cancelled, or is the launcher's end."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, LauncherGoneError):
        log.error("a background task failed", exc_info=error)


def log_bug(task: asyncio.Future[Any]) -> None:
    """Log an error only when it is a bug: other errors are reported elsewhere, or need no report."""
    if not task.cancelled() and not isinstance(task.exception(), PjwError):
        log_failure(task)


# Flags that one coroutine waits for, several at a time.
#
async def side_by_side(
    *coroutines: Coroutine[Any, Any, object], until: str = asyncio.FIRST_EXCEPTION
) -> None:
    """Run coroutines side by side until all are over or one fails; then end the others and wait for them.

    Raises the error of the first argument that failed. With *until* FIRST_COMPLETED it returns as soon as one
    is over. Not asyncio.TaskGroup: that wraps a single error in a group, and cannot end with the first
    result.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=until)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# A coroutine that waits for the first of several asyncio.Events needs a task for each. From `set` to the
# end of the wait it takes three turns of the event loop. On a busy loop each turn takes milliseconds.


class Flag:
    """Like asyncio.Event, for `first_of`."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: Final[set[asyncio.Future[None]]] = set()

    def is_set(self) -> bool:
        """Return whether it is set now."""
        return self._is_set

    def set(self) -> None:
        """Set the flag, and wake all coroutines that wait for it."""
        self._is_set = True
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def clear(self) -> None:
        """Take the flag back. A coroutine that `set` has woken goes on all the same."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until it is set."""
        await first_of(self)


async def first_of(*flags: Flag) -> None:
    """Wait until one of them is set."""
    if any(flag.is_set() for flag in flags):
        return
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        for flag in flags:
            flag._waiting.add(future)  # noqa: SLF001  of this module
        await future
    finally:
        for flag in flags:
            flag._waiting.discard(future)  # noqa: SLF001
