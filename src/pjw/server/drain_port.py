"""The socket in the state directory where `pjwd drain` and `pjwd resume`, as root, tell pjwd of their mark.

The mark is a file of root's, so a machine stays drained over a restart and a reboot. pjwd looks at it at its
start, while it is root, and hears of each change here: `drain` or `resume`. It answers `drained N` or
`resumed N`, with the number of jobs that have not ended. A program that stays connected then hears
`empty` when a drained machine has no job any more, or `resumed N`.
"""

import asyncio
import logging
import os
import socket
from contextlib import suppress
from typing import Final

from pjw.errors import LauncherGoneError
from pjw.server.operator_socket import accept, listen
from pjw.worker import Worker
from pjw.worker.state_dir import DRAINED, StateDir
from pjw.worker.tasks import Background, Flag, first_of

SOCKET_NAME: Final = "drain.sock"
DRAIN: Final = b"drain"
RESUME: Final = b"resume"
EMPTY: Final = b"empty"
MESSAGE_MAX: Final = 64

log: Final = logging.getLogger(__name__)


class DrainPort:
    """Answers each `pjwd drain` and `pjwd resume`, also several at once."""

    def __init__(self, state: StateDir) -> None:
        """Listen, and look at the mark; as root, and before privilege is dropped. Raises KernelError."""
        self._background: Final = Background()
        self._listener: Final = listen(state.path, SOCKET_NAME)
        # after that: who marks it from now on tells us
        self.was_drained: Final = is_drained(state.path)

    async def close(self) -> None:
        """Stop listening, and hang up."""
        self._listener.close()
        await self._background.close()

    async def serve(self, worker: Worker) -> None:
        """Answer each connection, until cancelled."""
        while True:
            connection = await accept(self._listener, "pjwd drain")
            self._background.spawn(self._answer(connection, worker))

    async def _answer(self, connection: socket.socket, worker: Worker) -> None:
        # the other side may have hung up
        with connection, suppress(OSError, LauncherGoneError):
            asked = await asyncio.get_running_loop().sock_recv(connection, MESSAGE_MAX)
            if asked not in (DRAIN, RESUME):
                return
            drained = asked == DRAIN
            if drained != worker.drained:
                log.warning("the operator has %s this machine", "drained" if drained else "resumed")
            worker.admission.set(drained=drained)
            await _say(connection, _shown(worker))
            if drained:
                said = await _emptied_or_changed(worker, connection)
                await _say(connection, said)


def is_drained(state_dir: str) -> bool:
    """Whether a state directory has the mark."""
    return os.path.lexists(os.path.join(state_dir, DRAINED))


async def _emptied_or_changed(worker: Worker, connection: socket.socket) -> bytes:
    """Return the answer for waiting callers: the machine is empty, or it is drained no more."""
    changed = Flag()
    worker.admission.changed.append(changed.set)
    ends = [
        asyncio.ensure_future(each)
        for each in (
            worker.emptied(),
            first_of(changed),
            # ends when the other side hangs up
            asyncio.get_running_loop().sock_recv(connection, 1),
        )
    ]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if changed.is_set():
            return _shown(worker)
        for each in ends:
            if each.done():
                each.result()
        return EMPTY
    finally:
        worker.admission.changed.remove(changed.set)
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


def _shown(worker: Worker) -> bytes:
    return b"%s %d" % (b"drained" if worker.drained else b"resumed", worker.live_count)


async def _say(connection: socket.socket, message: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, message)
