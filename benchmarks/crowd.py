"""Many processes at once: who they are, and what they and the kernel hold for them."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.usage import pss_bytes

KIB: Final = 1024
# What the kernel holds for a process and its namespaces; it is in no process's PSS.
KERNEL_FIELDS: Final = ("Slab", "KernelStack", "PageTables", "Percpu")


def with_descendants(pids: Iterable[int]) -> list[int]:
    """These processes and all below them."""
    found: list[int] = []
    level = list(pids)
    while level:
        found += level
        level = [child for pid in level for child in children(pid)]
    return found


def children(pid: int) -> list[int]:
    """The children of all threads of a process; none of one that has ended."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def name_of(pid: int) -> str:
    """The kernel's short name of a process; empty of one that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is taken, in KiB: by processes (PSS), by the kernel for itself, and of what is available."""

    processes: float
    kernel: float
    available: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> Self:
        """Of these processes, and of the whole machine."""
        text = Path("/proc/meminfo").read_text()
        return cls(
            processes=sum(map(pss_bytes, pids)) / KIB,
            kernel=sum(_field(text, name) for name in KERNEL_FIELDS),
            available=-_field(text, "MemAvailable"),
        )

    def each(self, before: Self, count: int) -> "Memory":
        """What each of *count* has added since."""
        return Memory(
            (self.processes - before.processes) / count,
            (self.kernel - before.kernel) / count,
            (self.available - before.available) / count,
        )


def _field(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert match is not None, name
    return int(match[1])
