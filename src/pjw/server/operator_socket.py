"""Sockets in the state directory, where root's own commands speak with the pjwd that serves it."""

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from pjw.errors import KernelError

# nothing tells us when a descriptor for a connection is free again
_RETRY_SECONDS: Final = 1

log: Final = logging.getLogger(__name__)


def listen(state_dir: str, name: str) -> socket.socket:
    """Make a socket that only root may connect to, before privilege is dropped. Raises KernelError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        with _by_descriptor(state_dir, name) as path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
            # before it listens: only root may connect
            os.chmod(path, 0o600)
            listener.listen()
    except OSError as error:
        listener.close()
        raise KernelError("listen on", os.path.join(state_dir, name), error.errno or 0) from error
    return listener


async def accept(listener: socket.socket, command: str) -> socket.socket:
    """Take the next connection of one of root's commands, named so in the log of what fails."""
    while True:
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            log.error("cannot take a connection of `%s`: %s", command, os.strerror(error.errno or 0))
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            connection.setblocking(False)
            return connection


@contextmanager
def connection(state_dir: str, name: str) -> Iterator[socket.socket | None]:
    """Connect to the pjwd that serves a state directory; None when no process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            with _by_descriptor(state_dir, name) as path:
                server.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            yield None
            return
        yield server


@contextmanager
def _by_descriptor(state_dir: str, name: str) -> Iterator[str]:
    # a socket's path has at most 107 bytes; a state directory's may have more
    directory = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)
