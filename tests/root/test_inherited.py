"""Nothing of how pjwd was started reaches a job, or ends pjwd: what survives an exec is set anew (B2)."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.model import ExitStatus, JobSpec, Limits
from tests.support.init_harness import HAS_SYS_RESOURCE
from tests.support.service import BIN, Service
from tests.support.worker_harness import Bench

DOCUMENT = Path(__file__).parents[2] / "docs/configuration.md"
MIB = 1024**2
OUTPUT_BYTES = 21 * MIB
SECONDS = 60
# SIGPIPE and SIGXFSZ
IGNORED_BY_PYTHON = f"{1 << 12 | 1 << 24:016x}"
# what would end pjwd in the middle of its work
LIFTED = [
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_NPROC,
]
# soft limits that are odd, and where a hard one can be raised again (CAP_SYS_RESOURCE) hard ones too
LIMITS = {
    "nofile": 8192,
    "stack": 4 * MIB,
    "memlock": 65536,
    "msgqueue": 0,
    "fsize": 20 * MIB,
    "sigpending": 100,
    "cpu": 3000,
    "as": 8 << 30,
    "core": 0,
    "nproc": 3000,
    "data": 8 << 30,
    "rss": 8 << 30,
    "locks": 50,
    "rttime": 9_999_999,
    **({"nice": 25, "rtprio": 9} if HAS_SYS_RESOURCE else {}),
}
ODD = (
    *(
        "prlimit",
        *(f"--{name}={value}:{value if HAS_SYS_RESOURCE else ''}" for name, value in LIMITS.items()),
    ),
    *("nice", "-n", "5", "ionice", "-c", "3", "setarch", "--addr-no-randomize", "chrt", "--batch", "0"),
    *("env", "--ignore-signal", "--block-signal", "GRPC_POLL_STRATEGY=none"),
    *("sh", "-c", 'umask 0; exec "$@" 0<&- 1>&-', "sh"),
)
LOOK = """
import json, os, resource, subprocess
names = [name for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"]
limits = {name: resource.getrlimit(getattr(resource, name)) for name in names}
with open("/proc/self/limits") as table:
    limits["RLIMIT_LOCKS"] = next(line.split()[3:5] for line in table if line.startswith("Max file locks"))
ioprio = subprocess.run(["ionice", "-p", str(os.getpid())], capture_output=True, text=True).stdout.strip()
with open("/proc/self/personality") as file: persona = int(file.read(), 16)
with open("/proc/self/timerslack_ns") as file: slack = int(file.read())
umask = os.umask(0)
with open("/proc/self/status") as file: status = dict(line.split(":", 1) for line in file)
signals = [status["SigBlk"].strip(), status["SigIgn"].strip(), umask]
print(json.dumps([limits, os.getpriority(0, 0), os.sched_getscheduler(0), ioprio, persona, slack, signals]))
"""


def expected(name: str) -> list[int]:
    """What the document says of a limit, or as much of it as this machine allows."""
    row = re.search(rf"^\| `{name}` \| (\w+) \| (\w+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    words = row.groups() if row else ("unlimited", "unlimited")
    most = math.inf if HAS_SYS_RESOURCE else unlimited(resource.getrlimit(getattr(resource, name))[1])
    values = [min(most, math.inf if word == "unlimited" else int(word)) for word in words]
    return [resource.RLIM_INFINITY if value == math.inf else int(value) for value in values]


def unlimited(value: int) -> float:
    """A limit as a number that can be compared."""
    return math.inf if value == resource.RLIM_INFINITY else value


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


def test_neither_a_job_nor_pjwd_has_what_it_was_started_with(make_service: Callable[..., Service]) -> None:
    """Every limit that Linux has, and what else an exec passes on; and the output may be what it may be."""
    service = make_service()
    original = service.command
    service.command = lambda *extra: [*ODD, *original(*extra)]  # type: ignore[method-assign]
    service.start()
    looked = service.ok("run", "/usr/bin/python3", "-I", "-S", "-c", LOOK)
    limits, *rest = json.loads(looked)
    assert limits.pop("RLIMIT_LOCKS") == ["unlimited", "unlimited"]
    assert len(limits) == 15
    assert limits == {name: expected(name) for name in limits}
    assert rest == [0, 0, "none: prio 0", 0, 50_000, ["0" * 16, IGNORED_BY_PYTHON, 0o022]]
    assert len(service.ok("run", "head", "-c", str(OUTPUT_BYTES), "/dev/zero")) == OUTPUT_BYTES
    for pid in (service.pid, service.launcher_pid()):
        assert (status(pid)["SigBlk"], status(pid)["Umask"]) == ("0" * 16, "0077")
        assert int(status(pid)["SigIgn"], 16) & 1 << (signal.SIGCHLD - 1) == 0
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.path.exists(f"/proc/{pid}/fd/{number}") for number in range(3)] == [True] * 3
        for limit in LIFTED if HAS_SYS_RESOURCE else ():
            assert resource.prlimit(pid, limit) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


async def test_a_program_that_ignores_its_children_may_have_a_worker(bench: Bench) -> None:
    """In the library SIGCHLD is the program's: its worker starts, and closes without an error."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        worker = await bench.open()
        job = await worker.start(JobSpec("exit 3"))
        assert (await worker.wait(job.id)).exit_status == ExitStatus(code=3)
        await bench.close(worker)
        with pytest.raises(ConfigError, match="ceiling"):
            await bench.open(default_limits=Limits(pids_max=10), ceiling=Limits(pids_max=5))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_ctrl_c_that_was_blocked(service: Service) -> None:
    """A signal that whoever started pjw has blocked ends it all the same."""
    pjw = service.program(["env", "--block-signal", str(BIN / "pjw"), "run", "echo here; exec sleep 1000"])
    with pjw:
        assert pjw.stdout is not None
        assert pjw.stdout.readline() == b"here\n"
        pjw.send_signal(signal.SIGTERM)
        assert pjw.wait(SECONDS) == 128 + signal.SIGTERM


def test_no_descriptor_of_ours_is_a_standard_one() -> None:
    """A program that is started without them opens them, on nothing."""
    program = "from pjw.process import *; open_standard_descriptors(); print('lost', file=sys.stderr);"
    program += (
        "print(*(os.path.realpath(f'/proc/self/fd/{n}') for n in range(3)), file=open(sys.argv[1], 'w'))"
    )
    command = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&- ', "sh", sys.executable, "-c", program]
    with tempfile.NamedTemporaryFile() as told:
        subprocess.run([*command, told.name], check=True, timeout=SECONDS)
        assert told.read() == b"/dev/null /dev/null /dev/null\n"
