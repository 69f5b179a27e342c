"""A call of WriteInput, message by message, over a raw stub: what a client may do, and what it should not."""

import hashlib
import queue
import random
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Self

import grpc

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import CALL_SECONDS

CHUNK_BYTES: Final = 256 * 1024


class Upload:
    """One call. `offset` is what the server had when it was opened."""

    def __init__(self, stub: JobWorkerServiceStub, job_id: int) -> None:
        self._requests: Final[queue.SimpleQueue[pb.WriteInputRequest | None]] = queue.SimpleQueue()
        self._requests.put(pb.WriteInputRequest(id=job_id))
        self._call: Final[Any] = stub.WriteInput(iter(self._requests.get, None), timeout=CALL_SECONDS)
        self.first: Final[pb.WriteInputResponse] = next(self._call)
        self.offset: Final = self.first.offset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Hang up, without a word."""
        self._call.cancel()
        self._requests.put(None)

    def ask(self, data: bytes, offset: int, *, end: bool = False) -> None:
        """Send, and do not wait."""
        self._requests.put(pb.WriteInputRequest(offset=offset, data=data, end=end))

    def answer(self) -> pb.WriteInputResponse:
        """The next answer."""
        answer: pb.WriteInputResponse = next(self._call)
        return answer

    def write(self, data: bytes, offset: int, *, end: bool = False) -> int:
        """Send, and wait for the answer: how many bytes there are."""
        self.ask(data, offset, end=end)
        return self.answer().offset

    def code(self) -> grpc.StatusCode:
        """How the call ends, without a word of ours."""
        return self.end()[0]

    def end(self) -> tuple[grpc.StatusCode, str]:
        """The same, and in which words."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""


def upload(stub: JobWorkerServiceStub, job_id: int, data: bytes, begin: int = 0) -> pb.WriteInputResponse:
    """Send *data* from *begin* on, to its end, as fast as it is taken; the last answer."""

    def requests() -> Iterator[pb.WriteInputRequest]:
        yield pb.WriteInputRequest(id=job_id)
        for start in range(begin, len(data), CHUNK_BYTES):
            yield pb.WriteInputRequest(offset=start, data=data[start : start + CHUNK_BYTES])
        yield pb.WriteInputRequest(offset=len(data), end=True)

    *_, last = stub.WriteInput(requests(), timeout=CALL_SECONDS)
    assert isinstance(last, pb.WriteInputResponse)
    return last


def send_files(stub: JobWorkerServiceStub, name: str, data: Iterable[bytes]) -> None:
    """An upload of files for a job or an image, of any bytes: pjw itself sends archives only."""

    def requests() -> Iterator[pb.WriteInputRequest]:
        yield pb.WriteInputRequest(upload=name)
        offset = 0
        for each in data:
            for start in range(0, len(each), CHUNK_BYTES):
                part = each[start : start + CHUNK_BYTES]
                yield pb.WriteInputRequest(offset=offset, data=part)
                offset += len(part)
        yield pb.WriteInputRequest(offset=offset, end=True)

    *_, last = stub.WriteInput(requests(), timeout=CALL_SECONDS)
    assert last.ended


def some_bytes(count: int) -> bytes:
    """The same ones each time, no two places alike."""
    return random.Random(count).randbytes(count)


def sha256_line(data: bytes) -> bytes:
    """What sha256sum says of it."""
    return f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
