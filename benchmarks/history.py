"""Measure start-up, get and list with a long history: 1,000 to 1,000,000 ended jobs in the table."""

import asyncio
import math
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from benchmarks.report import Figure, median
from pjw.model import JobSpec
from pjw.worker import Worker, WorkerSettings
from pjw.worker.settings import Retention

COUNTS: Final = (1_000, 10_000, 100_000, 1_000_000)
QUICK_COUNTS: Final = (1_000, 10_000, 100_000)
CLIENTS: Final = 10
CLIENT: Final = "c1"
PAGE: Final = 100
OPENINGS: Final = 7
REPEATS: Final = 200
LIVES: Final = 40
COLUMNS: Final = (
    "client_name, command, limits, start_ns, state, end_ns, exit_code, reason, usage, output_bytes"
)
# with bounds that are nearly reached, so that pruning must look
SETTINGS: Final = WorkerSettings(retention=Retention(10**9, 10**6, 10**15, 10**7, 10**16))

# For each length of history the seconds of one call.
Times = dict[int, list[float]]


def run(*, quick: bool) -> list[Figure]:
    """Measure every length in turns, each in its own state directory."""
    return asyncio.run(_run(QUICK_COUNTS if quick else COUNTS, REPEATS // 4 if quick else REPEATS))


async def _run(counts: Sequence[int], repeats: int) -> list[Figure]:
    with pjwd.directory() as directory:
        states = {count: directory / str(count) for count in counts}
        for count, state in states.items():
            await _make(state, count)
        found = {"start-up": await _openings(states)}
        async with AsyncExitStack() as stack:
            workers = {
                count: await stack.enter_async_context(await Worker.open(str(state), SETTINGS))
                for count, state in states.items()
            }
            for name, call, times in (
                # too short to be steady with fewer
                ("get", _get, 5 * REPEATS),
                ("list, first page", _list_first, repeats),
                ("list, last page", _list_last, repeats),
                ("whole life of a job", _whole_life, LIVES * repeats // REPEATS),
            ):
                found[name] = await _in_turns(workers, call, times)
    return [figure for name, times in found.items() for figure in _figures(name, times)]


def _figures(name: str, times: Times) -> list[Figure]:
    (first, least), *longer = ((count, median(taken) * 1e6) for count, taken in times.items())
    figures = [Figure("history", f"{name}, {first:,} ended jobs", least, "us")]
    for count, value in longer:
        # no more than the steps of a search in a sorted table
        goal = math.log(count) / math.log(first)
        label = f"{name}, {count:,} ended jobs"
        figures.append(Figure("history", label, value, "us", f"{first:,}", least, round(goal, 2)))
    return figures


async def _openings(states: dict[int, Path]) -> Times:
    times: Times = {count: [] for count in states}
    for _ in range(OPENINGS):
        for count, state in states.items():
            began = time.perf_counter()
            worker = await Worker.open(str(state), SETTINGS)
            times[count].append(time.perf_counter() - began)
            await worker.close()
    return times


async def _in_turns(
    workers: dict[int, Worker], call: Callable[[Worker, int], Awaitable[None]], repeats: int
) -> Times:
    times: Times = {count: [] for count in workers}
    for _ in range(repeats):
        for count, worker in workers.items():
            began = time.perf_counter()
            await call(worker, count)
            times[count].append(time.perf_counter() - began)
    return times


# ids: the one job that was copied had the first, and the copies have those that follow


async def _get(worker: Worker, count: int) -> None:
    job_id = random.randrange(2, count + 2)  # noqa: S311
    assert (await worker.get(job_id)).id == job_id


async def _list_first(worker: Worker, count: int) -> None:
    assert len(await worker.list(CLIENT, 0, PAGE)) == PAGE


async def _list_last(worker: Worker, count: int) -> None:
    assert len(await worker.list(CLIENT, count + 1 - PAGE * CLIENTS, PAGE)) == PAGE


async def _whole_life(worker: Worker, count: int) -> None:
    """Start a job and wait for its end: a row inserted and updated, and a look for jobs to prune."""
    job = await worker.wait((await worker.start(JobSpec(["true"]), CLIENT)).id)
    assert job.exit_status is not None
    assert job.exit_status.code == 0


async def _make(state: Path, count: int) -> None:
    async with await Worker.open(str(state)) as worker:
        await worker.wait((await worker.start(JobSpec("echo words"))).id)
    _fill(state, count)


def _fill(state: Path, count: int) -> None:
    """Copy the only job until there are *count*, of CLIENTS clients."""
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
