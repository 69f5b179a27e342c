"""A bare grpc.aio server that streams from memory: the cost of grpcio itself for the messages of pjwd.

    python -m benchmarks.grpc_source CERTS SIZE

It has pjwd's TLS and server options, its method and its messages, but sends them ready-made: it reads, builds
and serializes nothing, and does not check the caller. LogsRequest.id 0 is like a silent job, without an end.
A negative id writes lines, as many as the request's offset, to all its followers. Get answers with a job of
that id and nothing more: the cost of a call that does nothing. WriteInput answers each message at once and
writes nothing: the cost of a message on an open stream.
"""

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pjw.certs.tls import require_tls13_environment

if __name__ == "__main__":
    # its settings must be there before grpc is imported
    require_tls13_environment()

import grpc

from pjw.rpc.status import ADMITTED_KEY
from pjw.server.connections import PortLimits
from pjw.server.serve import options_of
from pjw.server.service import SERVICE_NAME
from pjw.v1 import job_worker_pb2 as pb

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

MESSAGE_BYTES: Final = 256 * 1024
# together these messages are larger than any cache of the processor, as a file is
MESSAGES: Final = 256
# the time in which all followers of lines come, and the pause before each line
LINES_DELAY_SECONDS: Final = 6.0
LINE_PAUSE_SECONDS: Final = 0.4


@contextmanager
def running(certs: Path, size: int) -> Iterator[tuple[str, int]]:
    """Run the server as a separate process; give its address and its pid."""
    command = [sys.executable, "-m", "benchmarks.grpc_source", str(certs), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
        finally:
            process.terminate()


def _message(number: int) -> bytes:
    data = number.to_bytes(2, "little") + os.urandom(30)
    return pb.LogsResponse(data=data * (MESSAGE_BYTES // len(data))).SerializeToString()


class _Lines:
    """Serves the output of a job, as messages, to all its followers."""

    def __init__(self, count: int) -> None:
        self._count: Final = count
        self._messages: Final[list[bytes]] = []
        self._written = asyncio.Event()
        self._writer: Final = asyncio.create_task(self._write())

    async def _write(self) -> None:
        await asyncio.sleep(LINES_DELAY_SECONDS)
        for _ in range(self._count):
            await asyncio.sleep(LINE_PAUSE_SECONDS)
            line = b"%d\n" % time.monotonic_ns()
            self._messages.append(pb.LogsResponse(data=line).SerializeToString())
            written, self._written = self._written, asyncio.Event()
            written.set()

    async def follow(self, context: "Context") -> None:
        """Send each line."""
        for number in range(self._count):
            while len(self._messages) <= number:
                await self._written.wait()
            await context.write(self._messages[number])


async def _serve(certs: Path, size: int) -> None:
    messages = [_message(number) for number in range(MESSAGES)]
    lines: dict[int, _Lines] = {}

    async def logs(request: pb.LogsRequest, context: "Context") -> None:
        await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
        if not request.id:
            await asyncio.Event().wait()
        if request.id < 0:
            if request.id not in lines:
                lines[request.id] = _Lines(request.offset)
            await lines[request.id].follow(context)
            return
        left = size - request.offset
        for message in itertools.cycle(messages):
            if left < MESSAGE_BYTES:
                break
            await context.write(message)
            left -= MESSAGE_BYTES
        if left:
            await context.write(pb.LogsResponse(data=bytes(left)).SerializeToString())

    async def get(request: pb.GetRequest, context: "Context") -> bytes:
        return pb.GetResponse(job=pb.Job(id=request.id)).SerializeToString()

    async def write_input(requests: AsyncIterator[pb.WriteInputRequest], context: "Context") -> None:
        async for request in requests:
            await context.write(pb.WriteInputResponse(offset=request.offset).SerializeToString())

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Logs": grpc.unary_stream_rpc_method_handler(logs, request_deserializer=pb.LogsRequest.FromString),
        "Get": grpc.unary_unary_rpc_method_handler(get, request_deserializer=pb.GetRequest.FromString),
        "WriteInput": grpc.stream_stream_rpc_method_handler(
            write_input, request_deserializer=pb.WriteInputRequest.FromString
        ),
    }
    server = grpc.aio.server(options=options_of(PortLimits()))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    key, crt, ca = ((certs / name).read_bytes() for name in ("server.key", "server.crt", "ca.crt"))
    credentials = grpc.ssl_server_credentials([(key, crt)], ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
