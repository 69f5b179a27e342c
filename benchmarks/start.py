"""Starts: until the command runs, until its end is known, and how many in a second.

pjw's numbers are those of a client over mutual TLS: from the call of Start to its answer, which comes when
the command has been executed with every namespace and limit; and on to the end of a Logs stream, which is
what a client waits for. Each round also runs the kernel's floor (floor.c: clone with the same
namespaces, exec, wait), the floor without a namespace of the network, which costs most, the floor with a
cgroup in each of a job's hierarchies under the same limits, a bare posix_spawn, and in some rounds the peers
(peers.py). All execute the same `true`.

The order in a round is left to chance, because it matters: on cgroup v1 the first process to enter a cgroup
after a pause waits for a grace period of RCU, about 10 ms. The next ones do not wait.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import accounts, pjwd
from benchmarks.accounts import Accounts, Used
from benchmarks.clients import TRUE, run_many, run_once
from benchmarks.floor import NAMESPACES, SOURCE, WITHOUT_NET, Floor, Run, build, cgroups_like, run_all
from benchmarks.peers import NAME, Peer, open_peers
from benchmarks.processes import cpu_seconds
from benchmarks.report import Figure, Held, median, percentile
from tests.support.service import Service, wait_for

CLIENTS: Final = (1, 8, 64)
# Peers take up to fifty times as long as the floor, and vary less for it.
ROUNDS_FOR_EACH_OF_PEERS: Final = 5
START_GOAL: Final = 1.5
LIFE_GOAL: Final = 2.0
RATE_GOAL: Final = 0.6
CPU_GOAL: Final = 1.5
SUITE: Final = "start"
FLOOR: Final = "kernel's floor"
FLOOR_WITHOUT_NET: Final = "floor without net"
FLOOR_WITH_CGROUPS: Final = "floor with cgroups"
SPAWN: Final = "posix_spawn"


def run(*, quick: bool) -> list[Figure]:
    """Measure all of it."""
    with ExitStack() as stack:
        service = stack.enter_context(pjwd.running())
        floors, peers = stack.enter_context(beside(service))
        single = one_by_one(service, floors, peers, rounds=100 if quick else 500)
        rate = at_once(service, floors, rounds=4 if quick else 3, count=96 if quick else 512)
        return single + rate


@contextmanager
def beside(service: Service, *only: str) -> Iterator[tuple["Floors", list[Peer]]]:
    """Give the kernel's floors and the peers, or *only* those of them, ready to run in turns with a pjwd."""
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        # the user of an OCI container must be able to find its root
        directory.chmod(0o755)
        program = build(directory)
        told = build(directory, SOURCE.with_name("told.c"))
        peers = stack.enter_context(open_peers(directory, program, told, *only))
        yield stack.enter_context(_floors(service, program)), peers


@dataclass(frozen=True, slots=True)
class Floors:
    """The floor and that without a network namespace, as two processes each, and one with cgroups."""

    pair: tuple[Floor, Floor]
    without_net: tuple[Floor, Floor]
    with_cgroups: Floor


@contextmanager
def _floors(service: Service, program: Path) -> Iterator[Floors]:
    job_id = pjwd.start(service, ["sleep", "600"])
    cgroups = cgroups_like(service.job_cgroups(), NAME)
    with service.stub() as stub:
        pjwd.stop(stub, job_id)
    with (
        Floor(program, NAMESPACES, [TRUE]) as first,
        Floor(program, NAMESPACES, [TRUE]) as second,
        Floor(program, WITHOUT_NET, [TRUE]) as third,
        Floor(program, WITHOUT_NET, [TRUE]) as fourth,
        Floor(program, NAMESPACES, [TRUE], cgroups=cgroups) as with_cgroups,
    ):
        yield Floors((first, second), (third, fourth), with_cgroups)


# --- one at a time


def one_by_one(service: Service, floors: Floors, peers: Sequence[Peer], rounds: int) -> list[Figure]:
    """Return the seconds of a start and of a whole life without other starts."""
    starts: dict[str, list[float]] = {}
    lives: dict[str, list[float]] = {}
    with service.stub() as stub:
        always: dict[str, Callable[[], Run]] = {
            "pjw": lambda: run_once(stub),
            FLOOR: floors.pair[0].run,
            FLOOR_WITHOUT_NET: floors.without_net[0].run,
            FLOOR_WITH_CGROUPS: floors.with_cgroups.run,
            SPAWN: _posix_spawn,
        }
        sometimes = {peer.name: peer.run for peer in peers}
        for name in always | sometimes:
            starts[name], lives[name] = [], []
        for number in range(-2, rounds):
            turns = list((always if number % ROUNDS_FOR_EACH_OF_PEERS else always | sometimes).items())
            random.shuffle(turns)
            for name, turn in turns:
                run = turn()
                # the first two are for caches and connections
                if number >= 0:
                    starts[name].append(run.start)
                    lives[name].append(run.end)
    slow = {name: percentile(starts[name], 0.99) * 1e3 for name in ("pjw", FLOOR)}
    names = [peer.name for peer in peers]
    start_goals = {FLOOR: START_GOAL} | dict.fromkeys(names, 1.0)
    return [
        *_against_all("until the command runs", starts, start_goals, names),
        Figure(SUITE, "until the command runs, p99", slow["pjw"], "ms", FLOOR, slow[FLOOR], held=Held.NEVER),
        *_against_all("whole life", lives, {FLOOR: LIFE_GOAL}, names),
    ]


def _against_all(
    what: str, found: dict[str, list[float]], goals: dict[str, float], peers: Sequence[str]
) -> list[Figure]:
    pjw = median(found["pjw"]) * 1e3
    # The spawn and the floor without a network take tenths of a millisecond: machines of one kind differ
    # there by a factor of two. A new memory cgroup takes longer on a machine that has had thousands of jobs
    # (scale.py).
    never = (SPAWN, FLOOR_WITHOUT_NET, FLOOR_WITH_CGROUPS)
    held = dict.fromkeys(never, Held.NEVER) | dict.fromkeys(peers, Held.IF_THERE)
    return [
        Figure(
            SUITE,
            what,
            pjw,
            "ms",
            name,
            median(times) * 1e3,
            goals.get(name),
            held=held.get(name, Held.ALWAYS),
        )
        for name, times in found.items()
        if name != "pjw"
    ]


def _posix_spawn() -> Run:
    began = time.perf_counter()
    pid = os.posix_spawn(TRUE, [TRUE], {})
    started = time.perf_counter()
    _, status = os.waitpid(pid, 0)
    ended = time.perf_counter()
    if status != 0:
        raise RuntimeError(f"{TRUE} ended with status {status:#x}")
    return Run(started - began, ended - began)


# --- many at once


@dataclass(slots=True)
class _Tally:
    """The sums of some turns; of the floor all time is that of `spawning`."""

    seconds: float = 0
    used: Used = field(default_factory=Used)
    count: int = 0

    @property
    def rate(self) -> float:
        """The whole lives a second."""
        return self.count / self.seconds

    @property
    def cpu_ms(self) -> float:
        """The processor time of one life."""
        return self.used.total / self.count * 1e3


def at_once(
    service: Service, floors: Floors, rounds: int, count: int, numbers: Sequence[int] = CLIENTS
) -> list[Figure]:
    """Return the seconds of *count* lives for each of these *numbers* of simultaneous clients."""
    pjw, floor, without_net = ({clients: _Tally() for clients in numbers} for _ in range(3))
    with accounts.opened(service) as account:
        for _ in range(rounds):
            for clients in numbers:
                _pjw_turn(service, account, clients, count, pjw[clients])
                _floor_turn(floors.pair, count, floor[clients])
                _floor_turn(floors.without_net, count, without_net[clients])
    figures = []
    for clients in numbers:
        who = f"{clients} client" + ("s" if clients > 1 else "")
        ours, theirs = pjw[clients], floor[clients]
        against, cpu = f"{FLOOR}, 2 processes", f"CPU of one, {who}"
        figures += [
            Figure(SUITE, f"rate, {who}", ours.rate, "/s", against, theirs.rate, RATE_GOAL, True),
            Figure(SUITE, cpu, ours.cpu_ms, "ms", against, theirs.cpu_ms, CPU_GOAL),
            Figure(SUITE, cpu, ours.cpu_ms, "ms", FLOOR_WITHOUT_NET, without_net[clients].cpu_ms),
            *(
                Figure(
                    SUITE,
                    f"{cpu}: {whose}",
                    seconds / ours.count * 1e3,
                    "ms",
                    "all",
                    ours.cpu_ms,
                    held=Held.NEVER,
                )
                for whose, seconds in ours.used.parts().items()
            ),
        ]
    return figures


def _pjw_turn(service: Service, account: Accounts, clients: int, count: int, tally: _Tally) -> None:
    before = account.now()
    tally.seconds += asyncio.run(run_many(service, clients, count))
    # then the server still removes the directory of a job without output
    wait_for(lambda: not os.listdir(service.state / "jobs"))
    tally.used += account.now() - before
    tally.count += count


def _floor_turn(pair: Sequence[Floor], count: int, tally: _Tally) -> None:
    pids = [floor.pid for floor in pair]
    before = cpu_seconds(*pids)
    tally.seconds += run_all(pair, count // len(pair))
    tally.used += Used(spawning=cpu_seconds(*pids) - before)
    tally.count += count
