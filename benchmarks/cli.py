"""Measure one `pjw get` as a whole process, next to its interpreter and its library alone."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.pjwd import running
from benchmarks.report import Figure, median
from tests.support.service import BIN, Service, wait_for

ROUNDS: Final = 40
QUICK_ROUNDS: Final = 10
PJW: Final = "pjw get"
# The code that each runs. The figures name the floor that they are compared with.
FLOORS: Final = {"python -c pass": "pass", "python -c 'import grpc'": "import grpc"}


@dataclass(slots=True)
class Contestant:
    """A command line, and the seconds of its runs."""

    command: Sequence[str]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def run(*, quick: bool) -> list[Figure]:
    """Run all in turns, so that other work of the machine hits all alike."""
    with running() as service:
        job_id = service.start_job("true")
        wait_for(lambda: service.job(job_id).HasField("end"))
        contestants = _contestants(service, job_id)
        environment = service.environment()
        said = service.directory / "stdout"
        # the first round warms the cache, and does not count
        for number in range((QUICK_ROUNDS if quick else ROUNDS) + 1):
            for name, contestant in contestants.items():
                wall, cpu = timed(contestant.command, environment, said)
                _check_answer(name, said.read_bytes(), job_id)
                if number:
                    contestant.wall.append(wall)
                    contestant.cpu.append(cpu)
    figures = []
    pjw = contestants.pop(PJW)
    for name, other in contestants.items():
        for kind, own, reference in (("wall", pjw.wall, other.wall), ("CPU", pjw.cpu, other.cpu)):
            figures.append(
                Figure("cli", f"{PJW}, {kind}", median(own) * 1e3, "ms", name, median(reference) * 1e3)
            )
    return figures


def _contestants(service: Service, job_id: int) -> dict[str, Contestant]:
    python = str(BIN / "python")
    found = {PJW: Contestant([str(BIN / "pjw"), "get", str(job_id)])}
    found |= {name: Contestant([python, "-c", code]) for name, code in FLOORS.items()}
    return found


def timed(command: Sequence[str], environment: Mapping[str, str], said: Path) -> tuple[float, float]:
    """Return wall and processor time of a process, from its start until it is reaped; it must succeed."""
    began = time.perf_counter()
    pid = os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(said), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        ],
    )
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return wall, usage.ru_utime + usage.ru_stime


def _check_answer(name: str, said: bytes, job_id: int) -> None:
    """Check the output: a floor prints nothing, and all others the job."""
    if name in FLOORS:
        assert said == b"", said
    else:
        job = json.loads(said)
        assert (job["id"], job["exitCode"]) == (str(job_id), 0), job
