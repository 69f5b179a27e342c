"""A network that is cut in mid-stream, between a pjw in a network namespace of its own and pjwd outside."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pjw.certs import authority
from tests.support.scene import Scene, config_of, whole
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import uid_range

# of a network for documentation (RFC 5737), a part of this run's own
PART = os.getpid() % 64 * 4
NETWORK, SERVER, CLIENT = (f"198.51.100.{PART}/30", f"198.51.100.{PART + 1}", f"198.51.100.{PART + 2}")


def ip(*arguments: str) -> None:
    """Do something to a network card."""
    subprocess.run(["ip", *arguments], check=True)


class Wire:
    """A pair of virtual network cards: ours, and one in a namespace of its own."""

    def __init__(self) -> None:
        self.namespace: Final = f"pjw-test-{os.getpid()}"
        self.card: Final = f"pjw{os.getpid()}"
        self._inside: Final = ("netns", "exec", self.namespace, "ip")

    def lay(self) -> None:
        used = subprocess.run(
            ["ip", "route", "show", "root", NETWORK], capture_output=True, check=True
        ).stdout
        assert not used, f"{NETWORK} is in use on this host"
        ip("netns", "add", self.namespace)
        ip("link", "add", self.card, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("address", "add", f"{SERVER}/30", "dev", self.card)
        ip("link", "set", self.card, "up")
        ip(*self._inside, "address", "add", f"{CLIENT}/30", "dev", "eth0")
        self.join()

    def cut(self) -> None:
        # at the far end: ours keeps its address, for those who are on this side
        ip(*self._inside, "link", "set", "eth0", "down")

    def join(self) -> None:
        ip(*self._inside, "link", "set", "eth0", "up")

    def remove(self) -> None:
        # the cards go with the namespace
        ip("netns", "delete", self.namespace)

    def command(self, *command: str) -> list[str]:
        """As seen from the far end: only the network is another."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The wire, joined."""
    wire = Wire()
    try:
        wire.lay()
    except (OSError, subprocess.CalledProcessError):
        if "PJW_VM_GUEST" in os.environ:
            pytest.skip("the virtual machine has no veth; the host of CI runs this")
        raise
    yield wire
    wire.remove()


@pytest.fixture
def far(wire: Wire, tmp_path: Path) -> Iterator[Scene]:
    """A scene whose server listens at its end of the wire."""
    uid_first = uid_range()
    service = Service(tmp_path, config=config_of(uid_first))
    for name in ("server.crt", "server.key"):
        (service.certs / name).unlink()
    authority.write_server(str(service.certs), ["localhost", SERVER])
    service.address = f"{SERVER}:0"
    scene = Scene(service.start(), uid_first)
    yield scene
    scene.close()
    assert service.stop() == 0


# 1 s: TCP sends again what was lost. 45 s: both ends have given the connection up (20 + 10 s) by then.
@pytest.mark.parametrize("seconds", [1, pytest.param(45, marks=pytest.mark.slow)])
def test_the_network_cut_in_mid_stream(wire: Wire, far: Scene, tmp_path: Path, seconds: int) -> None:
    """pjw logs goes on at the exact byte, whether its connection survived or not; nobody else notices."""
    job_id = far.start_steady("alice")
    seen = tmp_path / "far"
    environment = far.service.environment("alice")
    with seen.open("wb") as output:
        reader = subprocess.Popen(
            wire.command(str(BIN / "pjw"), "logs", str(job_id)), env=environment, stdout=output
        )
    try:
        wait_for(lambda: seen.stat().st_size > 0)
        wire.cut()
        far.goes_on()
        far.others_unharmed()
        cut_off = seen.stat().st_size
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(seconds)
        assert seen.stat().st_size <= cut_off + 65_536
        wire.join()
        size = seen.stat().st_size
        wait_for(lambda: seen.stat().st_size > size, 60)
        far.tell(job_id)
        assert reader.wait(60) == 0
    finally:
        reader.kill()
        reader.wait()
    assert whole(seen.read_bytes())
    far.goes_on()
    far.end_known()
    far.output_whole()
    far.nothing_left()
