"""Images of real packages: Debian's Python from mmdebstrap and as an OCI layout, Node, and musl.

They are made of this machine's files, or of Debian's packages (tests/support/debian.py); a test says what it
lacks. The network is that of test_egress.py.
"""

import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pjw.launcher.processes import status_of
from pjw.model import JobSpec
from tests.root.test_egress import World, wheel, world
from tests.support import debian
from tests.support.images import add_libraries, directory, docker_archive, entry, layer, layer_of, oci_layout
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import UIDS, processes_where

__all__ = ["world"]

# into the image's own Python, which Debian reserves for its packages
PIP: Final = (
    "pip install -q --no-cache-dir --break-system-packages"
    " --disable-pip-version-check --retries 0 --index-url http://good.test/simple/ --trusted-host good.test"
    " made-up 2>&1"
)
INSTALL: Final = (
    f"set -e; echo mine > /etc/motd; cat /etc/motd; {PIP}; python3 -c 'import made_up; print(made_up.word)';"
    " python3 -c 'import made_up; print(made_up.__file__)'"
)
# by the names that pjw adds to /etc/hosts and /etc/passwd
MUSL: Final = r"""
#include <netdb.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words) {
    struct addrinfo *found = NULL, wanted = {.ai_socktype = SOCK_STREAM};
    char text[6] = {0};
    puts(getpwuid(getuid())->pw_name);
    if (count != 3 || getaddrinfo(words[1], words[2], &wanted, &found))
        return 1;
    int fd = socket(found->ai_family, SOCK_STREAM, 0);
    if (connect(fd, found->ai_addr, found->ai_addrlen))
        return 2;
    if (write(fd, "hello", 5) != 5 || read(fd, text, 5) != 5)
        return 3;
    puts(text);
}
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where roots are made."""
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def index(world: World) -> None:
    """A package index on an allowed name."""
    simple = world.files / "simple" / "made-up"
    simple.mkdir(parents=True)
    wheel(simple)
    (simple / "index.html").write_text("<!DOCTYPE html><a href='made_up-1-py3-none-any.whl'>made_up-1</a>")


def pjwd(service: Service, *arguments: str) -> None:
    """Run `pjwd image`."""
    action, *rest = arguments
    subprocess.run(
        [BIN / "pjwd", "image", action, "--state-dir", str(service.state), *rest],
        check=True,
        capture_output=True,
    )


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("form", ["tar", "oci"])
def test_a_debian_with_python(world: World, place: Path, form: str) -> None:
    """Written to, installed into; another client and another job see none of it, nor what a layer removed."""
    tar = debian.debian_tar(*debian.PYTHON)
    source = f"tar:{tar}"
    if form == "oci":
        above = layer(
            entry("etc/.wh.debian_version"), directory("usr/share/doc"), entry("usr/share/doc/.wh..wh..opq"),
            entry("usr/share/doc/new", b"new\n"),
        )  # fmt: skip
        config = {"Env": ["WHO=image"], "WorkingDir": "/opt"}
        source = f"oci:{oci_layout(place / 'debian', [tar.read_bytes(), above], config)}"
    pjwd(world.service, "import", "debian", source)
    look = "cat /etc/debian_version /etc/motd 2>&1; python3 -c 'import made_up' 2>&1; "
    look += "ls /usr/share/doc; pwd; echo $WHO"
    try:
        with world.service.client() as alice, world.service.client("bob") as bob:
            installed = alice.run(JobSpec(INSTALL, image="debian", allow=["good.test"]))
            assert installed.output.decode().splitlines() == [
                *("mine", "installed", f"/usr/local/lib/python{_version(tar)}/dist-packages/made_up.py")
            ]
            for client in (alice, bob):
                said = client.run(JobSpec(look, image="debian")).output.decode()
                assert "No module named 'made_up'" in said
                assert "cat: /etc/motd: No such file or directory" in said
                assert ("cat: /etc/debian_version" in said, said.endswith("\nnew\n/opt\nimage\n")) == (
                    *(form == "oci",) * 2,
                )
            refused = bob.run(JobSpec(f"{PIP}; true", image="debian"))
            assert b"No matching distribution" in refused.output or b"ERROR" in refused.output
    finally:
        pjwd(world.service, "rm", "debian")
        shutil.rmtree(place / "debian", ignore_errors=True)


def _version(tar: Path) -> str:
    names = subprocess.check_output(["tar", "--list", "--file", tar], text=True)
    return next(
        found[1] for found in map(re.compile(r".*/lib/python(3\.\d+)/").match, names.splitlines()) if found
    )


def test_node(world: World, place: Path) -> None:
    """A client's own, of the machine's Node and what it is linked with: it runs, and writes to its root."""
    node = shutil.which("node", path="/usr/bin")
    if node is None:
        pytest.skip("no Node.js on this machine")
    root = place / "node"
    for name in ("bin", "etc", "app"):
        (root / name).mkdir(parents=True)
    shutil.copy(node, root / "bin")
    add_libraries(root, node)
    (root / "app/main.js").write_text(
        "const fs = require('fs'); fs.writeFileSync('/etc/made', 'made');"
        " const made = fs.readFileSync('/etc/made', 'utf8');"
        " console.log(made, process.env.WHO, fs.existsSync('/usr/bin'), process.argv[2])"
    )
    config = {"Env": ["WHO=image"], "WorkingDir": "/app", "Entrypoint": ["node", "main.js"], "Cmd": ["one"]}
    archive = docker_archive(place / "node.tar", [layer_of(root)], config)
    world.service.ok("image", "load", "node", str(archive))
    for words, last in (((), "one"), (("--", "two", "three"), "two")):
        said = world.service.ok("run", "--image", "node", "--memory", "1G", *words)
        assert said == f"made image false {last}\n"
    assert world.service.refused("run", "--image", "node", "true", client="bob")[0] == 1
    world.service.ok("image", "rm", "node")


def test_busybox_with_musl(world: World, place: Path) -> None:
    """No shell but busybox, and a C library that finds names in its own way: its user's, and a host's."""
    busybox, compiler = shutil.which("busybox"), shutil.which("musl-gcc")
    if busybox is None or compiler is None:
        pytest.skip("no busybox or no musl on this machine: apt-get install busybox-static musl-tools")
    root = place / "musl"
    (root / "lib").mkdir(parents=True)
    (root / "bin").mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    for name in ("sh", "cat", "ls"):
        (root / "bin" / name).symlink_to("busybox")
    loader = f"ld-musl-{platform.machine()}.so.1"
    shutil.copy(Path("/lib", loader).resolve(), root / "lib" / loader)
    subprocess.run([compiler, "-x", "c", "-", "-o", root / "bin/names"], input=MUSL, text=True, check=True)
    pjwd(world.service, "import", "musl", f"dir:{root}")
    script = f"ls -d /usr; names good.test {world.echo_port} && echo made > /lib/made && cat /lib/made"
    with world.service.client() as client:
        done = client.run(JobSpec(script, image="musl", allow=[f"good.test:{world.echo_port}"]))
        assert done.output.decode().splitlines()[-3:] == ["pjw-job", "hello", "made"]
        assert client.run(JobSpec(["names", "other.test", "80"], image="musl")).job.exit_status.code == 1  # type: ignore[union-attr]
    pjwd(world.service, "rm", "musl")


def test_root_parses_no_archive_of_a_client(world: World, place: Path) -> None:
    """While an image is loaded, the program that reads its archive is a job's, of the client's user."""
    archive = place / "own.tar"
    archive.write_bytes(
        layer(directory("etc"), *(entry(f"etc/{number}", bytes(1000)) for number in range(5_000)))
    )
    load = [str(BIN / "pjw"), "image", "load", "own", str(archive)]
    loading = subprocess.Popen(load, env=world.service.environment(), stdout=subprocess.DEVNULL)
    seen: set[tuple[int, ...]] = set()

    def is_over() -> bool:
        over = loading.poll() is not None
        seen.update(map(_identity, processes_where(_unpacks)))
        return over

    wait_for(is_over)
    assert loading.returncode == 0
    # others that tests have removed may be about to go
    wait_for(lambda: len(_own(world)) == 1)
    [made] = _own(world)
    owner = made.stat().st_uid
    assert owner not in (0, int(status_of(world.service.pid, b"Uid")[0]))
    # as no user but its own, for good, and with no capability
    of_others = {each for each in seen if each and 0 not in each[:4] and abs(each[0] - owner) >= UIDS}
    assert seen - of_others - {()} == {(owner, owner, owner, owner, 0, 0)}
    assert {path.lstat().st_uid for path in made.rglob("*")} == {owner}
    world.service.ok("image", "rm", "own")


def _own(world: World) -> list[Path]:
    return list((world.service.state / "workspaces").glob("*/@*"))


def _unpacks(status: dict[str, str]) -> bool:
    return status["Name"].startswith("pjw-archive")


def _identity(pid: int) -> tuple[int, ...]:
    """Its user ids and capabilities, or nothing where it has ended."""
    try:
        ids = tuple(int(uid) for uid in status_of(pid, b"Uid"))
        return (*ids, *(int(status_of(pid, name)[0], 16) for name in (b"CapPrm", b"CapBnd")))
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return ()
