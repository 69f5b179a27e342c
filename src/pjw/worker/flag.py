"""Flags that one coroutine waits for, several at a time.

A coroutine that waits for the first of several asyncio.Events needs a task for each event. From `set` to the
end of the wait it takes three turns of the event loop. On a busy loop each turn takes milliseconds.
"""

import asyncio
from typing import Final


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
