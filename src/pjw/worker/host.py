"""The resources of this host, and the part that all jobs may use unless the operator sets another."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from pjw.model import Limits, Sums
from pjw.worker.settings import NO_CEILING

# The rest is for the host's own services, pjwd, and root's shell.
PERCENT_OF_MEMORY: Final = 80
PERCENT_OF_PIDS: Final = 80
PERCENT_OF_CPUS: Final = 90


def resources() -> Sums:
    """Return the memory, processes and processor time of this host, all of it."""
    return Sums(_memory_bytes(), _pids(), (os.cpu_count() or 1) * 1000)


def default_sums() -> Sums:
    """Return the most that all jobs may use together by default."""
    host = resources()
    return Sums(
        host.memory_max_bytes * PERCENT_OF_MEMORY // 100,
        host.pids_max * PERCENT_OF_PIDS // 100,
        host.cpu_max_millicores * PERCENT_OF_CPUS // 100,
    )


def memory_of(sums: Sums) -> int:
    """Return the bytes of memory that all jobs have together: their sum, or without one all the host's."""
    return sums.memory_max_bytes or resources().memory_max_bytes


def default_ceiling(sums: Sums, defaults: Limits) -> Limits:
    """Return the default ceilings: the most that can be given, or a default limit that is higher.

    Of processor time that is all that the host has, though the sum is less: such a limit promises nothing.
    """
    host = resources()
    most = {
        "memory_max_bytes": memory_of(sums),
        "pids_max": sums.pids_max or host.pids_max,
        "cpu_max_millicores": host.cpu_max_millicores,
    }
    unasked = {name: getattr(defaults, name) for name in most}
    # a default of 0 is no limit, which is above any
    return replace(NO_CEILING, **{name: unasked[name] and max(most[name], unasked[name]) for name in most})


def _memory_bytes() -> int:
    # `MemTotal:       24684092 kB` (proc_meminfo(5))
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


def _pids() -> int:
    # Either bounds processes and threads together (proc_sys_kernel(5)).
    names = ("pid_max", "threads-max")
    return min(int(Path("/proc/sys/kernel", name).read_text(encoding="ascii")) for name in names)
