"""What a start counts as, by how its call ended."""

import errno
from typing import cast

import pytest

from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    KernelError,
    LauncherGoneError,
    LaunchError,
    LimitReachedError,
    NameTakenError,
    NotAllowedError,
    ProtocolError,
    ServerDrainingError,
    WorkdirError,
)
from pjw.server import metrics
from pjw.server.audit import CANCELLED, CallRecord
from pjw.server.connections import Connections
from pjw.server.log_setup import LogWriter
from pjw.server.metrics import CLIENTS_SHOWN, OTHERS, ServerMetrics
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker
from pjw.worker.metrics import ClientNumbers, WorkerNumbers


def counted(record: CallRecord) -> list[str]:
    """The results that one start is counted as."""
    server_metrics = ServerMetrics(cast("Worker", None), cast("Connections", None), cast("LogWriter", None))
    server_metrics.call_ended(record)
    [starts] = [family for family in server_metrics.registry.collect() if family.name == "pjw_starts"]
    return [sample.labels["result"] for sample in starts.samples if sample.value]


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (InvalidJobError("x"), "refused"),
        (NameTakenError("x"), "refused"),
        (WorkdirError("/x", errno.ENOENT), "refused"),
        (LimitReachedError("x", limit="running_max"), "refused"),
        (LimitReachedError("x"), "refused"),
        (NotAllowedError("x"), "refused"),
        (JobNotFoundError(1), "refused"),
        (LauncherGoneError("x"), "refused"),
        (ServerDrainingError("x"), "refused"),
        (LaunchError("/x", errno.ENOENT), "not_executable"),
        (KernelError("make", "x", errno.EIO), "failed"),
        (ProtocolError("x"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
async def test_only_our_own_fault_is_a_failed_start(error: Exception, result: str) -> None:
    """What a caller asked wrongly, or at the wrong moment, is none."""
    record = CallRecord("Start", pb.StartRequest(), "ipv4:127.0.0.1:1")
    record.failed(error)
    assert counted(record) == [result]


async def test_who_did_not_wait_has_started_nothing() -> None:
    """A call that its caller cancelled is neither a start nor a failure."""
    record = CallRecord("Start", pb.StartRequest(), "ipv4:127.0.0.1:1")
    assert counted(record) == ["started"]
    record.code = CANCELLED
    assert counted(record) == ["cancelled"]


def test_clients_beyond_the_busiest_are_one() -> None:
    """A Prometheus gets so many series, and the numbers of all clients."""
    clients = {f"client-{number:03}": ClientNumbers(number, 1, 10, 3) for number in range(CLIENTS_SHOWN + 2)}
    numbers = WorkerNumbers({}, {}, clients, 0, 0, 0, launcher_up=True)
    running, stored, stored_bytes, queued = (
        {sample.labels["client"]: sample.value for sample in family.samples}
        for family in metrics.of_clients(numbers)
    )
    assert len(running) == CLIENTS_SHOWN + 1
    assert {"client-000", "client-001"}.isdisjoint(running)
    assert (running[OTHERS], stored[OTHERS], stored_bytes[OTHERS], queued[OTHERS]) == (0 + 1, 2, 20, 6)
