"""Divide the processor time of lives among processes, by the kernel's accounts.

A process's count for its children leaves out those that nobody waits for. A cgroup counts each process that
was ever in it or below it, so nothing is missing from the sum of two: the one that pjwd's own processes are
moved into, and the one that it has made for its jobs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.processes import own_cpu_seconds, with_descendants
from tests.support.service import Service, instance_cgroups


@dataclass(frozen=True, slots=True)
class Used:
    """Processor time, in seconds."""

    # pjwd's two processes: the server has the network, the launcher has root
    server: float = 0.0
    launcher: float = 0.0
    # all else, until it enters the cgroup of a job: a spawner, if there is one, and new inits
    spawning: float = 0.0
    # in the cgroups of jobs: inits, and the commands
    jobs: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.server + self.launcher + self.spawning + self.jobs

    def parts(self) -> dict[str, float]:
        """Return the parts by the names that tables give them."""
        return {
            "server": self.server,
            "launcher": self.launcher,
            "spawning": self.spawning,
            "init and command": self.jobs,
        }

    def __add__(self, other: Self) -> "Used":
        return Used(
            self.server + other.server,
            self.launcher + other.launcher,
            self.spawning + other.spawning,
            self.jobs + other.jobs,
        )

    def __sub__(self, other: Self) -> "Used":
        return Used(
            self.server - other.server,
            self.launcher - other.launcher,
            self.spawning - other.spawning,
            self.jobs - other.jobs,
        )


class Accounts:
    """The accounts of one pjwd."""

    def __init__(self, service: Service, own: Path, jobs: Path) -> None:
        """*own*: the cgroup of its processes; *jobs*: the one that holds all of its jobs."""
        self._server: Final = service.pid
        self._launcher: Final = service.launcher_pid()
        self._own: Final = own
        self._jobs: Final = jobs

    def now(self) -> Used:
        """Return the time used until now. Only the difference of two such times has a meaning."""
        server, launcher = own_cpu_seconds(self._server), own_cpu_seconds(self._launcher)
        own = cgroup_seconds(self._own)
        return Used(server, launcher, own - server - launcher, cgroup_seconds(self._jobs))


@contextmanager
def opened(service: Service) -> Iterator[Accounts]:
    """Give the accounts of a pjwd; its processes, but for those of jobs, have their own cgroup."""
    [jobs] = [path for path in instance_cgroups(service.state) if counts_time(path)]
    # jobs are in ROOT/pjw/INSTANCE
    root = jobs.parent.parent
    home = root / _place(service.pid, "cpuacct" if (jobs / "cpuacct.usage").exists() else "")
    own = root / f"pjw-bench-{os.getpid()}-{service.pid}"
    own.mkdir()
    try:
        _move((pid for pid in with_descendants([service.pid]) if not _is_in(pid, jobs)), own)
        yield Accounts(service, own, jobs)
    finally:
        _move(map(int, (own / "cgroup.procs").read_text().split()), home)
        own.rmdir()


def cgroup_seconds(cgroup: Path) -> float:
    """Return the processor time of all processes that were ever in this cgroup, or in a cgroup below it."""
    # v1 in nanoseconds, v2 in microseconds among other things
    if (usage := cgroup / "cpuacct.usage").exists():
        return int(usage.read_text()) / 1e9
    fields = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6


def counts_time(cgroup: Path) -> bool:
    """Whether a cgroup has such an account."""
    try:
        cgroup_seconds(cgroup)
    except (FileNotFoundError, KeyError):
        # another hierarchy of v1
        return False
    return True


def _place(pid: int, controller: str) -> str:
    """Return the path of a process in the hierarchy of a v1 controller; v2 has none (cgroups(7))."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    raise LookupError(f"process {pid} is in no cgroup of {controller or 'v2'}")


def _is_in(pid: int, instance: Path) -> bool:
    try:
        return f"/{instance.name}/" in Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _move(pids: Iterable[int], cgroup: Path) -> None:
    for pid in pids:
        # one that has ended needs none
        with suppress(ProcessLookupError):
            (cgroup / "cgroup.procs").write_text(str(pid))
