"""docs/from-one-machine-to-a-cluster.md: whoever types what it shows sees what it shows."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import documents, machines
from tests.support.service import BIN, end_all, instance_cgroups

DOCUMENT: Final = machines.ROOT / "docs/from-one-machine-to-a-cluster.md"
PACKAGING: Final = machines.ROOT / "packaging"
# `ca` needs no network; john and ann work at a desk
ADDRESSES: Final = {
    "one": "10.77.0.1",
    "gw": "10.77.0.2",
    "two": "10.77.0.3",
    "ca": "10.77.0.4",
    "desk": "10.77.0.5",
}
HOSTS: Final = "127.0.0.1 localhost\n10.77.0.1 one.example.org\n10.77.0.2 gw.example.org\n"
# what the packages make
USERS: Final = "pjw:x:971:971::/:/usr/sbin/nologin\npjw-gateway:x:972:972::/:/usr/sbin/nologin\n"
GROUPS: Final = "pjw:x:971:\npjw-gateway:x:972:\n"
STATES: Final = ("/var/lib/pjw", "/var/lib/pjw/node", "/var/lib/pjw-two")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the machines have their files; whatever became of it, no job outlives the test."""
    # not /tmp, which may be memory: the limits of disk IO need a disk
    made = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield made
    for state in STATES:
        end_all(Path(state))
    shutil.rmtree(made)


def prepare(directory: Path) -> None:
    """What the page begins with: the authority, a machine with pjw, and the files of the packages on all."""
    for name in ADDRESSES:
        etc = directory / name / "etc"
        etc.mkdir(parents=True)
        for file, more in (("passwd", USERS), ("group", GROUPS)):
            (etc / file).write_text(Path("/etc", file).read_text() + more)
        (etc / "pjw").mkdir()
        (etc / "pjw-gateway").mkdir()
        shutil.copy(PACKAGING / "gateway.toml", etc / "pjw-gateway")
        shutil.copy(PACKAGING / "pjwd.toml", etc / "pjw")
    config = directory / "two/etc/pjw/pjwd.toml"
    config.write_text(config.read_text().replace('"/var/lib/pjw"', '"/var/lib/pjw-two"'))
    config = directory / "one/etc/pjw/pjwd.toml"
    config.write_text(config.read_text().replace("localhost:50051", "0.0.0.0:50051"))
    authority = directory / "ca/root/ca"
    authority.parent.mkdir()
    words = ("certs", "init", str(authority), "--server", "one.example.org:50051", "john", "ann")
    subprocess.run([str(BIN / "pjwd"), *words], check=True, capture_output=True)
    for name in ("ca.crt", "server.crt", "server.key"):
        shutil.copy(authority / name, directory / "one/etc/pjw")
    for name in ("john", "ann"):
        home = directory / "desk/home" / name
        home.mkdir(parents=True)
        shutil.move(authority / f"{name}.pjw", home)


def test_it_is_as_it_is_shown(directory: Path) -> None:
    """Each of its commands is typed at a terminal of its machine, and shows what the page says."""
    commands = documents.commands_of(DOCUMENT)
    prepare(directory)
    with machines.machines(directory, ADDRESSES, HOSTS) as pids:

        def opened(where: str) -> documents.Terminal:
            name = where[:-1]
            if where.endswith("#"):
                return machines.terminal(pids[name], "/root")
            return machines.terminal(pids["desk"], f"/media/home/{name}")

        def systemctl(name: str, *words: str) -> None:
            subprocess.run(
                machines.entered(pids[name], "env", f"PATH={machines.PATH}", "systemctl", *words), check=True
            )

        try:
            systemctl("one", "start", "pjwd")
            add = f"cd /media/home/john && HOME=$PWD {BIN}/pjw context add default john.pjw"
            # what it prints is shown where it fails
            subprocess.run(machines.entered(pids["desk"], "sh", "-c", add), check=True)
            documents.play(commands, opened)
        finally:
            for name in ("one", "two", "gw"):
                systemctl(name, "stop", "pjw-gateway" if name == "gw" else "pjwd")
    assert [instance_cgroups(Path(state)) for state in STATES] == [[], [], []]
