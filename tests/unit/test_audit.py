"""The audit log: what a line has and never has, that lines stay whole, and what a broken disk does to it."""

import asyncio
import fcntl
import json
import logging
import os
import re
import resource
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from pjw import errors
from pjw.model import Identity
from pjw.rpc.status import TABLE
from pjw.server import audit as audit_module
from pjw.server.audit import AuditLog, CallRecord
from pjw.server.authz import Roles
from pjw.server.boot import open_audit_log
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.quota import ClientLimits
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import wait_for
from tests.unit.test_guard import Context, Methods, call

MEMBERS = ["time", "client", "serial", "method", "job_id", "all_clients", "code", "peer", "duration_ms"]


@contextmanager
def opened(path: Path) -> Iterator[AuditLog]:
    """A log in a file, closed at the end."""
    audit = AuditLog(open_audit_log(str(path)))
    try:
        yield audit
    finally:
        audit.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which must be whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def numbered(number: int) -> bytes:
    """A line that is told from others."""
    return json.dumps({"number": number, "filling": "x" * 80}).encode() + b"\n"


# --- the line


def test_a_call_that_is_asked_much_has_the_job_of_the_first_and_all_bytes() -> None:
    """Input is counted, and nothing of it is in the line."""
    record = CallRecord("WriteInput", None, "ipv4:127.0.0.1:1")
    record.asked(pb.WriteInputRequest(id=7, data=b"secret"))
    record.asked(pb.WriteInputRequest(data=b"secret"))
    record.asked(None)
    line = json.loads(record.line())
    assert (line["method"], line["job_id"], line["bytes"]) == ("WriteInput", 7, 12)
    assert b"secret" not in record.line()


def test_a_line_has_these_members_and_no_more() -> None:
    """All of them in this order, in UTC, with the serial number as openssl prints it."""
    request = pb.StopRequest(id=7, all_clients=True)
    record = CallRecord("Stop", request, "ipv6:%5B::1%5D:4711")
    record.identity = Identity("alice", 0xABC)
    line = json.loads(record.line())
    assert list(line) == MEMBERS
    began = datetime.fromisoformat(line.pop("time"))
    assert datetime.now(UTC) - began < timedelta(seconds=60)
    assert 0 <= line.pop("duration_ms") < 60_000
    assert line == {
        "client": "alice",
        "serial": "0ABC",
        "method": "Stop",
        "job_id": 7,
        "all_clients": True,
        "code": "OK",
        "peer": "ipv6:[::1]:4711",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", json.loads(record.line())["time"])


def test_an_answer_adds_the_new_jobs_id_and_the_bytes_sent() -> None:
    """Of what is answered, nothing else is noted."""
    start = CallRecord("Start", pb.StartRequest(command="secret"), "")
    start.answered(pb.StartResponse(job=pb.Job(id=12, command="secret")))
    assert json.loads(start.line())["job_id"] == 12
    logs = CallRecord("Logs", pb.LogsRequest(id=12), "")
    for data in (b"secret", b"x" * 1000):
        logs.answered(pb.LogsResponse(data=data).SerializeToString())
    assert list(json.loads(logs.line())) == [*MEMBERS, "bytes"]
    assert json.loads(logs.line())["bytes"] == 1006
    assert b"secret" not in start.line() + logs.line()


@pytest.mark.parametrize(
    "kind", [*(row.kind for row in TABLE), ValueError, asyncio.CancelledError], ids=lambda kind: kind.__name__
)
def test_every_error_is_a_code_without_its_words(tmp_path: Path, kind: type[BaseException]) -> None:
    """The name that the client is told, INTERNAL for a bug of ours, CANCELLED for who has gone."""
    made: dict[object, Callable[[], BaseException]] = {
        errors.JobNotFoundError: lambda: errors.JobNotFoundError(7),
        errors.SessionNotFoundError: lambda: errors.SessionNotFoundError(7, 1),
        errors.ImageNotFoundError: lambda: errors.ImageNotFoundError("secret"),
        errors.WorkspaceBusyError: lambda: errors.WorkspaceBusyError("secret", workspace="secret"),
        errors.LaunchError: lambda: errors.LaunchError("secret", 2),
        errors.WorkdirError: lambda: errors.WorkdirError("secret", 2),
        errors.KernelError: lambda: errors.KernelError("secret", "secret", 5),
        errors.LimitRangeError: lambda: errors.LimitRangeError("secret", limit="secret", value=1),
    }
    error = made.get(kind, lambda: kind("secret"))()
    path = tmp_path / "audit"
    record = CallRecord("Get", pb.GetRequest(id=7), "")
    assert isinstance(error, Exception | asyncio.CancelledError)
    record.failed(error)
    with opened(path) as audit:
        audit.call_ended(record)
    code = next((row.code for row in TABLE if row.kind is kind), grpc.StatusCode.INTERNAL).name
    assert [line["code"] for line in lines(path)] == ["CANCELLED" if kind is asyncio.CancelledError else code]
    assert b"secret" not in path.read_bytes()


# --- the guard


async def audited(tmp_path: Path, kind: str, context: Context, config: ServerConfig, **options: Any) -> Any:
    """The line of one call through the guard."""
    path = tmp_path / "audit"
    methods = Methods()
    methods.error = options.get("error")
    with opened(path) as audit:
        guard = Guard(config, audit)
        if options.get("drain"):
            guard.drain()
        await call(kind, methods, context, guard, options.get("data", b""))
    [line] = lines(path)
    return line


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.parametrize(
    ("context", "config", "options", "client", "code"),
    [
        (Context(), ServerConfig(), {}, "john", "OK"),
        (Context(pem=None), ServerConfig(), {}, None, "UNAUTHENTICATED"),
        (Context(pem=b"garbage"), ServerConfig(), {}, None, "UNAUTHENTICATED"),
        (Context(version=b"TLSv1.2"), ServerConfig(), {}, "john", "UNAUTHENTICATED"),
        (Context(), ServerConfig(), {"data": b"\xff"}, "john", "INVALID_ARGUMENT"),
        (Context(), ServerConfig(), {"drain": True}, "john", "UNAVAILABLE"),
        (Context(), ServerConfig(), {"error": errors.JobNotFoundError(7)}, "john", "NOT_FOUND"),
        (Context(), ServerConfig(), {"error": ValueError("secret")}, "john", "INTERNAL"),
    ],
    ids=["let in", "no certificate", "garbage", "TLS 1.2", "no message", "draining", "refused", "a bug"],
)
async def test_each_call_is_one_line(
    tmp_path: Path,
    kind: str,
    context: Context,
    config: ServerConfig,
    options: dict[str, Any],
    client: str | None,
    code: str,
) -> None:
    """Let in or refused, and wherever it was refused, with the client as far as it is known."""
    line = await audited(tmp_path, kind, context, config, **options)
    assert (line["client"], line["code"]) == (client, code)
    assert (line["method"], line["peer"]) == ("Get" if kind == "unary" else "Logs", "ipv4:127.0.0.1:1")
    assert (line["serial"] is None) == (client is None)
    if kind == "stream":
        # the method writes one byte before it does anything else
        assert line["bytes"] == (1 if code in ("OK", "NOT_FOUND", "INTERNAL") else 0)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_roles_and_their_denials_are_told(tmp_path: Path, kind: str) -> None:
    """all_clients stands in the line, whatever came of it."""
    asked = (
        pb.GetRequest(id=7, all_clients=True) if kind == "unary" else pb.LogsRequest(id=7, all_clients=True)
    )
    data = asked.SerializeToString()
    denied = await audited(tmp_path, kind, Context(), ServerConfig(), data=data)
    (tmp_path / "audit").unlink()
    viewer = ServerConfig(roles=Roles(viewers=frozenset({"john"})))
    allowed = await audited(tmp_path, kind, Context(), viewer, data=data)
    for line, code in ((denied, "PERMISSION_DENIED"), (allowed, "OK")):
        assert (line["job_id"], line["all_clients"], line["code"]) == (7, True, code)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_call_that_is_cancelled_and_one_over_its_limit(tmp_path: Path, kind: str) -> None:
    """Whose caller has gone is CANCELLED; who has too many under way is RESOURCE_EXHAUSTED."""
    path, methods = tmp_path / "audit", Methods()
    methods.wait = True
    with opened(path) as audit:
        guard = Guard(ServerConfig(clients=ClientLimits(calls_max=1, followers_max=1)), audit)
        first = asyncio.create_task(call(kind, methods, Context(), guard))
        await methods.running.wait()
        await call(kind, methods, Context(), guard)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
    assert [line["code"] for line in lines(path)] == ["RESOURCE_EXHAUSTED", "CANCELLED"]


async def test_a_reader_that_vanished_is_cancelled(tmp_path: Path) -> None:
    """gRPC's error of a write to nobody is no bug of ours; what was not taken is not counted."""
    context = Context()

    async def gone() -> None:
        raise grpc.aio.InternalError("failed")

    context.on_write = gone
    line = await audited(tmp_path, "stream", context, ServerConfig())
    assert (line["code"], line["bytes"]) == ("CANCELLED", 0)


# --- the file


def test_the_file_is_made_for_its_owner_alone_and_appended_to(tmp_path: Path) -> None:
    """0600 from its creation, whatever the umask; a next start goes on behind what is there."""
    path = tmp_path / "audit"
    before = os.umask(0)
    try:
        for number in range(2):
            with opened(path) as audit:
                audit.append(numbered(number))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert [line["number"] for line in lines(path)] == [0, 1]


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """A link (it might aim us at another file), a pipe, a directory, nothing above it."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "read")
    reader = os.open(tmp_path / "read", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe", "read", "", "no/such"):
        with pytest.raises(errors.ConfigError, match=f"cannot open the audit log {tmp_path}"):
            open_audit_log(str(tmp_path / name))
    os.close(reader)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_is_cut_goes_on_at_its_start(tmp_path: Path) -> None:
    """What logrotate does with copytruncate leaves no hole of zeros."""
    path = tmp_path / "audit"
    with opened(path) as audit:
        audit.append(numbered(1))
        wait_for(lambda: path.stat().st_size)
        os.truncate(path, 0)
        audit.append(numbered(2))
    assert [line["number"] for line in lines(path)] == [2]


def test_a_full_disk_is_said_once_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred lines for a full device make one line in our log, one more when it takes them all."""
    monkeypatch.setattr(audit_module, "RETRY_SECONDS", 0.01)
    path = tmp_path / "audit"
    descriptor = os.open("/dev/full", os.O_WRONLY | os.O_APPEND)
    audit = AuditLog(descriptor)
    for number in range(100):
        audit.append(numbered(number))
    wait_for(lambda: caplog.records)
    file = open_audit_log(str(path))
    os.dup2(file, descriptor)
    os.close(file)
    wait_for(lambda: len(caplog.records) == 2)
    audit.close()
    assert [line["number"] for line in lines(path)] == list(range(100))
    assert [record.message for record in caplog.records] == [
        "cannot write the audit log: no space left on device (ENOSPC); calls go on",
        "the audit log is written again; 0 lines were lost",
    ]


def test_a_line_that_fits_in_half_is_not_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """write(2) takes what fits; that much is taken back, and the line comes whole when there is room."""
    monkeypatch.setattr(audit_module, "RETRY_SECONDS", 0.01)
    path, size = tmp_path / "audit", len(numbered(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as audit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, hard))
        try:
            for number in (1, 2):
                audit.append(numbered(number))
            wait_for(lambda: caplog.records)
            wait_for(lambda: path.stat().st_size == size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["number"] for line in lines(path)] == [1, 2]


def unread(pipe: int) -> int:
    """How many bytes there are in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_disk_that_hangs_holds_nobody_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full pipe as the slowest of disks: append returns, memory is bounded, the lost lines are counted."""
    monkeypatch.setattr(audit_module, "QUEUE_MAX", 100)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b" " * 4096)
    os.set_blocking(writer, True)
    audit = AuditLog(writer)
    for number in range(150):
        audit.append(numbered(number))
    assert [record.message for record in caplog.records] == [
        "the audit log loses lines: 100 wait to be written"
    ]
    full = unread(reader)
    data = os.read(reader, 4096)
    wait_for(lambda: unread(reader) > full - 4096)
    # it is not over as long as lines wait: more of them may be lost
    assert len(caplog.records) == 1
    while data.count(b"\n") < 100:
        data += os.read(reader, 65536)
    audit.close()
    os.close(reader)
    assert [json.loads(line)["number"] for line in data.splitlines()] == list(range(100))
    assert caplog.records[-1].message == "the audit log is written again; 50 lines were lost"
    assert len(caplog.records) == 2


def test_an_end_with_a_full_disk_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """pjwd does not wait for space to end, and does not end in silence."""
    audit = AuditLog(os.open("/dev/full", os.O_WRONLY | os.O_APPEND))
    for number in range(3):
        audit.append(numbered(number))
    audit.close()
    assert caplog.records[-1].message == "the audit log ends without 3 lines"
    assert caplog.records[-1].levelno == logging.ERROR
