"""Tasks that nobody waits for: held until they end, and told of when they fail."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

from pjw.errors import LauncherGoneError

log: Final = logging.getLogger(__name__)


class Background:
    """The background tasks of one worker."""

    def __init__(self) -> None:
        self._tasks: Final[set[asyncio.Task[None]]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run in the background."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    async def close(self) -> None:
        """Cancel all, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LauncherGoneError):
            log.error("a background task failed", exc_info=error)
