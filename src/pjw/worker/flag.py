"""Flags that one coroutine waits for, several at a time.

asyncio.Event is for one: whoever waits for the first of several needs a task for each, and three turns of the
event loop from `set` to the end of the wait. While others keep the loop busy each turn takes milliseconds.
"""

import asyncio
from typing import Final


class Flag:
    """Like asyncio.Event, for `first_of`."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: Final[set[asyncio.Future[None]]] = set()

    def is_set(self) -> bool:
        """Whether it is set now."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._is_set = True
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def clear(self) -> None:
        """Take it back. Those who wait since before go on all the same."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until it is set."""
        await first_of(self)

    def _add(self, future: asyncio.Future[None]) -> None:
        self._waiting.add(future)

    def _remove(self, future: asyncio.Future[None]) -> None:
        self._waiting.discard(future)


async def first_of(*flags: Flag) -> None:
    """Wait until one of them is set."""
    if any(flag.is_set() for flag in flags):
        return
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        for flag in flags:
            flag._add(future)  # noqa: SLF001  of this module
        await future
    finally:
        for flag in flags:
            flag._remove(future)  # noqa: SLF001
