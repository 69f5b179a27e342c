"""Followers in a separate process, each over its own connection, as those of real clients are.

    python -m benchmarks.followers ADDRESS CERTS COUNT

It prints "ready" when all are connected; then it answers each line of stdin, an order as JSON, with a line.
"""

import asyncio
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from benchmarks.connect import secure_channel
from benchmarks.processes import cpu_seconds
from pjw.v1 import job_worker_pb2 as pb

if TYPE_CHECKING:
    Call = grpc.aio.UnaryStreamCall[Any, Any]

METHOD: Final = "/pjw.v1.JobWorkerService/"
# so that no handshake reaches its timeout behind the others
HANDSHAKES: Final = 16


@dataclass(frozen=True, slots=True)
class Order:
    """An order for all followers, or for those from *first* up to *last*."""

    # stream: to the end; hold: until *size* bytes, and then read nothing; lines: to the end, with times
    verb: str
    job_id: int = 0
    offset: int = 0
    # the number of bytes that must come from the offset on
    size: int = 0
    # a command that is started first, and followed instead of the job
    command: str = ""
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Streamed:
    """The seconds from the first call to the last end, and the processor time of both processes."""

    seconds: float
    server_cpu: float
    client_cpu: float
    job_id: int


class Followers:
    """The parent's end of such a process."""

    def __init__(self, process: "subprocess.Popen[str]", server_pid: int) -> None:
        self._process: Final = process
        self._server_pid: Final = server_pid

    def stream(self, job_id: int = 0, offset: int = 0, size: int = 0, command: str = "") -> Streamed:
        """Have all follow from an offset to the end; raises unless each gets *size* bytes."""
        before = cpu_seconds(self._server_pid), cpu_seconds(self._process.pid)
        answer = self._ask(Order("stream", job_id, offset, size, command))
        after = cpu_seconds(self._server_pid), cpu_seconds(self._process.pid)
        return Streamed(answer["seconds"], after[0] - before[0], after[1] - before[1], answer["job_id"])

    def hold(self, job_id: int, size: int = 0, *, first: int = 0, last: int | None = None) -> None:
        """Have some follow, read *size* bytes and then nothing more, until the process ends."""
        self._ask(Order("hold", job_id, 0, size, first=first, last=last))

    def lines(self, job_id: int, offset: int = 0) -> tuple[list[list[int]], float]:
        """Have all follow a job that writes stamps.

        Return the delay of each line for each, in ns, and the server's processor time for all, in seconds.
        """
        before = cpu_seconds(self._server_pid)
        late: list[list[int]] = self._ask(Order("lines", job_id, offset))["late"]
        return late, cpu_seconds(self._server_pid) - before

    def _ask(self, order: Order) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the followers failed at {order}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(address: str, server_pid: int, certs: Path, count: int) -> Iterator[Followers]:
    """Give *count* connected followers."""
    command = [sys.executable, "-m", "benchmarks.followers", address, str(certs), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the followers did not connect")
            yield Followers(process, server_pid)
        finally:
            process.kill()


def data_bytes(message: bytes) -> int:
    """Return the bytes of output in a serialized LogsResponse; decoding it would be another copy."""
    size, shift = 0, 0
    assert message[0] == 0x0A, message[:1]
    for at in range(1, 6):
        size |= (message[at] & 0x7F) << shift
        shift += 7
        if message[at] < 0x80:
            assert size == len(message) - at - 1
            return size
    raise AssertionError(message[:8])


def stamps(data: bytes, received_ns: int) -> Iterator[tuple[int, int]]:
    """When each line was written, and how late it came."""
    for line in data.splitlines():
        yield int(line), received_ns - int(line)


class _Process:
    def __init__(self, channels: list[grpc.aio.Channel]) -> None:
        self._channels: Final = channels
        self._held: Final[list[Call]] = []

    async def carry_out(self, order: Order) -> dict[str, Any]:
        began = time.perf_counter()
        job_id = await self._start(order.command) if order.command else order.job_id
        act = {"stream": self._stream, "hold": self._hold, "lines": self._lines}[order.verb]
        chosen = self._channels[order.first : order.last]
        request = pb.LogsRequest(id=job_id, offset=order.offset)
        late = await asyncio.gather(*(act(self._logs(channel, request), order) for channel in chosen))
        return {"seconds": time.perf_counter() - began, "job_id": job_id, "late": late}

    async def _start(self, command: str) -> int:
        start: Any = self._channels[0].unary_unary(
            f"{METHOD}Start", pb.StartRequest.SerializeToString, pb.StartResponse.FromString
        )
        answer: pb.StartResponse = await start(pb.StartRequest(command=command))
        return answer.job.id

    @staticmethod
    def _logs(channel: grpc.aio.Channel, request: pb.LogsRequest) -> "Call":
        # no deserializer: the bytes as they came
        call: Any = channel.unary_stream(f"{METHOD}Logs", pb.LogsRequest.SerializeToString)
        return call(request)  # type: ignore[no-any-return]

    @staticmethod
    async def _stream(call: "Call", order: Order) -> None:
        size = 0
        async for message in call:
            size += data_bytes(message)
        if size != order.size:
            raise AssertionError(f"{size} bytes came, and should be {order.size}")

    async def _hold(self, call: "Call", order: Order) -> None:
        self._held.append(call)
        await call.initial_metadata()
        size = 0
        while size < order.size:
            size += data_bytes(cast("bytes", await call.read()))

    @staticmethod
    async def _lines(call: "Call", _order: Order) -> list[int]:
        await call.initial_metadata()
        joined, late = time.monotonic_ns(), []
        async for message in call:
            received = time.monotonic_ns()
            data = pb.LogsResponse.FromString(message).data
            # lines from before the follower came are no measure
            late += [ns for written, ns in stamps(data, received) if written > joined]
        return late


async def _main(address: str, certs: Path, count: int) -> None:
    channels = [secure_channel(address, certs) for _ in range(count)]
    turns = asyncio.Semaphore(HANDSHAKES)

    async def connect(channel: grpc.aio.Channel) -> None:
        async with turns:
            await channel.channel_ready()

    await asyncio.gather(*map(connect, channels))
    print("ready", flush=True)
    process = _Process(channels)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await process.carry_out(Order(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
