"""systemctl, as far as a document needs it on a machine of namespaces: it runs ExecStart of our own units.

    python -m tests.support.stand_in_systemctl VERB [--now] UNIT

tests/vm has the units under the real systemd. This one has what an operator sees of it: a service that starts
when the paths of its conditions are there, as its user, in its directories, and is ready when this returns.
"""

import os
import pwd
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

PACKAGING: Final = Path(__file__).parents[2] / "packaging"
READY_SECONDS: Final = 60
# a tmpfs of each machine's own
RUN: Final = Path("/run/pjw")


def main(verb: str, *words: str) -> int:
    """Do it; the exit code."""
    name = words[-1].removesuffix(".service")
    unit = (PACKAGING / f"{name}.service").read_text()
    match verb:
        case "start":
            start(name, unit)
        case "stop" | "disable":
            stop(name)
        case "restart":
            stop(name)
            start(name, unit)
        case "is-active":
            print("active" if main_pid(name) else "inactive")
            return 0 if main_pid(name) else 3
        case _:
            sys.exit(f"no {verb} here")
    return 0


def keys(unit: str, key: str) -> list[str]:
    """The values of a key of a unit."""
    return re.findall(rf"^{key}=(.+)$", unit, re.MULTILINE)


def start(name: str, unit: str) -> None:
    """Start the main process, and wait until it says that it is ready."""
    if not all(map(os.path.exists, keys(unit, "ConditionPathExists"))):
        return
    users = keys(unit, "User")
    uid = pwd.getpwnam(users[0]).pw_uid if users else 0
    for base, key, mode in (("/var/lib", "State", 0o700), ("/var/log", "Logs", 0o700)):
        for directory in keys(unit, f"{key}Directory"):
            path = os.path.join(base, directory)
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o711 if base == "/var/lib" and not uid else mode)
            os.chown(path, uid, uid)
    [command] = keys(unit, "ExecStart")
    program, *arguments = command.split()
    # The interpreter may lie where only root looks; the gateway gives this up when all is loaded.
    may_look = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *may_look] if uid else []
    with (
        tempfile.TemporaryDirectory(prefix="notify-", dir=RUN) as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        os.chmod(directory, 0o711)  # noqa: S103  the service is another user
        notified.bind(f"{directory}/notify")
        os.chmod(f"{directory}/notify", 0o666)  # noqa: S103  as before
        notified.settimeout(READY_SECONDS)
        with (RUN / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *become,
                    os.path.join(os.path.dirname(sys.executable), os.path.basename(program)),
                    *arguments,
                ],
                env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "NOTIFY_SOCKET": f"{directory}/notify"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (RUN / f"{name}.pid").write_text(str(process.pid))
        try:
            while b"READY=1" not in notified.recv(4096):
                pass
        except TimeoutError:
            sys.exit(f"{name} is not ready:\n{(RUN / f'{name}.log').read_text()}")


def main_pid(name: str) -> int:
    """The pid of the main process; 0 when there is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = int((RUN / f"{name}.pid").read_text())
        os.kill(pid, 0)
        # of a process that has ended, and that nobody has waited for
        if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
            return pid
    return 0


def stop(name: str) -> None:
    """End the main process alone, as KillMode=process does, and wait for it."""
    if pid := main_pid(name):
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        select.select([pidfd], [], [], READY_SECONDS)
        os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
