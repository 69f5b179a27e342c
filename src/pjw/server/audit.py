"""The audit log: for each call its client, method, address, job, outcome and duration.

One line of JSON for each call. It never has a command, an environment, output, or the words of an error,
which may quote them: `CallRecord.line` lists the members, and nothing else is written.
"""

import asyncio
import json
import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Final, Protocol
from urllib.parse import unquote

from google.protobuf.message import Message

from pjw.errors import describe_errno
from pjw.model import Identity
from pjw.rpc.convert import logs_response_bytes
from pjw.rpc.status import status_of
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.egress import Connection

# Lines that wait for a disk that is full or slow, about 300 bytes each; later ones are lost, and counted.
QUEUE_MAX: Final = 10_000
# Nothing tells when space returns to a disk.
RETRY_SECONDS: Final = 1.0
# Seconds that the end of pjwd waits for a disk that does not answer.
CLOSE_SECONDS: Final = 5.0
# gRPC's name for the end of a call that its caller did not wait for
CANCELLED: Final = "CANCELLED"

# the methods that move bytes of jobs
_WITH_BYTES: Final = ("Logs", "WriteInput", "Forward")

log: Final = logging.getLogger(__name__)


class CallRecord:
    """The known facts of a call, from its beginning on."""

    __slots__ = (
        "_all_clients", "_began", "_element", "_peer", "_time", "bytes", "code", "error", "for_client",
        "identity", "job_id", "method",
    )  # fmt: skip

    def __init__(self, method: str, request: Message | None, peer: str) -> None:
        self.identity: Identity | None = None
        # the client that a gateway calls for
        self.for_client: str | None = None
        self.code = "OK"
        self.error: Exception | None = None
        self.bytes = 0
        self.method: Final = method
        self._time: Final = time.time()
        self._began: Final = time.monotonic()
        self._peer: Final = peer
        self.job_id: int | None = getattr(request, "id", None)
        self._element: Final = _element_of(request)
        self._all_clients: Final[bool] = getattr(request, "all_clients", False)

    def asked(self, request: Message | None) -> None:
        """Note the facts of one of a stream of requests: the first one's job id, the bytes of input."""
        if isinstance(request, pb.WriteInputRequest | pb.ForwardRequest):
            self.job_id = request.id if self.job_id is None else self.job_id
            self.bytes += len(request.data)

    def answered(self, answer: Message | bytes) -> None:
        """Note the facts of an answer: the id of a new job, the bytes of output."""
        if isinstance(answer, pb.StartResponse):
            self.job_id = answer.job.id
        elif isinstance(answer, pb.SubmitResponse):
            # of several the first one; the others follow it, but for those of an earlier request
            self.job_id = answer.jobs[0].id
        elif isinstance(answer, bytes):
            self.bytes += logs_response_bytes(answer)
        elif isinstance(answer, pb.LogsResponse | pb.ForwardResponse):
            self.bytes += len(answer.data)

    def failed(self, error: Exception | asyncio.CancelledError) -> None:
        """Note that the call ends with an error, or that its caller did not wait for its end."""
        if isinstance(error, asyncio.CancelledError):
            self.code = CANCELLED
            return
        self.code = status_of(error)[0].name
        self.error = error

    def seconds(self) -> float:
        """Return the seconds since the call began."""
        return time.monotonic() - self._began

    def line(self) -> bytes:
        """Return the call as a line, when it is over."""
        who = self.identity
        members: dict[str, object] = {
            "time": _time_text(self._time),
            "client": who.client_name if who else None,
            "serial": _serial(who.serial) if who else None,
            "method": self.method,
            "job_id": self.job_id,
            "all_clients": self._all_clients,
            "code": self.code,
            "peer": unquote(self._peer),  # gRPC escapes the brackets of an IPv6 address
            "duration_ms": round(self.seconds() * 1000, 3),
        }
        if self.for_client is not None:
            members["for_client"] = self.for_client
        if self._element is not None:
            members["element"] = self._element
        if self.method in _WITH_BYTES:
            members["bytes"] = self.bytes
        return json.dumps(members).encode() + b"\n"


def connection_line(connection: Connection) -> bytes:
    """Return a job's connection to a name on the network as a line, when it was made or refused."""
    members: dict[str, object] = {
        "time": _time_text(time.time()),
        "client": connection.client_name,
        "method": "Connection",
        "job_id": connection.job_id,
        "host": connection.host,
        "port": connection.port,
        "result": connection.result,
    }
    if connection.left_out:
        members["left_out"] = connection.left_out
    return json.dumps(members).encode() + b"\n"


def _time_text(seconds: float) -> str:
    shown = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return shown.removesuffix("+00:00") + "Z"


def _element_of(request: Message | None) -> int | None:
    """Return the element of an array that a call names; None where it names a job by its id alone."""
    if request is None or "element" not in request.DESCRIPTOR.fields_by_name:
        return None
    return request.element if request.HasField("element") else None  # type: ignore[attr-defined]


class CallObserver(Protocol):
    """Observes calls, on the event loop."""

    def call_began(self, record: CallRecord) -> None:
        """Note the beginning of a call; its caller is known, if the certificate names one."""

    def call_ended(self, record: CallRecord) -> None:
        """Note the end of a call; *record* knows how it ended."""


class AuditLog:
    """Appends lines to a file, in a thread of its own, so that a slow disk holds no event loop up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # the file for the next line and all later ones
        self._next: int | None = None
        self._changed: Final = threading.Condition()
        self._lines: Final[deque[bytes]] = deque()
        self._lost = 0
        self._closing = False
        # A daemon: a disk that never answers must not keep the process from ending.
        self._thread: Final = threading.Thread(target=self._run, name="pjw-audit", daemon=True)
        self._thread.start()

    def call_began(self, record: CallRecord) -> None:
        """Do nothing: the log writes a call when it is over."""

    def call_ended(self, record: CallRecord) -> None:
        """Have the call written."""
        self.append(record.line())

    def append(self, line: bytes) -> None:
        """Have a line written, as a whole and in its turn. Never waits."""
        with self._changed:
            if len(self._lines) < QUEUE_MAX:
                self._lines.append(line)
                self._changed.notify()
                return
            self._lost += 1
            if self._lost == 1:
                log.error("the audit log loses lines: %d wait to be written", QUEUE_MAX)

    def reopen(self, descriptor: int) -> None:
        """Write to another file from the next line on, and own its descriptor.

        Each line goes to one of the two files, as a whole.
        """
        with self._changed:
            replaced, self._next = self._next, descriptor
        if replaced is not None:
            os.close(replaced)

    def close(self) -> None:
        """Write the waiting lines, as far as the disk takes them, and close."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if unwritten := len(self._lines) + self._lost:
            log.error("the audit log ends without %d lines", unwritten)
        if not self._thread.is_alive():
            self._take_next()
            os.close(self._descriptor)

    def _run(self) -> None:
        failing = False
        while self._wait_for_line():
            self._take_next()
            fault = self._write(self._lines[0])
            if fault is None:
                self._lines.popleft()
                failing = self._is_behind(failing=failing)
                continue
            if not failing:
                # once, and not for each line: this log may be on the same disk
                log.error("cannot write the audit log: %s; calls go on", fault)
                failing = True
            with self._changed:
                if self._closing:
                    return
                self._changed.wait_for(lambda: self._closing, RETRY_SECONDS)

    def _take_next(self) -> None:
        with self._changed:
            if self._next is None:
                return
            old, self._descriptor, self._next = self._descriptor, self._next, None
        os.close(old)

    def _wait_for_line(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            return bool(self._lines)

    def _is_behind(self, *, failing: bool) -> bool:
        with self._changed:
            if self._lines or not (failing or self._lost):
                return failing
            log.error("the audit log is written again; %d lines were lost", self._lost)
            self._lost = 0
            return False

    def _write(self, line: bytes) -> str | None:
        """Append a line or nothing of it; why not."""
        try:
            written = os.write(self._descriptor, line)
            if written == len(line):
                return None
            # The disk was full in mid-line. Unless another process has cut the file meanwhile, take the half
            # back.
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if os.fstat(self._descriptor).st_size == end:
                os.ftruncate(self._descriptor, end - written)
        except OSError as error:
            return describe_errno(error.errno or 0)
        return "no space for a whole line"


def _serial(number: int) -> str:
    """Format a serial number as `openssl x509 -serial` does."""
    digits = f"{number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)
