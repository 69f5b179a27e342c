"""Moves bytes between two connected sockets until both have ended, within the kernel."""

import asyncio
import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

# The most bytes that wait in one direction; a pipe holds less where its user has many pipes.
_PIPE_BYTES: Final = 1 << 19
# two pipes, in addition to both sockets
DESCRIPTORS: Final = 4
# One connection moves so many pieces before others have their turn.
_AT_ONCE: Final = 8


async def relay(one: socket.socket, other: socket.socket) -> None:
    """Move the bytes of each socket to the other; pass an end on; an error ends both directions.

    Raises OSError.
    """
    ways = [asyncio.ensure_future(_move(one, other)), asyncio.ensure_future(_move(other, one))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
    for way in ways:
        if not way.cancelled():
            # a bug, or the error of a socket
            way.result()


async def _move(source: socket.socket, sink: socket.socket) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with suppress(OSError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        loop = asyncio.get_running_loop()
        for number in itertools.count(1):
            try:
                come = os.splice(source.fileno(), writer, _PIPE_BYTES, flags=os.SPLICE_F_MOVE)
            except BlockingIOError:
                await _ready(loop.add_reader, loop.remove_reader, source)
                continue
            if not come:
                break
            while come:
                try:
                    come -= os.splice(reader, sink.fileno(), come, flags=os.SPLICE_F_MOVE)
                except BlockingIOError:
                    await _ready(loop.add_writer, loop.remove_writer, sink)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
    finally:
        os.close(reader)
        os.close(writer)


async def _ready(
    watch: Callable[..., None], unwatch: Callable[[socket.socket], object], each: socket.socket
) -> None:
    """Wait until a socket is ready, as *watch* tells."""
    ready = asyncio.Event()
    watch(each, ready.set)
    try:
        await ready.wait()
    finally:
        unwatch(each)
