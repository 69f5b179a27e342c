"""Turns of calls by themselves: whose goes on when, and who is cut off. The clock is the test's."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

from pjw.server import accept
from pjw.server.accept import (
    EARLY_NS,
    FORGET_ABOVE,
    HELD_MAX,
    PENALTY_SECONDS,
    PENALTY_SECONDS_MAX,
    TAKEN_BACK_BURST,
    TAKEN_BACK_PER_SECOND,
    Turns,
)
from tests.support.seen import texts_kept_by

QUICK: Final = b"/pjw.v1.JobWorkerService/Get"
OTHER: Final = b"/pjw.v1.JobWorkerService/Logs"
SECOND: Final = 10**9


class Call:
    """As much of a ServicerContext as turns use: `end` is its end, with a status or without."""

    def __init__(self) -> None:
        self.delivered = False
        self._answered = False
        self._callbacks: list[Callable[[Any], None]] = []

    def deliver(self) -> None:
        """It is its turn."""
        self.delivered = True

    def done(self) -> bool:
        """Whether a status was sent."""
        return self._answered

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Who is told of its end."""
        self._callbacks.append(callback)

    def end(self, *, answered: bool = True) -> None:
        """It is over; without an answer because its client took it back."""
        self._answered = answered
        for callback in self._callbacks:
            callback(self)


class Bench:
    """Turns with a clock, and who was cut off."""

    def __init__(self, rate: float = 0, burst: int = 1) -> None:
        self.now = 1000 * SECOND
        self.rate: tuple[float, int] = (rate, burst)
        self.cut_off: list[str] = []
        self.turns: Final = Turns(lambda: self.rate, self._on_cut_off, lambda: self.now)

    def _on_cut_off(self, client: str) -> None:
        self.cut_off.append(client)
        self.turns.ban(client)

    def call(self, client: str = "alice", method: bytes = QUICK) -> Call:
        """A call comes."""
        call = Call()
        assert self.turns.came(client, method, cast("accept.Context", call), call.deliver)
        return call


async def test_quick_calls_of_one_client_wait_for_each_other() -> None:
    """In their order; those of another, and those that last, do not wait for them."""
    bench = Bench()
    calls = [bench.call() for _ in range(3)]
    assert bench.call("bob").delivered
    assert [call.delivered for call in calls] == [True, False, False]
    calls[0].end()
    assert [call.delivered for call in calls] == [True, True, False]
    assert all(bench.call("carol", OTHER).delivered for _ in range(100))


async def test_a_rate_is_kept() -> None:
    """A burst at once, then one after the other; a rest gives the burst back."""
    bench = Bench(rate=1000, burst=2)
    calls = [bench.call(method=OTHER) for _ in range(4)]
    assert [call.delivered for call in calls] == [True, True, False, False]
    bench.now += SECOND // 1000
    # its timer is real, and a millisecond long
    async with asyncio.timeout(30):
        while not calls[2].delivered:
            await asyncio.sleep(0)
    assert not calls[3].delivered
    bench.rate = (0, 1)
    async with asyncio.timeout(30):
        while not calls[3].delivered:
            await asyncio.sleep(0)


async def test_so_many_are_held() -> None:
    """One more is refused, and holds nobody else up."""
    bench = Bench()
    for _ in range(HELD_MAX + 1):
        bench.call()
    assert not bench.turns.came("alice", QUICK, cast("accept.Context", Call()), lambda: None)
    assert bench.call("bob").delivered


async def test_who_takes_calls_back_is_cut_off() -> None:
    """Beyond a burst; what was answered, or lasted, does not count, and time makes good for some."""
    bench = Bench()
    for _ in range(2 * TAKEN_BACK_BURST):
        bench.call(method=OTHER).end(answered=True)
    for _ in range(2 * TAKEN_BACK_BURST):
        call = bench.call(method=OTHER)
        bench.now += EARLY_NS
        call.end(answered=False)
    assert bench.cut_off == []
    for _ in range(TAKEN_BACK_BURST):
        bench.call(method=OTHER).end(answered=False)
    assert bench.cut_off == []
    bench.now += SECOND
    for _ in range(TAKEN_BACK_PER_SECOND):
        bench.call(method=OTHER).end(answered=False)
    assert bench.cut_off == []
    bench.call(method=OTHER).end(answered=False)
    assert bench.cut_off == ["alice"]
    assert bench.turns.is_banned("alice")
    assert not bench.turns.is_banned("bob")


async def test_a_penalty_grows_while_a_client_goes_on() -> None:
    """Twice as long each time, up to a minute; after a while it begins anew."""
    bench = Bench()
    bench.call()
    seconds = []
    for _ in range(6):
        seconds.append(bench.turns.ban("alice"))
        assert bench.turns.is_banned("alice")
        bench.now += seconds[-1] * SECOND
        assert not bench.turns.is_banned("alice")
    assert seconds == [PENALTY_SECONDS, 10, 20, 40, PENALTY_SECONDS_MAX, PENALTY_SECONDS_MAX]
    bench.now += PENALTY_SECONDS_MAX * SECOND
    assert bench.turns.ban("alice") == PENALTY_SECONDS


async def test_what_a_banned_client_has_waiting_is_forgotten() -> None:
    """It never goes on, also when the one before it has ended."""
    bench = Bench()
    first, second = bench.call(), bench.call()
    bench.turns.ban("alice")
    first.end()
    assert not second.delivered


async def test_at_the_end_all_go_on() -> None:
    """A server that ends answers none of them, and no timer or turn holds it up."""
    bench = Bench(rate=1, burst=1)
    calls = [bench.call() for _ in range(5)]
    bench.turns.open()
    assert all(call.delivered for call in calls)
    for call in calls:
        call.end(answered=False)
    assert bench.cut_off == []


async def test_clients_that_came_once_are_forgotten() -> None:
    """However many there are: but not one that has calls, or that was cut off not long ago."""
    bench = Bench()
    waits = bench.call("waits")
    bench.call("banned").end()
    bench.turns.ban("banned")
    for number in range(10 * FORGET_ABOVE):
        bench.call(f"client-{number}").end()
        bench.now += SECOND // 1000
    names = {text for text in texts_kept_by(bench.turns) if text.startswith("client-")}
    assert len(names) <= 2 * FORGET_ABOVE
    assert bench.turns.is_banned("banned")
    second = bench.call("waits")
    waits.end()
    assert second.delivered
