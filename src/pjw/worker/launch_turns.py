"""Launches under way: so many of a client at a time, the others in turn.

The launcher takes requests as they come. So what one client has before another's start is a few launches,
however many starts it asks for at once (S10).
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

# Enough to keep launcher and processors busy: a launch is mostly the kernel's work, beside the next one.
AT_ONCE_OF_ONE: Final = 4


class _Line:
    """The starts of one client."""

    def __init__(self) -> None:
        self.free: Final = asyncio.Semaphore(AT_ONCE_OF_ONE)
        self.users = 0


class LaunchTurns:
    """Who may launch now."""

    def __init__(self) -> None:
        self._lines: Final[dict[str, _Line]] = {}

    def is_busy(self, client_name: str) -> bool:
        """Whether a client's next launch would have to wait for its turn."""
        line = self._lines.get(client_name)
        return line is not None and line.free.locked()

    @asynccontextmanager
    async def turn(self, client_name: str) -> AsyncGenerator[None, None]:
        """Wait for a client's turn, and have it for as long as the context lasts."""
        line = self._lines.setdefault(client_name, _Line())
        line.users += 1
        try:
            async with line.free:
                yield
        finally:
            line.users -= 1
            if not line.users:
                del self._lines[client_name]
