"""Machines for a document: namespaces of this host, on one network, each with directories of its own.

They share the kernel, so state directories on two of them must not have the same path, by which jobs' cgroups
are named.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.support import documents
from tests.support.service import BIN

ROOT: Final = Path(__file__).parents[2]
COLUMNS: Final = 250
PATH: Final = f"/media/bin:{BIN}:{os.environ['PATH']}"
# each a layer of the machine's own above the host's
_LAYERS: Final = ("etc", "root")
_SYSTEMCTL: Final = f"""#!/bin/sh
PYTHONPATH={ROOT} exec {sys.executable} -B -m tests.support.stand_in_systemctl "$@"
"""


@contextmanager
def machines(directory: Path, addresses: Mapping[str, str], hosts: str) -> Iterator[dict[str, int]]:
    """Machines with these names and addresses, which know *hosts*; the pid of a process in each.

    What is in *directory*/NAME/etc, root and home is there from the start; `home` is /media/home.
    """
    stick, programs = directory / "stick", directory / "bin"
    os.makedirs("/run/pjw", exist_ok=True)
    stick.mkdir()
    programs.mkdir()
    (programs / "systemctl").write_text(_SYSTEMCTL)
    (programs / "systemctl").chmod(0o755)
    with ExitStack() as stack:
        pids: dict[str, int] = {}
        switch = stack.enter_context(
            _holder(["unshare", "--net"], "ip link add br0 type bridge && ip link set br0 up")
        )
        for name, address in addresses.items():
            made = directory / name
            for each in ("lib", "log", "home", *_LAYERS, *(f"{layer}.work" for layer in _LAYERS)):
                (made / each).mkdir(parents=True, exist_ok=True)
            (made / "etc/hosts").write_text(hosts)
            layers = "; ".join(
                f"mount -t overlay -o lowerdir=/{layer},upperdir={made}/{layer},workdir={made}/{layer}.work"
                f" overlay /{layer}"
                for layer in _LAYERS
            )
            script = (
                f"set -e; hostname {name}; mount -t tmpfs tmpfs /media; mkdir /media/stick;"
                f" mount --bind {stick} /media/stick; mount -t tmpfs -o mode=755 tmpfs /run/pjw; {layers};"
                f" mkdir /media/home /media/bin; mount --bind {made}/home /media/home;"
                f" mount --bind {programs} /media/bin;"
                f" mount --bind {made}/log /var/log; mount --bind {made}/lib /var/lib; ip link set lo up"
            )
            pid = stack.enter_context(_holder(["unshare", "--net", "--mount", "--uts"], script))
            ends = ("eth0", "netns", pid, "type", "veth", "peer", "name", name, "netns", switch)
            _run("ip", "link", "add", *ends)
            _run("nsenter", "--target", switch, "--net", "ip", "link", "set", name, "master", "br0", "up")
            for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                _run("nsenter", "--target", pid, "--net", "ip", *words)
            pids[name] = pid
        yield pids


@contextmanager
def _holder(namespaces: list[str], script: str) -> Iterator[int]:
    # says so when all is there, and ends with its stdin
    command = [*namespaces, "sh", "-c", f"{script} && echo ready && exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid


def entered(pid: int, *command: object) -> list[str]:
    """A command, on a machine."""
    return ["nsenter", "--target", str(pid), "--net", "--mount", "--uts", *map(str, command)]


def terminal(pid: int, home: str) -> documents.Terminal:
    """A terminal on a machine, in a home of its own."""
    shell = entered(pid, f"--wdns={home}", "setsid", "--ctty", "bash", "--norc", "--noediting")
    env = {"HOME": home, "PATH": PATH, "LANG": "C.UTF-8", "NO_COLOR": "1"}
    return documents.Terminal(shell, Path("/"), env, columns=COLUMNS)


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)
