"""What ends calls early: an error from outside, and the end of a certificate, by one timer for all."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from pjw.errors import LauncherGoneError, NotAuthenticatedError, PjwError
from pjw.model import Identity
from pjw.server.authz import Peer
from pjw.server.calls import Calls, RunningCall

DAY_SECONDS = 86_400.0


def peer_for(seconds: float) -> Peer:
    """A caller whose certificate holds for so long."""
    return Peer(Identity("alice", 1), b"", datetime.now(UTC) + timedelta(seconds=seconds))


async def run(calls: Calls, peer: Peer, begun: asyncio.Event | None = None) -> PjwError | None:
    """A call that lasts until it is ended; why it was."""
    call = RunningCall(peer, "Get", None)
    calls.add(call)
    if begun is not None:
        begun.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if (error := call.take_end()) is not None:
            return error
        raise
    finally:
        calls.remove(call)
    return None


@pytest.mark.parametrize("order", [(0.2, 0.4, DAY_SECONDS), (DAY_SECONDS, 0.4, 0.2)])
async def test_each_call_ends_with_its_certificate(order: tuple[float, ...]) -> None:
    """In whichever order they came; those that go on are left alone."""
    calls = Calls()
    tasks = {seconds: asyncio.create_task(run(calls, peer_for(seconds))) for seconds in order}
    async with asyncio.timeout(10):
        assert isinstance(await tasks[0.2], NotAuthenticatedError)
        assert not tasks[0.4].done()
        error = await tasks[0.4]
    assert str(error) == "the client certificate has expired during the call"
    assert [call.ended_by for call in calls] == [None]
    tasks[DAY_SECONDS].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[DAY_SECONDS]
    assert list(calls) == []


async def test_a_thousand_calls_have_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each would cost each call as much as to look at its certificate."""
    set_timers = 0
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counted(*arguments: object) -> asyncio.TimerHandle:
        nonlocal set_timers
        set_timers += 1
        return call_later(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", counted)
    calls, peer = Calls(), peer_for(DAY_SECONDS)
    tasks = [asyncio.create_task(run(calls, peer)) for _ in range(1000)]
    await asyncio.sleep(0)
    assert (len(list(calls)), set_timers) == (1000, 1)
    for call in calls:
        call.end(LauncherGoneError("over"))
    assert {str(error) for error in await asyncio.gather(*tasks)} == {"over"}


async def test_a_clock_that_goes_back_ends_nothing_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer goes by a clock that nobody sets, and the certificate by the other one: that one decides."""
    calls, begun, peer = Calls(), asyncio.Event(), peer_for(0.05)
    looks = 0
    task = asyncio.create_task(run(calls, peer, begun))
    await begun.wait()

    def later(_: Peer) -> float:
        nonlocal looks
        looks += 1
        return 0.05 if looks < 3 else -1.0

    monkeypatch.setattr(Peer, "seconds_left", later)
    assert isinstance(await task, NotAuthenticatedError)
    assert looks == 3


async def test_the_first_error_is_the_one_that_counts() -> None:
    """A call that is ending goes on to do so; its caller's own cancellation is not taken for ours."""
    calls, begun = Calls(), asyncio.Event()
    task = asyncio.create_task(run(calls, peer_for(DAY_SECONDS), begun))
    await begun.wait()
    for words in ("one", "two"):
        for call in calls:
            call.end(LauncherGoneError(words))
    assert str(await task) == "one"
    begun.clear()
    task = asyncio.create_task(run(calls, peer_for(DAY_SECONDS), begun))
    await begun.wait()
    for call in calls:
        call.end(LauncherGoneError("ours"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
