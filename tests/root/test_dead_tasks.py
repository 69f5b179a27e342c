"""A task or thread of the service that dies by a bug (R4): pjwd ends, so that systemd starts it again."""

import asyncio
import os
import re
import signal
import socket
from collections.abc import Callable
from typing import Any, Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.store import JobStore
from tests.support import pjwd_with
from tests.support.service import CALL_SECONDS, Service
from tests.support.worker_harness import open_bench, start

# each a bug, put into a running pjwd: where it is, and what brings it out
CHANGES: Final = {
    "removal of ended jobs": pjwd_with.bug_in_pruning,
    "samples of running jobs": pjwd_with.bug_in_sampling,
    "reloads": pjwd_with.bug_in_reloading,
    "taking calls": pjwd_with.bug_in_taking_calls,
    "taking calls, of one method": pjwd_with.bug_in_taking_lists,
    "pjw-grpc-log": pjwd_with.bug_in_grpcs_log,
    "pjw-audit": pjwd_with.bug_in_the_audit_log,
    "pjw-metrics": pjwd_with.bug_in_metrics,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_dead_task_ends_the_service_and_no_job(make_service: Callable[..., Service], what: str) -> None:
    """It says which, with a traceback, and ends with 1; a job that runs is there in the next one."""
    service = make_service()
    service.config = f'audit_log = "{service.directory}/audit"\n[metrics]\nlisten = "127.0.0.1:0"\n'
    service.change = CHANGES[what]
    service.start("--log-level", "info")
    job_id = bring_out(service, what)
    assert service.process is not None
    assert service.process.wait(CALL_SECONDS) == 1
    service.process = None
    text = service.log.read_text()
    assert f"CRITICAL: {what.partition(',')[0]}" in text
    assert "Traceback" in text
    assert "pjwd: ERROR: pjwd ends by a fault of its own; running jobs go on" in text
    service.change = None
    service.start()
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    service.ok("stop", str(job_id))
    assert service.stop() == 0


def bring_out(service: Service, what: str) -> int:
    """Do what the bug is in the way of; the id of a job that runs."""
    with service.stub() as stub:
        job_id = stub.Start(pb.StartRequest(command="exec sleep 1000"), timeout=CALL_SECONDS).job.id
        match what:
            case "removal of ended jobs":
                stub.Start(pb.StartRequest(command="true"), timeout=CALL_SECONDS)
            case "reloads":
                os.kill(service.pid, signal.SIGHUP)
            case "taking calls":
                with service.channel() as channel:
                    unknown: Any = channel.unary_unary("/pjw.v1.JobWorkerService/None")
                    with pytest.raises(grpc.RpcError):
                        unknown(b"", timeout=CALL_SECONDS)
            case "taking calls, of one method":
                # nobody deals with this call any more, and the end of the server waits for its deadline
                with pytest.raises(grpc.RpcError):
                    stub.List(pb.ListRequest(), timeout=5)
            case "pjw-grpc-log":
                # as gRPC does it: the end of a pipe that is descriptor 2
                with open(f"/proc/{service.pid}/fd/2", "w") as stderr:
                    stderr.write("a line\n")
            case "pjw-metrics":
                visit(service)
            case _:
                pass  # a second of its life, or the line of its start
    return int(job_id)


def visit(service: Service) -> None:
    """Ask for metrics, which nobody answers."""
    found = re.search(r"metrics on (\S+):(\d+)", service.log.read_text())
    assert found is not None
    with socket.create_connection((found[1], int(found[2])), timeout=CALL_SECONDS) as asked:
        asked.recv(1)


async def test_a_worker_tells_of_a_dead_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Worker.failed` returns; the log has the reason, and the next worker works."""
    async with open_bench() as bench:
        worker = await bench.open()
        failed = asyncio.ensure_future(worker.failed())
        await asyncio.sleep(0)
        assert not failed.done()
        monkeypatch.setattr(JobStore, "prune", None)
        job = await start(worker, "true")
        async with asyncio.timeout(CALL_SECONDS):
            await worker.wait(job.id)
            await failed
        monkeypatch.undo()
        await bench.close(worker)
        worker = await bench.open()
        assert (await worker.get(job.id)).state.final
