"""Pages of the job table: what fits, in which order, and that none takes longer than another."""

import sqlite3
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pjw.errors import InvalidJobError, PageTokenError
from pjw.model import EndReason, ExitStatus, Job, JobSpec, JobState, Limits
from pjw.server.queries import after_token, filter_from_message, token_after
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import pages
from pjw.worker.pages import ALL_JOBS, JobFilter
from pjw.worker.settings import Quotas
from pjw.worker.store import JobStore
from tests.support.seen import tables_opened

END = datetime(2026, 5, 17, 12, 0, 0, 0, UTC)
ENDED = frozenset({JobState.EXITED})
LOST = frozenset({JobState.LOST})
ALIVE = frozenset({JobState.RUNNING, JobState.STARTING})
QUEUED = frozenset({JobState.QUEUED})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """The table that is opened."""
    return tables_opened(monkeypatch)


@pytest.fixture
async def store(tmp_path: Path, tables: list[sqlite3.Connection]) -> AsyncIterator[JobStore]:
    """Jobs 1 to 12: of alice and bob in turns; 1 to 4 exited, 5 and 6 are lost, the others have not ended.

    Those whose number 3 divides have the label `third`, and are called so; every second of them `six` too.
    """
    store = JobStore(str(tmp_path / "jobs.sqlite"))
    for number in range(1, 13):
        labels = {"third": "yes"} if number % 3 == 0 else {}
        labels |= {"a.b/c": 'it\'s "six"'} if number % 6 == 0 else {}
        name = f"n{number}" if number % 3 == 0 else ""
        spec = JobSpec(str(number), name=name, labels=labels)
        await finish(store, await store.add(("bob", "alice")[number % 2], spec, Limits()), number)
    yield store
    store.close()


async def finish(store: JobStore, job: Job, number: int) -> None:
    """End it, as its number says."""
    if number <= 4:
        job = replace(job, state=JobState.EXITED, exit_status=ExitStatus(code=0), reason=EndReason.COMPLETED)
    elif number <= 6:
        job = replace(job, state=JobState.LOST, reason=EndReason.LOST)
    else:
        return
    await store.finish(replace(job, end=END, output_bytes=1))


async def walk(
    store: JobStore, client: str | None, wanted: JobFilter, count: int = 2, *, newest_first: bool = False
) -> list[list[int]]:
    """The ids on each page, to the last one."""
    found: list[list[int]] = []
    after: int | None = 0
    while after is not None:
        page = await store.page(client, after, count, wanted, newest_first=newest_first)
        found.append([job.id for job in page.jobs])
        after = page.next_after
    return found


def flat(found: Iterable[list[int]]) -> list[int]:
    """All ids."""
    return [job_id for page in found for job_id in page]


CASES: list[tuple[str | None, JobFilter, list[int]]] = [
    (None, ALL_JOBS, list(range(1, 13))),
    ("alice", ALL_JOBS, [1, 3, 5, 7, 9, 11]),
    ("carol", ALL_JOBS, []),
    (None, JobFilter(LOST), [5, 6, *range(7, 13)]),
    (None, JobFilter(ENDED), [1, 2, 3, 4, *range(7, 13)]),
    (None, JobFilter(ALIVE), list(range(7, 13))),
    ("bob", JobFilter(ALIVE), [8, 10, 12]),
    (None, JobFilter(ALIVE | LOST), [5, 6, *range(7, 13)]),
    (None, JobFilter(labels={"third": "yes"}), [3, 6, 9, 12]),
    (None, JobFilter(labels={"third": "no"}), []),
    (None, JobFilter(labels={"third": "yes", "a.b/c": 'it\'s "six"'}), [6, 12]),
    ("alice", JobFilter(labels={"third": "yes"}), [3, 9]),
    ("alice", JobFilter(ALIVE, {"third": "yes"}), [9]),
    ("alice", JobFilter(name="n9"), [9]),
    ("bob", JobFilter(name="n9"), []),
    (None, JobFilter(name="n9"), [9]),
    (None, JobFilter(LOST, {"third": "yes"}, "n6"), [6]),
]


@pytest.mark.parametrize("looked_at", [1, 2, 3, 2000])
@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize(("client", "wanted", "ids"), CASES)
async def test_all_that_fits_comes_once_and_in_order(
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
    client: str | None,
    wanted: JobFilter,
    ids: list[int],
    newest_first: bool,
    looked_at: int,
) -> None:
    """However the pages fall, in both directions; one that has not ended fits any state: who knows, says."""
    monkeypatch.setattr(pages, "ROWS_LOOKED_AT", looked_at)
    for count in (1, 2, 3, 1000):
        found = await walk(store, client, wanted, count, newest_first=newest_first)
        assert flat(found) == (ids[::-1] if newest_first else ids)
        assert all(len(page) <= count for page in found)


async def test_a_page_looks_at_so_many_rows_and_no_more(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few fit it is short, or empty, and says where the next one begins."""
    monkeypatch.setattr(pages, "ROWS_LOOKED_AT", 4)
    assert await walk(store, None, JobFilter(labels={"a.b/c": 'it\'s "six"'}), 10) == [[], [6], [12], []]
    lost = await walk(store, None, JobFilter(LOST, {"third": "yes"}), 10, newest_first=True)
    assert lost == [[12, 9], [6], [], []]
    # found by an index: nothing to bound
    assert await walk(store, "alice", JobFilter(name="n9"), 10) == [[9]]
    assert await walk(store, None, JobFilter(ALIVE), 10) == [[7, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize(
    ("client", "wanted", "index"),
    [
        ("alice", ALL_JOBS, "jobs_of_client"),
        ("alice", JobFilter(name="x"), "jobs_of_name"),
        (None, JobFilter(ALIVE), "jobs_alive"),
        (None, JobFilter(QUEUED), "jobs_queued "),
        ("alice", JobFilter(QUEUED), "jobs_queued_of_client"),
        ("alice", JobFilter(QUEUED, {"third": "yes"}), "jobs_queued_of_client"),
        (None, JobFilter(QUEUED | ALIVE), "jobs_queued "),
        (None, JobFilter(QUEUED | ALIVE), "jobs_alive"),
    ],
)
async def test_an_index_is_used(
    store: JobStore, tables: list[sqlite3.Connection], client: str | None, wanted: JobFilter, index: str
) -> None:
    """A page without another bound is found by searching, not by reading on."""
    [table], asked = tables, list[str]()
    table.set_trace_callback(asked.append)
    await store.page(client, 0, 10, wanted)
    table.set_trace_callback(None)
    plan = " ".join(str(row) for query in asked for row in table.execute(f"EXPLAIN QUERY PLAN {query}"))
    assert index in plan
    assert "TEMP B-TREE" not in plan


async def test_jobs_that_wait_beside_jobs_that_run(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the pages fall, in both directions, with a filter and without, alone and together."""
    for number in range(13, 22):
        client = ("bob", "alice")[number % 2]
        if number in (14, 17):
            await store.add(client, JobSpec("x"), Limits())
            continue
        labels = {"third": "yes"} if number % 3 == 0 else {}
        await store.client_number(client)
        await store.enqueue(client, [(JobSpec("x", labels=labels), Limits())], Quotas())
    waits = [13, 15, 16, 18, 19, 20, 21]
    both = [7, 8, 9, 10, 11, 12, *range(13, 22)]
    for looked_at in (2000, 2):
        monkeypatch.setattr(pages, "ROWS_LOOKED_AT", looked_at)
        for count in (1, 2, 3, 100):
            assert flat(await walk(store, None, JobFilter(QUEUED), count)) == waits
            assert flat(await walk(store, "alice", JobFilter(QUEUED), count)) == [13, 15, 19, 21]
            assert flat(await walk(store, None, JobFilter(QUEUED | ALIVE), count)) == both
            assert (
                flat(await walk(store, None, JobFilter(QUEUED | ALIVE), count, newest_first=True))
                == both[::-1]
            )
            thirds = await walk(store, None, JobFilter(QUEUED | ALIVE, {"third": "yes"}), count)
            assert flat(thirds) == [9, 12, 15, 18, 21]
    assert flat(await walk(store, None, ALL_JOBS, 100)) == list(range(1, 22))


async def test_long_labels_fill_a_page_too(store: JobStore) -> None:
    """As long commands do: a page fits into a message."""
    labels = {f"k{number}": "v" * 255 for number in range(32)}
    for _ in range(40):
        await store.add("carol", JobSpec("x", labels=labels), Limits())
    found = await walk(store, "carol", ALL_JOBS, 1000)
    assert [len(page) for page in found] == [32, 8]


async def test_a_list_of_a_name_finds_no_list_of_its_past_too_long(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand jobs may have been called that, one after the other."""
    monkeypatch.setattr(pages, "ROWS_LOOKED_AT", 10)
    for _ in range(30):
        job = await store.add("alice", JobSpec("x", name="n"), Limits())
        await finish(store, job, 1)
    found = await walk(store, "alice", JobFilter(LOST, name="n"), 10)
    assert flat(found) == []
    assert len(found) > 3


# --- what clients see of it


def test_a_token_is_good_for_its_own_list_alone() -> None:
    """Behind which job one was means nothing in another list: other filters, another order."""
    plain = pb.ListRequest(page_size=3)
    token = token_after(plain, 7)
    assert token == "7"
    lists = [
        plain,
        pb.ListRequest(newest_first=True),
        pb.ListRequest(name="web"),
        pb.ListRequest(labels={"k": "v"}),
        pb.ListRequest(states=[pb.JOB_STATE_RUNNING, pb.JOB_STATE_LOST]),
    ]
    tokens = [token_after(request, 7) for request in lists]
    assert len(set(tokens)) == len(lists)
    for mine, request in enumerate(lists):
        for number, token in enumerate(tokens):
            asked = pb.ListRequest()
            asked.CopyFrom(request)
            asked.page_size, asked.page_token = 5, token
            if number == mine:
                assert after_token(asked) == 7
            else:
                with pytest.raises(PageTokenError, match="of a list with other filters or another order"):
                    after_token(asked)
    same = pb.ListRequest(
        states=[pb.JOB_STATE_LOST, pb.JOB_STATE_RUNNING, pb.JOB_STATE_RUNNING], page_token=tokens[-1]
    )
    assert after_token(same) == 7


@pytest.mark.parametrize("token", ["x", "-1", "1-", "1-xyz", "٣", "9" * 19, "1 ", "1-0123456789abcdef0"])
def test_a_token_that_nobody_gave(token: str) -> None:
    """Refused in words."""
    with pytest.raises(PageTokenError, match="the page token is not one that this server gave"):
        after_token(pb.ListRequest(page_token=token))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.ListRequest(name="-"), "is no name for a job"),
        (pb.ListRequest(labels={'"': "x"}), "is no key of a label"),
        (pb.ListRequest(labels={"k": "\n"}), "must have a printable value"),
        (pb.ListRequest(states=[pb.JOB_STATE_UNSPECIFIED]), "no state of a job has the number 0"),
        (pb.ListRequest(states=[99]), "no state of a job has the number 99"),  # type: ignore[list-item]
    ],
)
def test_a_filter_that_no_job_can_fit(request_: pb.ListRequest, words: str) -> None:
    """Refused in words, rather than an empty list."""
    with pytest.raises(InvalidJobError, match=words):
        filter_from_message(request_)


def test_a_filter_comes_through() -> None:
    """States, labels and name as they were asked for."""
    request = pb.ListRequest(states=[pb.JOB_STATE_LOST], labels={"k": "v"}, name="web")
    assert filter_from_message(request) == JobFilter(LOST, {"k": "v"}, "web")
    assert filter_from_message(pb.ListRequest()) == ALL_JOBS


def test_json_is_there() -> None:
    """SQLite has been built with json_extract, which labels are looked for with."""
    with sqlite3.connect(":memory:") as db:
        assert db.execute('SELECT json_extract(\'{"a.b": "c"}\', \'$."a.b"\')').fetchone() == ("c",)
    db.close()
