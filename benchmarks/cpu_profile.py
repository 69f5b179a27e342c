"""Divide the processor time of starts by perf(1), as root: `make profile`.

    python -m benchmarks.cpu_profile [COUNT]

Eight clients start `true` COUNT times (default 1000), and perf samples pjwd's two processes and all that
they start. It prints the milliseconds of one start by process and by the owner of the code, and the most
expensive functions. Sampling itself takes a few per cent: times are a little above those of a benchmark.
"""

import asyncio
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from benchmarks.clients import run_many
from benchmarks.processes import cpu_seconds
from tests.support.service import Service

CLIENTS: Final = 8
COUNT: Final = 1000
HERTZ: Final = 1999
FUNCTIONS: Final = 25
# By the names of the objects in which perf finds code; the first that fits counts.
KINDS: Final = {
    "kernel": r"\[.*\]",
    "gRPC": r"cygrpc.*",
    "protobuf": r"_message.*|.*upb.*",
    "SQLite": r"libsqlite3.*|_sqlite3.*",
    "pjw-init": r"pjw-init",
    "interpreter": r"python3.*|libpython.*|_.*\.so",
    "libc": r"libc[.-].*|ld-linux.*|libpthread.*|libm[.-].*",
}


def main(count: int) -> int:
    """Profile and print; the exit code."""
    if shutil.which("perf") is None:
        print("missing on this system: perf; on Debian: sudo apt-get install linux-perf", file=sys.stderr)
        return 1
    with pjwd.running() as service, pjwd.directory() as directory:
        # warms caches and the interpreter
        asyncio.run(run_many(service, CLIENTS, 200))
        samples = directory / "perf.data"
        pids = service.pid, service.launcher_pid()
        before = cpu_seconds(*pids)
        with _recording(pids, samples):
            asyncio.run(run_many(service, CLIENTS, count))
        each = (cpu_seconds(*pids) - before) / count * 1e3
        print(f"{each:.2f} ms of processor time for one start and its end, {CLIENTS} clients\n")
        _print_kinds(_shares(samples, "pid,comm,dso"), service, each)
        print()
        for (comm, name, function), share in _shares(samples, "comm,dso,symbol").most_common(FUNCTIONS):
            # "[k] name": perf marks those of the kernel
            print(f"{share * each / 100:7.3f} ms  {comm:14}{_kind(name):12} {function.split('] ')[-1]}")
    return 0


@contextmanager
def _recording(pids: tuple[int, int], samples: Path) -> Iterator[None]:
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-o", str(samples)]
    with subprocess.Popen([*command, "-p", ",".join(map(str, pids))], stderr=subprocess.PIPE) as perf:
        try:
            time.sleep(0.5)
            yield
        finally:
            perf.send_signal(2)
            assert perf.stderr is not None
            print(perf.stderr.read().decode(), end="", file=sys.stderr)


def _shares(samples: Path, keys: str) -> Counter[tuple[str, ...]]:
    """Return the percentage of samples for each value of these keys (perf-report(1), --sort)."""
    command = ["perf", "report", "-i", str(samples), "--sort", keys, "--stdio", "-q", "--percent-limit", "0"]
    text = subprocess.run([*command, "-t", "\t"], check=True, capture_output=True, text=True).stdout
    found: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        # a symbol may have more columns behind it
        share, *values = (cell.strip() for cell in line.split("\t")[: 2 + keys.count(",")])
        if share.endswith("%"):
            found[tuple(values)] += float(share.rstrip("%"))  # type: ignore[assignment]
    return found


def _print_kinds(shares: Counter[tuple[str, ...]], service: Service, each: float) -> None:
    rows: dict[str, Counter[str]] = {}
    for (pid, comm, name), share in shares.items():
        who = "server" if int(pid.split(":")[0] or 0) == service.pid else comm
        rows.setdefault(who, Counter())[_kind(name)] += share * each / 100  # type: ignore[assignment]
    kinds = [*KINDS, "other"]
    print(f"{'':16}" + "".join(f"{kind:>12}" for kind in [*kinds, "all"]))
    for who, row in sorted(rows.items(), key=lambda item: -item[1].total()):
        print(f"{who:16}" + "".join(f"{row[kind]:12.2f}" for kind in kinds) + f"{row.total():12.2f}")


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), "other")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT))
