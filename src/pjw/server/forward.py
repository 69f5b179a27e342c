"""Carries one connection to a port within a job: bytes of a call into a socket, and back.

No more is held than a message in each direction.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from pjw.errors import InvalidJobError, JobStateError, describe_errno
from pjw.server.guard import Answer
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.tasks import side_by_side

_CHUNK_BYTES: Final = 64 * 1024
_MESSAGE_BYTES_MAX: Final = 1024**2


async def carry(
    connection: socket.socket,
    first: pb.ForwardRequest,
    requests: AsyncIterator[pb.ForwardRequest],
    answer: Answer[pb.ForwardResponse],
) -> None:
    """Return when both ends have no more to say. Raises JobStateError when the connection breaks."""
    await answer(pb.ForwardResponse())
    try:
        # of two errors that of the job's bytes counts
        await side_by_side(_receive(connection, answer), _send(connection, first, requests))
    except OSError as error:
        raise JobStateError(
            f"the connection to port {first.port} of job {first.id} broke: {describe_errno(error.errno or 0)}"
        ) from None


async def _send(
    connection: socket.socket, first: pb.ForwardRequest, requests: AsyncIterator[pb.ForwardRequest]
) -> None:
    loop = asyncio.get_running_loop()
    request: pb.ForwardRequest | None = first
    while request is not None:
        if len(request.data) > _MESSAGE_BYTES_MAX:
            raise InvalidJobError(f"a message of a connection has at most {_MESSAGE_BYTES_MAX} bytes")
        if request.data:
            await loop.sock_sendall(connection, request.data)
        if request.end:
            break
        request = await anext(requests, None)
    # it may be closed already
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


async def _receive(connection: socket.socket, answer: Answer[pb.ForwardResponse]) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(connection, _CHUNK_BYTES):
        await answer(pb.ForwardResponse(data=data))
    await answer(pb.ForwardResponse(end=True))
