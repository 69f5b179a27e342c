"""docs/trial.md, typed on two machines that have never seen pjw.

    python -m tests.support.trial WHEEL

`server` is a Debian 12 with what the README names, and a clone of the last commit in /root/pjw. `laptop` is a
Debian 13 with python3-venv alone, and with the users ann and ben. Both know the server as jobs.example.org,
and both have the same /media/stick, with the WHEEL of the client on it.
It ends with 1 at the first line of the document that is not as shown, and names the line.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.support import documents

HERE: Final = Path(__file__).parents[2]
DOCUMENT: Final = HERE / "docs/trial.md"
ROOTS: Final = Path(os.environ.get("PJW_ROOTS", "/var/tmp/pjw-roots"))
NAME: Final = "jobs.example.org"
ADDRESSES: Final = {"server": "10.77.0.1", "laptop": "10.77.0.2"}
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# an installation from nothing, over a network that may be slow
SECONDS: Final = 600
# no line of the document is cut or goes on in the next one
COLUMNS: Final = 250


def main() -> None:
    """Make the machines, and type."""
    # a shell starts what is in its background with SIGINT ignored, and the terminals would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commands = documents.commands_of(DOCUMENT)
    with ExitStack() as stack:
        ROOTS.mkdir(exist_ok=True)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trial-", dir=ROOTS)))
        stick = work / "stick"
        stick.mkdir()
        shutil.copy(sys.argv[1], stick)
        pids = {
            "server": stack.enter_context(machine("12", "server", work, "python3", "gcc", "make")),
            "laptop": stack.enter_context(machine("13", "laptop", work, "python3-venv")),
        }
        connect(pids)
        run("git", "clone", "--quiet", "--no-hardlinks", HERE, work / "server/root/pjw")
        for user in ("ann", "ben"):
            run("nsenter", "--target", pids["laptop"], "--all", "useradd", "--create-home", user)
        documents.play(commands, lambda where: terminal_of(where, pids))
    print(f"{DOCUMENT.name}: each of {len(commands)} commands shows what the document shows")


@contextmanager
def machine(release: str, name: str, work: Path, *packages: str) -> Iterator[int]:
    """A new machine with its files in *work*/*name*; the pid of its first process."""
    with subprocess.Popen(
        [HERE / "scripts/fresh-root", release, name, work / name, *packages],
        env={**os.environ, "SHARE": str(work / "stick")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        pid = holder.stdout.readline()
        if not pid:
            sys.exit(f"cannot make the machine {name}: see above")
        yield int(pid)


def connect(pids: dict[str, int]) -> None:
    """A network between the machines, on which the server has its name."""
    run(
        *("ip", "link", "add", "eth0", "netns", pids["server"], "type", "veth"),
        *("peer", "name", "eth0", "netns", pids["laptop"]),
    )
    for name, pid in pids.items():
        run("nsenter", "--target", pid, "--net", "ip", "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        run("nsenter", "--target", pid, "--net", "ip", "link", "set", "eth0", "up")
        hosts = f"echo {ADDRESSES['server']} {NAME} >>/etc/hosts"
        run("nsenter", "--target", pid, "--all", "sh", "-c", hosts)


def terminal_of(where: str, pids: dict[str, int]) -> documents.Terminal:
    """A terminal of root on a machine (`server#`), or of a user of the laptop (`ann$`)."""
    name, user = (where[:-1], "root") if where.endswith("#") else ("laptop", where[:-1])
    home = Path("/root" if user == "root" else f"/home/{user}")
    shell = [
        *("nsenter", "--target", str(pids[name]), "--all", f"--wdns={home}"),
        *("setsid", "--ctty", "setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"),
        *("bash", "--norc", "--noediting"),
    ]
    env = {"HOME": str(home), "USER": user, "PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "NO_COLOR": "1"}
    return documents.Terminal(shell, Path("/"), env, columns=COLUMNS, seconds=SECONDS)


def run(*command: object) -> None:
    """Run a command of the preparations."""
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(str(error))
