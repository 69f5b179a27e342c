"""What happens to pjw in a soak: kills, stops and restarts at random; and what its processes hold."""

import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.soak.load import Ledger
from tests.support.service import Service

METER_SECONDS: Final = 5


@dataclass(frozen=True, slots=True)
class Reading:
    """What server and launcher hold at one moment."""

    at: float
    pid: int
    server_kib: int
    server_descriptors: int
    launcher_kib: int
    launcher_descriptors: int


def read(service: Service, since: float) -> Reading:
    """Take a reading."""
    pid, launcher = service.pid, service.launcher_pid()
    return Reading(
        time.monotonic() - since,
        pid,
        _anonymous_kib(pid),
        len(os.listdir(f"/proc/{pid}/fd")),
        _anonymous_kib(launcher),
        len(os.listdir(f"/proc/{launcher}/fd")),
    )


def _anonymous_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Faults(threading.Thread):
    """Faults for a while, then none of server and launcher, so that a slope would show."""

    def __init__(self, service: Service, ledger: Ledger, seed: str, *, kill_seconds: float) -> None:
        super().__init__(name="faults")
        self._service, self._ledger = service, ledger
        self._chance: Final = random.Random(seed)
        self._began: Final = time.monotonic()
        self._kills_end: Final = self._began + kill_seconds
        self.readings: Final[list[Reading]] = []

    def run(self) -> None:
        """Until the end."""
        kinds = {
            "kill of the server": 3,
            "kill of the launcher": 3,
            "kill of both": 2,
            "restart": 2,
            "server stopped for a while": 3,
            "launcher stopped for a while": 3,
            "kill of inits": 6,
            "kill of the spawner": 3,
        }
        next_fault = time.monotonic() + 3
        while not self._ledger.stop.wait(0.5):
            now = time.monotonic()
            try:
                if not self.readings or now - self._began - self.readings[-1].at > METER_SECONDS:
                    self.readings.append(read(self._service, self._began))
                if now < next_fault:
                    continue
                kind = self._chance.choices(list(kinds), list(kinds.values()))[0]
                if now > self._kills_end:
                    kind = "kill of inits"
                self._cause(kind)
                self._ledger.count(kind)
                next_fault = time.monotonic() + self._chance.uniform(2, 12)
            except Exception as error:  # noqa: BLE001  a thread must not end in silence
                self._ledger.find(f"faults: {error!r}")

    def _cause(self, kind: str) -> None:
        server, launcher = self._service.pid, self._service.launcher_pid()
        match kind:
            case "kill of the server":
                os.kill(server, signal.SIGKILL)
                self._restart()
            case "kill of the launcher":
                os.kill(launcher, signal.SIGKILL)
                self._restart()
            case "kill of both":
                for pid in self._chance.sample([server, launcher], 2):
                    os.kill(pid, signal.SIGKILL)
                self._restart()
            case "restart":
                self._service.stop()
                self._service.start()
            case "kill of inits":
                self._kill_inits()
            case "kill of the spawner":
                spawner = self._service.spawner_pid()
                if spawner is not None:
                    os.kill(spawner, signal.SIGKILL)
            case _:
                pid = server if kind.startswith("server") else launcher
                os.kill(pid, signal.SIGSTOP)
                self._ledger.stop.wait(self._chance.uniform(0.2, 4))
                os.kill(pid, signal.SIGCONT)

    def _restart(self) -> None:
        process = self._service.process
        assert process is not None
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            self._ledger.find("the server did not end although its launcher had")
            process.kill()
            process.wait()
        self._service.process = None
        self._service.start()

    def _kill_inits(self) -> None:
        groups = [group for group in self._service.job_cgroups() if "/pids/" in str(group)]
        groups = groups or self._service.job_cgroups()
        for group in self._chance.sample(groups, min(len(groups), self._chance.choice([1, 1, 3]))):
            job_id = int(group.name.removeprefix("job-"))
            with suppress(FileNotFoundError, ProcessLookupError, OSError):
                for pid in map(int, (group / "cgroup.procs").read_text().split()):
                    if Path(f"/proc/{pid}/comm").read_text() == "pjw-init\n":
                        self._ledger.init_killed.add(job_id)
                        os.kill(pid, signal.SIGKILL)
