"""How start-up, get and list take to a long history: from 1,000 to 1,000,000 ended jobs in the table.

As root: .venv/bin/python -m benchmarks.history [COUNT]...

Prints a table; each number is the median of many, beside its ratio to the first row's.
"""

import asyncio
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from pjw.model import JobSpec
from pjw.worker import Worker, WorkerSettings
from pjw.worker.settings import Retention
from pjw.worker.worker import PAGE_MAX

COUNTS: Final = (1_000, 10_000, 100_000, 1_000_000)
CLIENTS: Final = 10
REPEATS: Final = 200
COLUMNS: Final = (
    "client_name, command, limits, start_ns, state, end_ns, exit_code, reason, usage, output_bytes"
)
# with bounds that are nearly reached, so that pruning has to look
SETTINGS: Final = WorkerSettings(retention=Retention(10**9, 10**6, 10**15, 10**7, 10**16))


def fill(state: Path, count: int) -> None:
    """Copy the one job that is there until there are *count*, of CLIENTS clients."""
    with sqlite3.connect(state / "jobs.sqlite") as db:
        (row,) = db.execute(f"SELECT {COLUMNS} FROM jobs").fetchall()  # noqa: S608
        db.execute("DELETE FROM jobs")
        for number in range(CLIENTS):
            db.execute(
                "INSERT OR IGNORE INTO clients (name, number) VALUES (?, ?)", (f"c{number}", number + 1)
            )
        marks = ", ".join("?" * len(row))
        db.executemany(
            f"INSERT INTO jobs ({COLUMNS}) VALUES ({marks})",  # noqa: S608
            ((f"c{number % CLIENTS}", *row[1:5], row[5] + number, *row[6:]) for number in range(count)),
        )
        # the triggers count ends, and these rows came with theirs
        db.execute(
            "UPDATE clients SET ended_jobs = (SELECT count(*) FROM jobs WHERE client_name = clients.name),"
            " ended_bytes = (SELECT total(output_bytes) FROM jobs WHERE client_name = clients.name)"
        )
    db.close()


async def median_us(call: Callable[[], Awaitable[object]], repeats: int = REPEATS) -> float:
    """How long a call takes, in microseconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def measure(count: int) -> dict[str, float]:
    """Everything that is in the table, for one length of history."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-bench-", dir="/var/tmp"))
    state = directory / "state"
    try:
        async with await Worker.open(str(state)) as worker:
            await worker.wait((await worker.start(JobSpec("echo words"))).id)
        fill(state, count)
        opened = []
        for _ in range(5):
            began = time.perf_counter()
            worker = await Worker.open(str(state), SETTINGS)
            opened.append(time.perf_counter() - began)
            await worker.close()
        async with await Worker.open(str(state), SETTINGS) as worker:
            newest = count + 1
            return {
                "start-up": statistics.median(opened) * 1e6,
                "get": await median_us(lambda: worker.get(random.randrange(2, newest))),  # noqa: S311
                "list, first page": await median_us(lambda: worker.list("c1", 0, 100)),
                "list, last page": await median_us(lambda: worker.list("c1", newest - 100 * CLIENTS, 100)),
                "whole life of a job": await median_us(lambda: whole_life(worker), 50),
            }
    finally:
        shutil.rmtree(directory)


async def whole_life(worker: Worker) -> None:
    """Start a job and wait for its end: a row inserted, updated, and a look at what may be pruned."""
    await worker.wait((await worker.start(JobSpec(["true"]), "c1")).id)


def main() -> None:
    """Measure and print."""
    assert PAGE_MAX >= 100
    counts = [int(word) for word in sys.argv[1:]] or list(COUNTS)
    first: dict[str, float] = {}
    for count in counts:
        measured = asyncio.run(measure(count))
        first = first or measured
        if measured is first:
            print(f"{'ended jobs':>10}", *(f"{name:>24}" for name in measured))
        cells = (f"{value:>12,.0f} us ({value / first[name]:5.2f})" for name, value in measured.items())
        print(f"{count:>10,}", *(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
