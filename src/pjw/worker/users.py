"""The user that each client's jobs run as: its own, for ever."""

from typing import Final

from pjw.errors import LimitReachedError
from pjw.worker.store import JobStore


class Users:
    """User ids out of the operator's range, by the numbers that the table gives to clients."""

    def __init__(self, store: JobStore, first: int, count: int) -> None:
        self._store: Final = store
        self._first: Final = first
        self._count: Final = count
        self._known: Final[dict[str, int]] = {}

    async def of(self, client_name: str) -> int:
        """Return the user id of a client. Raises LimitReachedError when all are taken."""
        if client_name not in self._known:
            number = await self._store.client_number(client_name)
            if number >= self._count:
                raise LimitReachedError(
                    f"all {self._count} user ids for clients are taken",
                    hint="the operator can configure a larger range",
                )
            self._known[client_name] = self._first + number
        return self._known[client_name]
