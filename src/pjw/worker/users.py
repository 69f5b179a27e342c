"""The user that each client's jobs run as: its own, for ever."""

from typing import Final

from pjw.errors import LimitReachedError
from pjw.worker.settings import WorkerSettings
from pjw.worker.store import JobStore


class Users:
    """User ids out of the operator's range, by the numbers that the table gives to clients."""

    def __init__(self, store: JobStore, settings: WorkerSettings) -> None:
        self._store: Final = store
        self._settings: Final = settings
        self._known: Final[dict[str, int]] = {}

    async def of(self, client_name: str) -> int:
        """The user id of a client. Raises LimitReachedError when all are taken."""
        if client_name not in self._known:
            number = await self._store.client_number(client_name)
            if number >= self._settings.uid_count:
                raise LimitReachedError(
                    f"all {self._settings.uid_count} user ids for clients are taken",
                    hint="the operator can configure a larger range",
                )
            self._known[client_name] = self._settings.uid_first + number
        return self._known[client_name]
