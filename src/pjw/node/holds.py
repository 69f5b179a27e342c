"""Holds: the places on this node that Slurm has given to the gateway. hold/hold.c is what runs in each.

A hold names itself and its job; we say which job it gets, and when it is done. The engine at the
gateway decides all of that. Here is decided one thing: when a place ends, its job is stopped.
"""

import asyncio
import logging
import os
import re
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import KernelError
from pjw.worker.tasks import Background

_MESSAGE_BYTES_MAX: Final = 2048
_HELLO: Final = re.compile(
    r"hold 1 ([1-9][0-9]{0,18}) ([0-9]{1,12}) ([!-~]{1,255}) ([!-~]{1,255}) ([!-~]{1,255})"
)
# struct ucred of unix(7): pid, user, group
_PEER: Final = struct.Struct("iII")
# of several pjwd on one host; nothing in it can be read by others
_OURS: Final = "/run/pjw"
# nothing tells us when a descriptor for a connection is free again
_RETRY_SECONDS: Final = 1

log: Final = logging.getLogger(__name__)


def listen_for_holds(path: str, uid: int) -> socket.socket:
    """Return a socket to which only root and user *uid* may connect. As root. Raises KernelError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        directory = os.path.dirname(path)
        os.makedirs(directory, exist_ok=True)
        if directory == _OURS:
            # pjwd may have made it, with a umask that leaves others nothing
            mode = stat.S_IMODE(os.stat(directory).st_mode)
            os.chmod(directory, mode | stat.S_IXGRP | stat.S_IXOTH)  # noqa: S103  to pass, not to read
        with suppress(FileNotFoundError):
            os.unlink(path)
        made.bind(path)
        # before it listens
        os.chmod(path, 0o600)
        os.chown(path, uid, -1)
        made.listen(1024)
    except OSError as error:
        made.close()
        raise KernelError("listen on", path, error.errno or 0) from error
    return made


@dataclass(slots=True)
class _Hold:
    told: pb.Hold
    # when it began, by the loop's clock
    begun: float
    connection: socket.socket
    # Slurm wants the place back
    is_ending: bool = False


class Holds:
    """The holds that are connected, by Slurm's names for them."""

    def __init__(self, listener: socket.socket, uid: int) -> None:
        self._listener: Final = listener
        self._uid: Final = uid
        self._background: Final = Background()
        self._holds: Final[dict[str, _Hold]] = {}
        # called with what the gateway is to hear
        self.say: Callable[[pb.SessionRequest], None] = lambda _: None
        # stops the job with a uuid, and waits for its end
        self.stop_job: Callable[[str], Awaitable[None]] = _stop_nothing

    async def serve(self) -> None:
        """Take holds for ever."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    log.error("cannot take a place of Slurm's: %s", os.strerror(error.errno or 0))
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                connection.setblocking(False)
                self._background.spawn(self._serve(connection))
        finally:
            await self._background.close()
            self._listener.close()

    # --- what the gateway says

    def announce(self) -> None:
        """Tell a new session of every hold."""
        now = asyncio.get_running_loop().time()
        for hold in self._holds.values():
            if not hold.is_ending:
                self._announce(hold, now)

    def _announce(self, hold: _Hold, now: float) -> None:
        hold.told.age_seconds = int(now - hold.begun)
        self.say(pb.SessionRequest(hold=hold.told))

    def give(self, number: str, uuid: str) -> bool:
        """Note in a hold which job it gets, before the job is claimed; whether the hold is there."""
        hold = self._holds.get(number)
        if hold is None or hold.is_ending:
            return False
        hold.told.job = uuid
        _send(hold.connection, f"job {uuid}")
        return True

    def release(self, number: str, refused: str) -> None:
        """Let a hold end: Slurm may have its place for others."""
        hold = self._holds.pop(number, None)
        if hold is not None:
            _send(hold.connection, f"refused {refused[:200]}" if refused else "done")

    # --- what a hold says

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if uid not in (0, self._uid):
                log.warning("user %d is refused at the socket for places of Slurm's", uid)
                _send(connection, "refused only root and the user of cluster.hold_user may hold a place")
                return
            hold = self._known(await _receive(connection), connection)
            if hold is None:
                _send(connection, "refused this pjwd does not understand its hold: are both of one version?")
                return
            while message := await _receive(connection):
                if message == "end":
                    self._background.spawn(self._end(hold))
            await self._gone(hold)

    def _known(self, hello: str, connection: socket.socket) -> _Hold | None:
        said = _HELLO.fullmatch(hello)
        if said is None:
            return None
        number, age, shape, uuid, job = said.groups()
        now = asyncio.get_running_loop().time()
        told = pb.Hold(id=number, shape=shape, uuid=uuid, job="" if job == "-" else job)
        hold = self._holds[number] = _Hold(told, now - int(age), connection)
        self._announce(hold, now)
        return hold

    async def _end(self, hold: _Hold) -> None:
        """Slurm wants the place back: its job ends first, so that nobody else gets the place before."""
        if hold.is_ending:
            return
        hold.is_ending = True
        self.say(pb.SessionRequest(hold_gone=pb.HoldGone(id=hold.told.id)))
        await self._stop_job(hold)
        _send(hold.connection, "done")

    async def _gone(self, hold: _Hold) -> None:
        """End a hold. Its place is another's now, so its job must not go on."""
        if self._holds.get(hold.told.id) is not hold:
            # it was released; or it has connected once more
            return
        del self._holds[hold.told.id]
        if not hold.is_ending:
            self.say(pb.SessionRequest(hold_gone=pb.HoldGone(id=hold.told.id)))
            await self._stop_job(hold)

    async def _stop_job(self, hold: _Hold) -> None:
        if hold.told.job:
            await self.stop_job(hold.told.job)


async def _stop_nothing(_: str) -> None:
    return


async def _receive(connection: socket.socket) -> str:
    """Return the next message; empty at the end."""
    try:
        data = await asyncio.get_running_loop().sock_recv(connection, _MESSAGE_BYTES_MAX)
    except OSError:
        return ""
    return data.decode("ascii", "replace")


def _send(connection: socket.socket, message: str) -> None:
    # a hold that has gone is noticed when we read
    with suppress(OSError):
        connection.send(message.encode("ascii", "replace"))
