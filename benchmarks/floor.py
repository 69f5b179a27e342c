"""Run floor.c, which starts a command again and again and times it: the kernel's floor, and the peers.

One C program times everything but services, so that no figure includes Python's own cost.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, NamedTuple, Self

from tests.support.service import wait_for

SOURCE: Final = Path(__file__).with_name("floor.c")
# The namespaces of a job: all but that of users.
NAMESPACES: Final = "pmniuc"
# All but that of the network, which takes the kernel longer than the others together.
WITHOUT_NET: Final = NAMESPACES.replace("n", "")
# Instead of letters for namespaces: a start ends with the first byte that the command writes.
TOLD: Final = "o"
# The limits of a job by their files, in the order in which they can be written (memsw is never below memory).
_LIMIT_FILES: Final = (
    *("cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.max"),
    *("memory.swappiness", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    *("memory.max", "memory.swap.max", "pids.max", "io.max"),
    *(f"blkio.throttle.{what}_device" for what in ("read_bps", "write_bps", "read_iops", "write_iops")),
)


def build(directory: Path, source: Path = SOURCE) -> Path:
    """Compile a C file as a static program into *directory*."""
    program = directory / source.stem
    subprocess.run(["gcc", "-O2", "-static", "-o", program, source], check=True)
    return program


class Run(NamedTuple):
    """Seconds from the beginning until the command was executed, and until its end was known."""

    start: float
    end: float


class Floor:
    """A process that starts *command* on each request. Closes with the context."""

    def __init__(
        self,
        program: Path,
        letters: str,
        command: Sequence[str],
        *,
        cgroups: Sequence[str] = (),
        within: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """See floor.c for *letters* and *cgroups*; *within* is a command line that executes another one.

        *environment* is added to ours.
        """
        self._command: Final = command
        self._cgroups: Final = [word for word in cgroups if word.startswith("/")]
        self._process: Final = subprocess.Popen(
            [*within, program, letters, *cgroups, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **environment},
        )
        assert self._process.stdout is not None
        self._lines: Final = os.fdopen(os.dup(self._process.stdout.fileno()), "r")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._lines.close()
        if kind is not None:
            wait_for(lambda: all(map(_removed, self._cgroups)))

    @property
    def pid(self) -> int:
        """The process that is the parent of every run."""
        return self._process.pid

    def ask(self, count: int) -> None:
        """Have it begin *count* runs, one after the other; at most one for each byte that a pipe holds."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"." * count)

    def answer(self) -> Run:
        """Wait for the next run. Raises RuntimeError when the command failed."""
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} failed under the benchmark")
        start, end = line.split()
        return Run(int(start) / 1e9, int(end) / 1e9)

    def run(self) -> Run:
        """One run."""
        self.ask(1)
        return self.answer()


def _removed(cgroup: str) -> bool:
    # perhaps the last command has not ended yet
    with suppress(OSError):
        os.rmdir(cgroup)
    return not os.path.isdir(cgroup)


def run_all(floors: Sequence[Floor], count: int) -> float:
    """Have all floors run at once, *count* runs each; return the seconds until the last one ended."""
    began = time.perf_counter()
    for floor in floors:
        floor.ask(count)
    for floor in floors:
        for _ in range(count):
            floor.answer()
    return time.perf_counter() - began


def cgroups_like(job: Iterable[Path], name: str) -> list[str]:
    """Return words for floor.c: cgroups *name* with a running job's limits, next to its instance's."""
    words = []
    for directory in job:
        words.append(str(directory.parent.parent / name))
        for limit in _LIMIT_FILES:
            path = directory / limit
            for line in path.read_text().splitlines() if path.exists() else ():
                words += [f"{limit}={line}"] if line not in ("max", "-1") else []
    return words
