"""Tasks that nobody waits for: what becomes of their errors (R4)."""

import asyncio

import pytest

from pjw.errors import KernelError, LauncherGoneError
from pjw.worker.tasks import Background, log_bug


async def fail(error: Exception) -> None:
    """A task with a bug."""
    raise error


async def test_one_of_many_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The rest goes on."""
    background = Background()
    background.spawn(fail(ZeroDivisionError()))
    await asyncio.sleep(0)
    await background.close()
    assert not background.failed.is_set()
    assert [record.getMessage() for record in caplog.records] == ["a background task failed"]


async def test_one_that_is_kept_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever runs it can end for it; the log says which, and why."""
    background = Background()
    background.keep("sweeping", fail(ZeroDivisionError("a bug")))
    async with asyncio.timeout(30):
        await background.failed.wait()
    await background.close()
    [record] = caplog.records
    assert (record.levelname, record.getMessage().partition(":")[0]) == ("CRITICAL", "sweeping")
    assert record.exc_info is not None


@pytest.mark.parametrize("error", [None, LauncherGoneError("gone"), asyncio.CancelledError()])
async def test_an_end_that_is_none(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    """The launcher's end is told of by others; one that was cancelled, or is done, has not died."""
    background = Background()
    background.keep("sweeping", asyncio.sleep(0) if error is None else fail(error))
    await asyncio.sleep(0)
    await background.close()
    assert not background.failed.is_set()
    assert not caplog.records


@pytest.mark.parametrize(("error", "lines"), [(ZeroDivisionError(), 1), (KernelError("open", "x", 2), 0)])
async def test_an_abandoned_task_s_bug_is_logged(
    error: Exception, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that is meant for a caller who has left need not be."""
    task = asyncio.ensure_future(fail(error))
    task.add_done_callback(log_bug)
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert len(caplog.records) == lines
