"""Copy files into a job and out of it by the user's command, `pjw cp`, and compare it with Logs and tar.

The reference of one large file is `pjw logs` of as much output. That output is discarded, but a copy is
written twice: as the input or output of its session, which no crash cuts short, and as the file. So another
reference is `cp` that writes it twice. The reference of many small files is `tar | ssh localhost tar`, by an
sshd of this machine on a private port, or, without an sshd, tar into tar through a pipe, which has no network
and no encryption: the row names it. We time all in turns.
"""

import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import exec as sessions
from benchmarks import pjwd
from benchmarks.report import Figure, Held, median
from tests.support.service import BIN, Service

SUITE: Final = "files"
MB: Final = 10**6
MIB: Final = 1024**2
RATE_GOAL: Final = 0.7
SMALL_GOAL: Final = 2.0
SMALL_COUNT: Final = 10_000
SMALL_BYTES: Final = 2_000
PER_DIRECTORY: Final = 100


def run(*, quick: bool) -> list[Figure]:
    """Measure both."""
    size, rounds = (128 * MIB, 2) if quick else (1024 * MIB, 3)
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        service = stack.enter_context(pjwd.running())
        return [*_large(service, directory, size, rounds), *_small(service, directory, rounds)]


def _timed(service: Service, command: Sequence[str]) -> float:
    """Return the seconds that a command takes; raises if it fails."""
    began = time.perf_counter()
    subprocess.run(command, env=service.environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _large(service: Service, directory: Path, size: int, rounds: int) -> list[Figure]:
    """Copy one file there and back, and read as much output of an ended job."""
    source, back = directory / "large", directory / "back"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    written = pjwd.finished_job(service, f"head -c {size} /dev/zero", size)
    job = pjwd.start(service, ["sleep", "3600"])
    pjw = str(BIN / "pjw")
    rates: defaultdict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        seconds = {
            "logs": _timed(service, [pjw, "logs", str(written)]),
            "in": _timed(service, [pjw, "cp", str(source), f"{job}:large"]),
            "out": _timed(service, [pjw, "cp", f"{job}:large", str(back)]),
            "twice": _timed(service, ["sh", "-c", f"cp {source} {back}1 && cp {source} {back}2"]),
        }
        for copy in directory.glob("back*"):
            copy.unlink()
        # caches are warm from the second on
        if turn:
            for what, each in seconds.items():
                rates[what].append(size / each / MB)
    source.unlink()
    return [
        Figure(
            SUITE,
            f"a file of {size // MIB} MiB, {words}",
            median(rates[what]),
            "MB/s",
            against,
            median(rates[other]),
            goal,
            more_is_better=True,
        )
        for what, words in (("in", "into a job"), ("out", "out of a job"))
        for other, against, goal in (("logs", "pjw logs", RATE_GOAL), ("twice", "cp, twice", None))
    ]


def _small(service: Service, directory: Path, rounds: int) -> list[Figure]:
    """Copy many files there and back, with a job's start, and through ssh or a pipe."""
    tree = directory / "small"
    for number in range(SMALL_COUNT):
        below = tree / f"d{number // PER_DIRECTORY}"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"f{number}").write_bytes(bytes(SMALL_BYTES))
    job = pjwd.start(service, ["sleep", "3600"])
    pjw = str(BIN / "pjw")
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        ssh: list[str] = []
        if (sshd := sessions.find_sshd()) is not None:
            ssh = sessions.open_sshd(stack, sshd, directory)
        else:
            print("files: no sshd here: small files are compared with tar through a pipe", file=sys.stderr)
        for turn in range(rounds + 1):
            there, back = directory / "there", directory / "back"
            there.mkdir()
            other = f"{' '.join(ssh)} " if ssh else ""
            each = {
                "tar": _timed(service, ["sh", "-c", f"tar -C {tree} -c . | {other}tar -C {there} -x"]),
                "in": _timed(service, [pjw, "cp", str(tree), f"{job}:small{turn}"]),
                "out": _timed(service, [pjw, "cp", f"{job}:small{turn}", str(back)]),
                "upload": _timed(service, [pjw, "run", "--upload", str(tree), "true"]),
            }
            shutil.rmtree(there)
            shutil.rmtree(back)
            if turn:
                for what, taken in each.items():
                    seconds[what].append(taken)
    against = "tar | ssh localhost tar" if ssh else "tar | tar"
    return [
        Figure(
            SUITE,
            f"{SMALL_COUNT:,} small files, {words}",
            median(seconds[what]),
            "s",
            against,
            median(seconds["tar"]),
            SMALL_GOAL if ssh else None,
            held=Held.IF_THERE if ssh else Held.NEVER,
        )
        for what, words in (
            ("in", "into a job"),
            ("out", "out of a job"),
            ("upload", "uploaded for a job that runs true"),
        )
    ]
