"""A switch, and machines on it whose cables can be pulled and whose power can be cut.

The switch is a bridge in this process's own network namespace, which `scripts/apart` has made. A machine is a
network, a PID and a mount namespace. So nothing here touches the network of the host.
"""

import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Final

from tests.support.service import end_all

_BRIDGE: Final = "pjw0"
_PREFIX: Final = "10.77.0"
_APART: Final = ("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
# The first process of a machine. Its boot id is the machine's own, so that pjwd sees a restart. The shell
# collects orphans, which become its children, and lives until its stdin ends.
_FIRST: Final = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$1" /proc/sys/kernel/random/boot_id
echo ready
cat
:
"""


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)


def children(pid: int) -> list[int]:
    """The children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Switch:
    """The bridge that all machines are on. This process is on it, too, as a client of the cluster."""

    def __init__(self) -> None:
        if "PJW_APART" not in os.environ:
            raise RuntimeError("machines are made below scripts/apart only")
        _ip("link", "set", "lo", "up")
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("address", "add", f"{_PREFIX}.254/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")


class Machine:
    """A machine, which is off at first."""

    def __init__(self, name: str, number: int, directory: Path) -> None:
        self.name: Final = name
        self.directory: Final = directory
        self.address: Final = f"{_PREFIX}.{number}"
        # a card keeps its address, so no neighbour waits for an old one
        self._card: Final = f"02:00:00:00:00:{number:02x}"
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._process is not None

    @property
    def enter(self) -> list[str]:
        """What runs a command on this machine, before its words."""
        return ["nsenter", f"--target={self._first}", "--net", "--pid", "--mount"]

    def on(self) -> None:
        """Boot it, and put its cable into the switch."""
        self.directory.mkdir(exist_ok=True)
        boot_id = self.directory / "boot_id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        self._process = subprocess.Popen(
            [*_APART, "sh", "-c", _FIRST, "sh", str(boot_id)],
            # as after a boot, not what we happen to have
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # what unshare says of a killed child is no news
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"machine {self.name} did not boot: {self._process.communicate()[1].decode()}")
        [self._first] = children(self._process.pid)
        peer = ("peer", "name", "eth0", "address", self._card, "netns", str(self._first))
        _ip("link", "add", self.name, "type", "veth", *peer)
        _ip("link", "set", self.name, "master", _BRIDGE, "up")
        words = f"ip link set lo up && ip address add {self.address}/24 dev eth0 && ip link set eth0 up"
        subprocess.run([*self.enter, "sh", "-c", words], check=True)

    def cut_power(self, *states: Path) -> None:
        """End everything on it at once, without a last packet; *states*: state directories of its pjwd.

        The cgroups of its jobs go, too, since those of a real machine do not outlive its kernel.
        """
        assert self._process is not None
        # the cable first: sockets of killed processes would still say goodbye
        _ip("link", "delete", self.name)
        os.kill(self._first, signal.SIGKILL)
        self._over()
        for state in states:
            end_all(state)

    def off(self) -> None:
        """End it in good order, when nothing runs on it any more."""
        if self._process is not None:
            assert self._process.stdin is not None
            # at once: a namespace that is over loses its cards only after a while
            _ip("link", "delete", self.name)
            self._process.stdin.close()
            self._over()

    def _over(self) -> None:
        assert self._process is not None
        # the kernel ends a PID namespace's first process last
        with self._process:
            self._process.wait(30)
        self._process = None

    # --- its cable

    def pull(self) -> None:
        """Pull the cable: the machine sees that its link is down."""
        _ip("link", "set", self.name, "down")

    def plug(self) -> None:
        """Put the cable in again."""
        _ip("link", "set", self.name, "up")

    def mute(self) -> None:
        """Have the switch drop all packets from and to it, which it cannot see."""
        _ip("link", "set", self.name, "nomaster")

    def unmute(self) -> None:
        """Have the switch forward its packets again."""
        _ip("link", "set", self.name, "master", _BRIDGE)
