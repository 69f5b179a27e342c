"""The socket in the state directory where `pjwd backup`, as root, asks pjwd for a copy of its job table.

The answer is one message: `copied` with the descriptor of the copy, or `failed` with the reason. `pjwd
backup` hangs up when it has read the copy. Then pjwd frees the copy's space.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pjw.errors import PjwError
from pjw.server.operator_socket import accept, listen
from pjw.worker.settings import DiskMarks
from pjw.worker.state_dir import StateDir
from pjw.worker.table_copy import TableCopy

SOCKET_NAME: Final = "backup.sock"
COPIED: Final = b"copied"
FAILED: Final = b"failed "
MESSAGE_MAX: Final = 4096

log: Final = logging.getLogger(__name__)


class BackupPort:
    """Answers one backup after the other."""

    def __init__(self, state: StateDir) -> None:
        """Listen; as root, and before privilege is dropped. Raises KernelError."""
        self._state: Final = state
        self._copy: Final = TableCopy(state.path)
        try:
            self._listener: Final = listen(state.path, SOCKET_NAME)
        except BaseException:
            self._copy.close()
            raise

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        self._copy.close()

    async def serve(self, marks: Callable[[], DiskMarks]) -> None:
        """Answer each connection, until cancelled. A copy leaves as much of the disk free as *marks* say."""
        while True:
            with await accept(self._listener, "pjwd backup") as connection:
                await self._answer(connection, marks())

    async def _answer(self, connection: socket.socket, marks: DiskMarks) -> None:
        try:
            try:
                descriptor = await self._state.in_thread(self._copy.take, self._state.store, marks)
            except PjwError as error:
                log.error("cannot copy the job table for a backup: %s", error)
                message, descriptors = (
                    FAILED + str(error).encode(errors="replace")[: MESSAGE_MAX - len(FAILED)],
                    [],
                )
            else:
                message, descriptors = COPIED, [descriptor]
            # the other side may have hung up
            with suppress(OSError):
                socket.send_fds(connection, [message], descriptors)
                await asyncio.get_running_loop().sock_recv(connection, 1)
        finally:
            try:
                # to free hundreds of megabytes takes the kernel long
                await self._state.in_thread(self._copy.clear)
            except PjwError as error:
                log.error("%s", error)
