"""A storm: clients that start and follow jobs all the time, and random faults of everything meanwhile.

The seed repeats which faults are made, not when exactly the machines get to them.
"""

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from pjw import Client, JobSpec
from pjw.errors import OutputLostError
from pjw.model import EndReason, Job, JobState
from tests.outages.cluster import MachineCluster, NodeOnMachine, OnMachine

LINES_MAX: Final = 20
# of the time for which a node is silent without being lost
SHORT_SECONDS: Final = (0.5, 2.5)
# when all clients have jobs
FIRST_SECONDS: Final = 3


def lines_of(token: str, count: int) -> bytes:
    """What a job of a storm writes."""
    return b"".join(b"%s %d\n" % (token.encode(), number) for number in range(1, count + 1))


@dataclass(frozen=True, slots=True)
class Result:
    """A job that a client was told of, and what the client has read of it."""

    job: Job
    data: bytes
    wanted: bytes
    # where the loss of the rest was told
    lost_at: int | None


class Storm:
    """The clients and the faults of one storm, and all that was found to be wrong."""

    def __init__(self, cluster: MachineCluster, seed: str, clients: list[str]) -> None:
        self.cluster: Final = cluster
        self.results: Final[dict[str, list[Result]]] = {name: [] for name in clients}
        self.findings: Final[list[str]] = []
        self.faults: Final[Counter[str]] = Counter()
        # which nodes were silent for too long, had no power, or had their launchers killed
        self.silent: Final[set[str]] = set()
        self.powerless: Final[set[str]] = set()
        self.cut_short: Final[set[str]] = set()
        # nodes that are away for long now, and the threads that have them back
        self._away: Final[set[str]] = set()
        self._absences: Final[list[threading.Thread]] = []
        # longer than the gateway waits for a node
        self.long_seconds: Final = cluster.lost_after_seconds + 3
        self._over: Final = threading.Event()
        self._chance: Final = random.Random(seed)
        self._threads: Final = [
            threading.Thread(target=self._client, args=(name, f"{seed}/{name}"), name=name)
            for name in clients
        ]

    def run(self, seconds: float) -> None:
        """Let it all happen; at the end every thread has ended and the cluster is whole again."""
        for thread in self._threads:
            thread.start()
        try:
            ends = time.monotonic() + seconds
            time.sleep(FIRST_SECONDS)
            # one for certain: a node that is lost
            self._cause("no power for long")
            while time.monotonic() < ends:
                time.sleep(self._chance.uniform(0.2, 1.5))
                self._cause(self._chance.choices(list(_KINDS), list(_KINDS.values()))[0])
        finally:
            self._over.set()
            for absence in self._absences:
                absence.join()
            self.cluster.whole()
            for thread in self._threads:
                thread.join(120)
                if thread.is_alive():
                    self.findings.append(f"client {thread.name} hangs")

    # --- clients

    def _client(self, name: str, seed: str) -> None:
        chance, number = random.Random(seed), 0
        with self.cluster.gateway.client(name) as client:
            while not self._over.is_set():
                number += 1
                try:
                    self.results[name].append(_one(client, f"{name}-{number}", chance.randint(1, LINES_MAX)))
                except Exception as error:  # noqa: BLE001  a thread must not end in silence
                    self.findings.append(f"client {name}: {error!r}")

    # --- faults

    def _cause(self, kind: str) -> None:
        nodes = [node for name, node in self.cluster.nodes.items() if name not in self._away]
        node = self._chance.choice(nodes)
        seconds = self._chance.uniform(*SHORT_SECONDS)
        if kind in _LONG:
            # others have faults meanwhile, and one node is always there
            if len(nodes) == 1:
                return
            self._away.add(node.name)
            self._absences.append(threading.Thread(target=self._absent, args=(kind, node)))
            self._absences[-1].start()
        self.faults[kind] += 1
        began = time.monotonic()
        self._make(kind, node, seconds)
        if time.monotonic() - began > self.cluster.lost_after_seconds / 2:
            # this machine is too busy: the gateway may have heard nothing of a node for too long
            self.silent.update(self.cluster.nodes if kind.startswith("gateway") else [node.name])

    def _make(self, kind: str, node: NodeOnMachine, seconds: float) -> None:
        match kind:
            case "gateway killed":
                self.cluster.gateway.stop(signal.SIGKILL)
                time.sleep(seconds / 2)
                self.cluster.gateway.start()
            case "server killed" | "launcher killed" | "both killed":
                what = kind.removesuffix(" killed")
                if what != "server":
                    self.cut_short.add(node.name)
                node.kill(what)
                node.start()
            case "gateway stopped for a while":
                _freeze(self.cluster.gateway, seconds)
            case "server stopped for a while":
                _freeze(node, seconds)
            case "link down for a while":
                node.machine.pull()
                time.sleep(seconds)
                node.machine.plug()
            case "packets dropped for a while":
                node.machine.mute()
                time.sleep(seconds)
                node.machine.unmute()
            case "no power for a moment":
                self._without_power(node, seconds)

    def _absent(self, kind: str, node: NodeOnMachine) -> None:
        self.silent.add(node.name)
        try:
            if kind == "no power for long":
                self._without_power(node, self.long_seconds)
            else:
                node.machine.pull()
                time.sleep(self.long_seconds)
                node.machine.plug()
        except Exception as error:  # noqa: BLE001  a thread must not end in silence
            self.findings.append(f"{kind}: {error!r}")
        self._away.discard(node.name)

    def _without_power(self, node: NodeOnMachine, seconds: float) -> None:
        # it may be silent for so long that it is lost, as it has to start again
        self.silent.add(node.name)
        self.powerless.add(node.name)
        node.cut_power()
        time.sleep(seconds)
        node.machine.on()
        node.start()

    # --- what must hold

    def check(self) -> None:
        """Note everything that is wrong: jobs that are forgotten or unknown, lost ones, and bytes."""
        for name, results in self.results.items():
            for result in results:
                if wrong := self._complaint(result):
                    self.findings.append(f"job {result.job.id} of {name} on {result.job.node}: {wrong}")
            with self.cluster.gateway.client(name) as client:
                there = {job.id: job for job in client.list()}
            told = {result.job.id for result in results}
            if forgotten := told - there.keys():
                self.findings.append(f"jobs of {name} are forgotten: {sorted(forgotten)}")
            if unknown := there.keys() - told:
                self.findings.append(f"jobs of {name} that it never heard of: {sorted(unknown)}")

    def _complaint(self, result: Result) -> str:
        job, data = result.job, result.data
        if not result.wanted.startswith(data):
            return f"it wrote {result.wanted!r}, and its follower had {data!r}"
        if result.lost_at not in (None, len(data)):
            return f"the loss was told at byte {result.lost_at}, and the follower had {len(data)}"
        if job.state == JobState.EXITED:
            if (job.reason, job.exit_status is not None and job.exit_status.code) != (EndReason.COMPLETED, 0):
                return f"it has ended with {job.reason}, {job.exit_status}: {job.detail}"
            return "" if data == result.wanted and result.lost_at is None else f"its follower had {data!r}"
        allowed = {
            EndReason.NODE_LOST: self.silent,
            EndReason.HOST_RESTARTED: self.powerless,
            EndReason.LAUNCH_INTERRUPTED: self.cut_short | self.powerless,
        }
        if job.reason is None or job.node not in allowed.get(job.reason, ()):
            return f"it is lost ({job.reason}), and its node was not"
        return ""


_LONG: Final = ("link down for long", "no power for long")
# how often each comes, beside the others
_KINDS: Final = {
    "gateway killed": 3,
    "server killed": 3,
    "launcher killed": 3,
    "both killed": 2,
    "gateway stopped for a while": 2,
    "server stopped for a while": 2,
    "link down for a while": 3,
    "packets dropped for a while": 3,
    "link down for long": 1,
    "no power for a moment": 1,
    "no power for long": 1,
}


def _freeze(service: OnMachine, seconds: float) -> None:
    assert service.process is not None
    pid = service.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    # what has entered the machine for it has stopped with it
    for each in (pid, service.process.pid):
        os.kill(each, signal.SIGCONT)


def _one(client: Client, token: str, count: int) -> Result:
    """Start a job, follow it, and wait for its end."""
    command = f"i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo {token} $i; sleep 0.2; done"
    job = client.start(JobSpec(command, limits={"cpu_max_millicores": 200}))
    data, lost_at = b"", None
    try:
        for piece in client.logs(job.id):
            data += piece
    except OutputLostError as error:
        place = re.search(r"at byte (\d+)", str(error))
        lost_at = int(place[1]) if place else -1
    return Result(client.wait(job.id), data, lines_of(token, count), lost_at)
