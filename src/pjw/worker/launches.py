"""Launches under way: held until they end, and one for all who ask with the same request id."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from pjw.model import Job

# a client's name, and what it called its request
Request = tuple[str, str]


class Launches:
    """The launches of one worker."""

    def __init__(self) -> None:
        self._tasks: Final[set[asyncio.Task[Job]]] = set()
        self._requests: Final[dict[Request, asyncio.Task[Job]]] = {}

    def begin(
        self, launch: Callable[[], Coroutine[Any, Any, Job]], request: Request | None
    ) -> asyncio.Task[Job]:
        """Launch a job, or find the launch that the same request has begun."""
        if request is not None and request in self._requests:
            return self._requests[request]
        task = asyncio.ensure_future(launch())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if request is not None:
            self._requests[request] = task
            task.add_done_callback(partial(self._request_over, request))
        return task

    def _request_over(self, request: Request, task: asyncio.Task[Job]) -> None:
        del self._requests[request]
        # whoever asked may have gone, and then nobody looks at how it went
        if not task.cancelled():
            task.exception()

    async def over(self) -> None:
        """Wait until none is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
