"""`pjw forward`: a port of this machine that leads to a port within a job, for each local connection."""

import asyncio
import contextlib
import socket
import struct
from argparse import Namespace
from collections.abc import AsyncGenerator
from typing import Final

from pjw.cli.connection import connect, connect_async, resolve_id
from pjw.cli.exits import say
from pjw.client.aio import AsyncClient
from pjw.errors import ConfigError, JobStateError, PjwError, describe_errno

# so that no other host of the network can connect
_HOST: Final = "127.0.0.1"
_READ_BYTES: Final = 64 * 1024


def forward(arguments: Namespace) -> int:
    """Serve the port until the job has ended, or a signal ends us."""
    local, remote = arguments.ports
    with connect(arguments) as client:
        job = client.get(resolve_id(client, arguments.job))
    if job.state.final:
        raise JobStateError(f"job {job.id} has ended")
    return asyncio.run(_serve(arguments, job.id, local, remote))


async def _serve(arguments: Namespace, job_id: int, local: int, remote: int) -> int:
    async with connect_async(arguments) as client:

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _carry(client, job_id, remote, reader, writer)

        try:
            server = await asyncio.start_server(connected, _HOST, local)
        except OSError as error:
            why = describe_errno(error.errno or 0)
            raise ConfigError(f"cannot listen on {_HOST}:{local}: {why}", hint="give another port") from error
        async with server:
            host, port = server.sockets[0].getsockname()[:2]
            print(f"{host}:{port} leads to port {remote} of job {job_id}", flush=True)
            await client.wait(job_id)
        say(f"job {job_id} has ended")
    return 0


async def _carry(
    client: AsyncClient, job_id: int, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Carry one connection to the job. Report one that cannot be made; the others go on."""
    try:
        async with contextlib.aclosing(client.connect(job_id, port, _pieces(reader))) as answers:
            async for data in answers:
                writer.write(data)
                await writer.drain()
    except PjwError as error:
        say(str(error))
        # the local peer sees a reset, and no orderly end (SO_LINGER in socket(7))
        ours = writer.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    except ConnectionError:
        pass  # the local peer has gone
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _pieces(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_READ_BYTES):
            yield data
