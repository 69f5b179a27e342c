"""The worker's end of the launcher's socket: which replies it takes."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from pjw.errors import LauncherGoneError
from pjw.launcher import protocol
from pjw.launcher.protocol import Adopt, Adopted, Ended, Launched
from pjw.model import Usage
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.launcher_process import LauncherProcess

DEADLINE_SECONDS: Final = 10
ENDED: Final = Ended(known=True, usage=Usage(1, 2, 3, 4, 5), removed=True)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[LauncherClient, socket.socket]]:
    """A client, and the launcher's end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ready = protocol.Ready("", "", 1)
    client = LauncherClient(LauncherProcess(ours, -1, ready, -1))
    with theirs:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                yield client, theirs
        finally:
            client.close()


def say(launcher: socket.socket, seq: int, reply: protocol.Reply) -> None:
    """Reply, with a descriptor where one belongs to it."""
    fds = [launcher.fileno()] if isinstance(reply, Adopted | Launched) else []
    socket.send_fds(launcher, [protocol.encode(seq, reply)], fds)


async def test_an_end_that_comes_with_the_answer() -> None:
    """Both are read before whoever asked goes on; the end is not lost."""
    async with connected() as (client, launcher):
        asked = asyncio.ensure_future(client.request_adopt(7))
        await asyncio.sleep(0)
        assert protocol.decode_request(launcher.recv(1000)) == (1, Adopt(7))
        say(launcher, 1, Adopted(alive=True, known=True))
        say(launcher, 1, ENDED)
        init = await asked
        assert init is not None
        os.close(init.pidfd)
        assert await init.ended == ENDED


@pytest.mark.parametrize("seq", [1, 2])
async def test_an_end_that_cannot_be(seq: int) -> None:
    """Of what does not run, or twice: such a launcher is broken, and nothing is asked of it any more."""
    async with connected() as (client, launcher):
        asked = asyncio.ensure_future(client.request_adopt(7))
        await asyncio.sleep(0)
        say(launcher, 1, Adopted(alive=True, known=True))
        init = await asked
        assert init is not None
        os.close(init.pidfd)
        say(launcher, 1, ENDED)
        assert await init.ended == ENDED
        say(launcher, seq, ENDED)
        await client.gone.wait()
        with pytest.raises(LauncherGoneError):
            await client.request_adopt(8)


async def test_a_launcher_that_goes_before_the_end() -> None:
    """Whoever waits for the end is not left waiting."""
    async with connected() as (client, launcher):
        asked = asyncio.ensure_future(client.request_adopt(7))
        await asyncio.sleep(0)
        say(launcher, 1, Adopted(alive=True, known=True))
        init = await asked
        assert init is not None
        os.close(init.pidfd)
        launcher.close()
        await asyncio.wait({init.ended})
        assert init.ended.cancelled()
