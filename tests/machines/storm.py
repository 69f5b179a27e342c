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
from tests.cluster import LOST_AFTER_SECONDS
from tests.machines.cluster import MachineCluster, OnMachine

LINES_MAX: Final = 20
# of the time for which a node is silent without being lost
SHORT_SECONDS: Final = (0.5, 2.5)
LONG_SECONDS: Final = LOST_AFTER_SECONDS + 3


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
            # one for certain: a node that is lost
            self._cause("no power for long", ends)
            while time.monotonic() < ends:
                self._cause(self._chance.choices(list(_KINDS), list(_KINDS.values()))[0], ends)
        finally:
            self._over.set()
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

    def _cause(self, kind: str, ends: float) -> None:
        nodes = list(self.cluster.nodes.values())
        node = self._chance.choice(nodes)
        seconds = self._chance.uniform(*SHORT_SECONDS)
        self.faults[kind] += 1
        match kind:
            case "gateway killed":
                self.cluster.gateway.stop(signal.SIGKILL)
                self._pause(seconds / 2)
                self.cluster.gateway.start()
            case "server killed" | "launcher killed" | "both killed":
                what = kind.removesuffix(" killed")
                if what != "server":
                    self.cut_short.add(node.name)
                node.kill(what)
                node.start()
            case "gateway stopped for a while":
                self._frozen(self.cluster.gateway, seconds)
            case "server stopped for a while":
                self._frozen(node, seconds)
            case "link down for a while":
                node.machine.pull()
                self._pause(seconds)
                node.machine.plug()
            case "packets dropped for a while":
                node.machine.mute()
                self._pause(seconds)
                node.machine.unmute()
            case "link down for long":
                self.silent.add(node.name)
                node.machine.pull()
                self._pause(LONG_SECONDS)
                node.machine.plug()
            case "no power for a moment" | "no power for long":
                self.silent.add(node.name)
                self.powerless.add(node.name)
                node.cut_power()
                self._pause(LONG_SECONDS if kind == "no power for long" else seconds)
                node.machine.on()
                node.start()
        self._pause(min(self._chance.uniform(0.2, 1.5), max(0.0, ends - time.monotonic())))

    @staticmethod
    def _pause(seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def _frozen(service: OnMachine, seconds: float) -> None:
        assert service.process is not None
        os.kill(service.pid, signal.SIGSTOP)
        time.sleep(seconds)
        # what has entered the machine for it has stopped with it
        for pid in (service.pid, service.process.pid):
            os.kill(pid, signal.SIGCONT)

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


def _one(client: Client, token: str, count: int) -> Result:
    """Start a job, follow it, and wait for its end."""
    command = f"i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo {token} $i; sleep 0.2; done"
    job = client.start(JobSpec(command, limits={"cpu_max_millicores": 50}))
    data, lost_at = b"", None
    try:
        for piece in client.logs(job.id):
            data += piece
    except OutputLostError as error:
        place = re.search(r"at byte (\d+)", str(error))
        lost_at = int(place[1]) if place else -1
    return Result(client.wait(job.id), data, lines_of(token, count), lost_at)
