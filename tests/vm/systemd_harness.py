"""pjwd installed as packaging/ says, on a machine that may be broken afterwards, and its user `tester`."""

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from tests.support.service import job_cgroups

PACKAGING: Final = Path(__file__).resolve().parents[2] / "packaging"
UNIT: Final = "pjwd.service"
BIN: Final = Path("/opt/pjw/bin")
ETC: Final = Path("/etc/pjw")
STATE: Final = Path("/var/lib/pjw")
CLIENT: Final = "tester"
CERTS: Final = Path("/home/tester/.pjw")
CALL_SECONDS: Final = 120


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command of the operator; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{journal()}"
    return done.stdout.strip()


def install() -> None:
    """Do as the operator is told in packaging/: user, unit, configuration, certificates."""
    run("systemd-sysusers", PACKAGING / "sysusers.d/pjw.conf")
    shutil.copy(PACKAGING / UNIT, "/etc/systemd/system")
    ETC.mkdir(mode=0o755)
    shutil.copy(PACKAGING / "pjwd.toml", ETC)
    make_certificates()
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", UNIT)


def make_certificates() -> None:
    """Those of the host and of tester, who gets them."""
    run(BIN / "pjwd", "certs", "init", ETC, CLIENT)
    user = pwd.getpwnam(CLIENT)
    CERTS.mkdir(mode=0o700)
    for name in ("ca.crt", f"{CLIENT}.crt", f"{CLIENT}.key"):
        shutil.copy(ETC / name, CERTS)
    for path in (CERTS, *CERTS.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    (ETC / f"{CLIENT}.key").unlink()


def journal() -> str:
    """All that pjwd, and systemd about it, have said."""
    return subprocess.run(
        ["journalctl", "--unit", UNIT, "--no-pager", "--output", "short-precise"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout


def shown(name: str) -> str:
    """A property of the unit."""
    return run("systemctl", "show", "--property", name, "--value", UNIT)


def server_pid() -> int:
    """The main process: the server."""
    return int(shown("MainPID"))


def launcher_pid() -> int:
    """The server's child that runs pjw.launcher."""
    pid = server_pid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [launcher] = [
        child for child in children if b"pjw.launcher" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return int(launcher)


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def pjw_process(*arguments: str) -> "subprocess.Popen[bytes]":
    """Start pjw as the user tester; the caller ends it."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/home/tester",
        "PJW_CA_CRT": str(CERTS / "ca.crt"),
        "PJW_CLIENT_CRT": str(CERTS / f"{CLIENT}.crt"),
        "PJW_CLIENT_KEY": str(CERTS / f"{CLIENT}.key"),
    }
    return subprocess.Popen(
        [BIN / "pjw", *arguments],
        env=environment,
        cwd="/",
        user=CLIENT,
        group=CLIENT,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def pjw(*arguments: str) -> str:
    """Run pjw as the user tester; it must succeed; its output."""
    with pjw_process(*arguments) as process:
        out, err = process.communicate(timeout=CALL_SECONDS)
    assert (process.returncode, err) == (0, b""), f"{arguments}: {err.decode()}{journal()}"
    return out.decode().strip()


@contextmanager
def follower(job_id: str) -> Iterator[IO[bytes]]:
    """The output of a job as `pjw logs` shows it to tester, who goes away at the end."""
    with pjw_process("logs", job_id) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


def get(job_id: str, *options: str) -> dict[str, Any]:
    """What `pjw get` tells of a job."""
    job: dict[str, Any] = json.loads(pjw(*options, "get", job_id))
    return job


def cgroup_of(job_id: str) -> Path:
    """The cgroup of a job."""
    [found] = [path for path in job_cgroups(STATE) if path.name == f"job-{job_id}"]
    return found


def processes_of(job_id: str) -> list[int]:
    """Every process of a job, by its pid outside, the oldest first: init, the command."""
    found = []
    for pid in map(int, (cgroup_of(job_id) / "cgroup.procs").read_text().split()):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            # when it began, in ticks; the lower pid is not the older one where the last one was given away
            found.append((int(words[19]), pid))
    return [pid for _, pid in sorted(found)]
