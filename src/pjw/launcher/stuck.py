"""Processes that were killed and are still there: which, and the cause of each one's wait.

A process in an uninterruptible sleep (state D) ends when the kernel has the thing it waits for, and for no
signal: the answer of an NFS or FUSE server, or of a disk.
"""

import signal
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

from pjw.launcher.processes import status_of
from pjw.launcher.protocol import Remaining

# More processes are counted and not named. Beyond the second number none is looked at: other requests wait.
NAMED_MAX: Final = 4
LOOKED_AT_MAX: Final = 200
# The kernel's words for a process that waits for nothing, or whose wait we may not know.
_NO_WCHAN: Final = ("0", "")
# of <linux/sched.h>
_PF_EXITING: Final = 0x4
_KILL_BIT: Final = 1 << (signal.SIGKILL - 1)


def describe(pids: Collection[int]) -> Remaining:
    """Look at the processes of a job, init among them, that should have ended."""
    init: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for pid in islice(pids, LOOKED_AT_MAX):
        namespaces = [int(word) for word in status_of(pid, b"NSpid")]
        if namespaces:
            (init if namespaces[-1] == 1 else others).append((pid, namespaces[-1]))
    named = others or init
    words = ", ".join(_process(*both) for both in named[:NAMED_MAX])
    if more := max(0, len(named) - NAMED_MAX) + max(0, len(pids) - LOOKED_AT_MAX):
        words += f" and {more} more"
    return Remaining(words, bool(others) and all(_is_killed(pid) for pid, _ in others))


def _process(pid: int, shown: int) -> str:
    """Describe one of them, by its pid as the job sees it; with the available parts of proc(5)."""
    name = b" ".join(status_of(pid, b"Name")).decode("ascii", "replace")
    safe = "".join(
        character if character.isascii() and character.isprintable() else "?" for character in name
    )
    state = b"".join(status_of(pid, b"State")[:1]).decode()
    where = ""
    with suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text(errors="replace")
    waits = f" in {where}" if where not in _NO_WCHAN and where.isprintable() else ""
    return f"process {shown} ({safe}) in state {state or '?'}{waits}"


def _is_killed(pid: int) -> bool:
    """Return whether SIGKILL is pending, for the process or its main thread; or it exits already."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(word, 16) for name in (b"SigPnd", b"ShdPnd") for word in status_of(pid, name)]
    return bool(flags & _PF_EXITING) or any(signals & _KILL_BIT for signals in pending)
