"""Read the time and memory of processes, and the memory that the kernel holds for them, by its own count."""

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

KIB: Final = 1024
# The kernel's memory for a process and its namespaces, which is in no process's PSS.
KERNEL_FIELDS: Final = ("Slab", "KernelStack", "PageTables", "Percpu")


def own_cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and all its threads."""
    # clock_getcpuclockid(3) has no binding; /proc/PID/stat counts in hundredths of a second
    return time.clock_gettime((~pid << 3) | 2)


def cpu_seconds(*pids: int) -> float:
    """Return the processor time of these processes, their threads, and their collected children."""
    seconds = 0.0
    for pid in pids:
        seconds += own_cpu_seconds(pid)
        # after the name, which may hold any characters: state is the first, cutime and cstime are 14 and 15
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


def pss_bytes(pid: int) -> int:
    """Return the memory, with each shared page divided among its processes."""
    return _kib(f"/proc/{pid}/smaps_rollup")["Pss"] * KIB


def peak_rss_bytes(pid: int) -> int:
    """Return the most memory that it had at once since `forget_peak`."""
    return _kib(f"/proc/{pid}/status")["VmHWM"] * KIB


def forget_peak(pid: int) -> None:
    """Reset the peak (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def with_descendants(pids: Iterable[int]) -> list[int]:
    """Return these processes and all below them."""
    found: list[int] = []
    level = list(pids)
    while level:
        found += level
        level = [child for pid in level for child in children(pid)]
    return found


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process; none of one that has ended."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def name_of(pid: int) -> str:
    """Return the kernel's short name of a process; empty of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in KiB: that of processes (PSS), that of the kernel, and the loss of available memory."""

    processes: float
    kernel: float
    available: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> Self:
        """Return the memory of these processes, and of the whole machine."""
        fields = _kib("/proc/meminfo")
        return cls(
            processes=sum(map(pss_bytes, pids)) / KIB,
            kernel=sum(fields[name] for name in KERNEL_FIELDS),
            available=-fields["MemAvailable"],
        )

    def each(self, before: Self, count: int) -> "Memory":
        """Return the growth since then, divided by *count*."""
        return Memory(
            (self.processes - before.processes) / count,
            (self.kernel - before.kernel) / count,
            (self.available - before.available) / count,
        )


def _kib(path: str) -> dict[str, int]:
    """Return the fields of a file of /proc that are memory."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    return {name: int(value) for name, value in found}
