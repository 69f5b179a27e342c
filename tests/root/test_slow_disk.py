"""A disk that takes its time: who needs it waits for it, and nobody else does."""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pjw.errors import LaunchError
from pjw.model import JobSpec
from tests.support.seen import tables_opened
from tests.support.service import wait_for
from tests.support.worker_harness import ASK, Bench, run, start_said

# what changes a disk, or waits for it; of open(2) only where it makes a file
CALLS = ("mkdir", "open", "posix_fallocate", "unlink", "rmdir", "fsync", "fdatasync")


def replaced(name: str, before: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have *before* called in front of each such call."""
    real: Callable[..., Any] = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if name != "open" or arguments[1] & os.O_CREAT:
            before()
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """The tables that are opened from now on."""
    return tables_opened(monkeypatch)


async def test_the_event_loop_changes_nothing_on_the_disk(
    tables: list[sqlite3.Connection], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a start to the removal, also of a start that fails: each such call is another thread's."""
    worker = await bench.open()
    [table] = tables
    callers: dict[str, set[str]] = {}

    def note(name: str) -> None:
        callers.setdefault(name, set()).add(threading.current_thread().name)

    def noting(name: str) -> Callable[[], None]:
        return lambda: note(name)

    for name in CALLS:
        replaced(name, noting(name), monkeypatch)
    table.set_trace_callback(lambda _: note("sqlite"))
    said, _ = await run(worker, "echo said")
    await run(worker, "true")
    with pytest.raises(LaunchError):
        await worker.start(JobSpec(["/nosuch"]))
    await worker.delete(said.id)
    jobs = bench.state / "jobs"
    await asyncio.to_thread(wait_for, lambda: list(jobs.iterdir()) == [])
    assert callers.keys() == {*CALLS, "sqlite"}
    assert threading.main_thread().name not in set().union(*callers.values()), callers


@pytest.fixture
def slow() -> Iterator[tuple[threading.Event, threading.Event]]:
    """A disk has begun to do something (the first), and goes on when it may (the second)."""
    begun, may_go_on = threading.Event(), threading.Event()
    yield begun, may_go_on
    may_go_on.set()


@pytest.mark.parametrize("call", ["mkdir", "open", "posix_fallocate", "fdatasync", "sqlite"])
async def test_a_slow_disk_holds_up_no_reader(
    tables: list[sqlite3.Connection],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    slow: tuple[threading.Event, threading.Event],
    call: str,
) -> None:
    """While a start waits for it, running jobs are seen, read and told of."""
    begun, may_go_on = slow
    worker = await bench.open()
    [table] = tables
    job = await start_said(worker, ASK + "echo ready; read x <&3; echo heard; sleep 300", b"ready\n")

    def wait() -> None:
        begun.set()
        assert may_go_on.wait(60)

    if call == "sqlite":
        table.set_trace_callback(lambda _: wait())
    else:
        replaced(call, wait, monkeypatch)
    starting = asyncio.ensure_future(worker.start(JobSpec("true")))
    async with asyncio.timeout(30):
        await asyncio.to_thread(begun.wait)
        assert (await worker.get_with_usage(job.id)).usage_now is not None
        bench.tell(job.id)
        output = b""
        async for chunk in worker.logs(job.id):
            output += chunk
            if output == b"ready\nheard\n":
                break
        assert await worker.usage_now() != []
    assert not starting.done()
    may_go_on.set()
    ended = await worker.wait((await starting).id)
    assert ended.exit_status is not None and ended.exit_status.code == 0
