"""The Debian package on a machine that has never seen pjw: installed, used, upgraded, removed, purged.

The tests are one story, in this order. Afterwards the machine is as it was, for those that follow.
"""

import os
import pwd
import select
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from tests.support.service import instance_cgroups, wait_for
from tests.support.terminal import Terminal
from tests.vm import systemd_harness as host
from tests.vm.systemd_harness import get, pjw

PACKAGES: Final = list(Path("/wheels").glob("pjw_*.deb"))
CONFIGURATION: Final = host.ETC / "pjwd.toml"
GATEWAY: Final = Path("/etc/pjw-gateway")
DROP_IN: Final = Path("/etc/systemd/system/pjwd.service.d/listen.conf")
# Prints a number a second, and never ends by itself.
COUNT: Final = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done"
# what dpkg, systemd and useradd write about what they have done
NOTES: Final = (
    *("/var/lib/dpkg", "/var/log/journal", "/var/log/dpkg.log", "/var/cache", "/var/tmp", "/etc/.pwd.lock"),
    *(f"/etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")),
)

pytestmark = pytest.mark.skipif(
    not PACKAGES, reason="scripts/test-vm makes a Debian package for this Debian 12 on a Debian 12 only"
)


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Those of the package, not those that the other tests of this machine run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "BIN", Path("/usr/bin"))
        yield
    if host.CERTS.exists():
        shutil.rmtree(host.CERTS)


@pytest.fixture(scope="module")
def before() -> set[str]:
    """The files of the machine before the package came."""
    return files()


def inits() -> list[str]:
    """The inits of the package's service: they name its state directory. Other tests have some, too."""
    lines = host.run("ps", "-ww", "-e", "-o", "comm,pid,args").splitlines()
    return [line for line in lines if line.startswith("pjw-init") and f" {host.STATE}/" in line]


def files() -> set[str]:
    """Every file and directory that a package could leave."""
    found = {
        os.path.join(directory, name)
        for root in ("/etc", "/usr", "/var", "/opt", "/run/systemd")
        for directory, directories, names in os.walk(root)
        for name in (*directories, *names)
    }
    return {path for path in found if not path.startswith(NOTES)}


def higher_version(directory: Path) -> Path:
    """The same package as its next version."""
    tree, path = directory / "tree", directory / "pjw-next.deb"
    host.run("dpkg-deb", "--raw-extract", PACKAGES[0], tree)
    control = tree / "DEBIAN/control"
    version = host.run("dpkg-deb", "--field", PACKAGES[0], "Version")
    control.write_text(control.read_text().replace(f"Version: {version}", f"Version: {version}.1"))
    # the modes of a tree that git and tar made by way of this test are not of interest
    host.run("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, path)
    return path


def test_it_waits_for_certificates(before: set[str]) -> None:
    """Installed, enabled, and not failed: without certificates yet, and the package says what to do."""
    said = host.run("dpkg", "--install", PACKAGES[0])
    assert "pjwd certs init /root/pjw-ca john" in said
    assert "move /root/pjw-ca to another machine" in said
    assert (host.shown("UnitFileState"), host.shown("ActiveState"), host.shown("Result")) == (
        "enabled",
        "inactive",
        "success",
    )
    assert host.shown("ConditionResult") == "no"
    assert pwd.getpwnam("pjw").pw_shell == "/usr/sbin/nologin"
    assert (before & {"/usr/bin/pjw", "/usr/bin/pjwd", str(host.ETC)}) == set()


def test_it_can_be_used() -> None:
    """Two commands of root, and a user has jobs; nothing of it is from the machine's own Python libraries."""
    host.make_certificates()
    host.run("systemctl", "start", host.UNIT)
    # V2: of the service that runs, as the documents say it
    said = host.run("/usr/bin/pjwd", "check", "--config", CONFIGURATION)
    assert said.endswith("\nthis host can run pjwd")
    assert f"a pjwd serves {host.STATE} now" in said
    job_id = pjw("start", "echo hello; exit 3")
    assert (pjw("logs", job_id), get(job_id)["exitCode"]) == ("hello", 3)
    assert "dist-packages" not in host.run(
        "/usr/lib/pjw/bin/python3", "-I", "-c", "import sys; print(sys.path)"
    )


def test_what_a_user_finds() -> None:
    """A bundle becomes a context, and each command that imports more than gRPC finds what it needs."""
    home = Path("/home/tester")
    # nothing of the environment: a login
    user = ("setpriv", "--reuid=tester", "--regid=tester", "--init-groups", "env", "--ignore-environment")
    login = (*user, f"HOME={home}", "PATH=/usr/bin:/bin", "LANG=C.UTF-8", "TERM=xterm-256color", "pjw")
    assert "pjw context add" in host.run("sh", "-c", f"{shlex.join(login)} list 2>&1; true")
    host.run("install", "-o", "tester", "-m", "600", host.ETC / "tester.pjw", home)
    try:
        said = host.run(*login, "context", "add", "default", home / "tester.pjw")
        assert said == "default: localhost:50051"
        job_id = host.run(*login, "start", "sleep 3")
        assert host.run(*login, "wait", job_id) == "0"
        assert "CPU, percent" in host.run(*login, "stats", job_id)
        assert "complete" in host.run(*login, "completion", "bash")
        with Terminal([*login, "top"], {}) as terminal:
            terminal.wait_for("quit", "0 jobs")
            terminal.type("q")
            assert terminal.wait_for_end() == 0
    finally:
        (home / "tester.pjw").unlink()
        shutil.rmtree(home / ".config")
    said = host.run("sh", "-c", "pjwd config show 2>&1 >/dev/null")
    assert said == f"pjwd: {CONFIGURATION} was not read; pass --config {CONFIGURATION} to use it"


def test_what_is_compiled_is_valid() -> None:
    """No use of it, as root, writes a compiled file that dpkg would not remove."""
    listed = set(host.run("dpkg", "--listfiles", "pjw").splitlines())
    found = {str(path) for path in Path("/usr/lib/pjw").rglob("*.pyc")}
    assert found
    assert found <= listed


def test_a_gateway_and_a_node(before: set[str]) -> None:
    """Both on this machine: the gateway is a user of its own, jobs go on, and a purge leaves no trace."""
    packages = [
        path for name in ("pjw-gateway", "pjw-node") for path in Path("/wheels").glob(f"{name}_*.deb")
    ]
    said = host.run("dpkg", "--install", *packages)
    assert "pjwd certs client certs gate" in said
    assert "This machine becomes a node when" in said
    assert gateway_shown("UnitFileState", "ActiveState", "Result") == ["enabled", "inactive", "success"]
    assert "network-online.target" in host.shown("After")
    changed = [CONFIGURATION, host.ETC / "server.crt", host.ETC / "server.key"]
    kept = {path: path.read_bytes() for path in changed}
    host.run("pjwd", "certs", "client", host.ETC, "gate")
    host.run("pjwd", "certs", "node", host.ETC, "n1", "localhost")
    names = [host.ETC / name for name in ("ca.crt", "server.crt", "server.key", "gate.crt", "gate.key")]
    host.run("install", "-o", "pjw-gateway", "-m", "600", "-t", GATEWAY, *names)
    toml = GATEWAY / "gateway.toml"
    toml.write_text(toml.read_text().replace("0.0.0.0:50051", "localhost:50052"))
    text = kept[CONFIGURATION].decode()
    for line, instead in (
        ("# [cluster]", "[cluster]"),
        ('# gateway = "gw.example.org:50051"', 'gateway = "localhost:50052"'),
        ("# gateways = ", "gateways = "),
        ("# uid_first = 1_900_000_000", "uid_first = 1_990_000_000"),
        ('"/var/lib/pjw"', '"/var/lib/pjw/node"'),
    ):
        assert text.count(line) == 1, line
        text = text.replace(line, instead)
    CONFIGURATION.write_text(text)
    for kind in ("crt", "key"):
        shutil.move(host.ETC / f"node-n1.{kind}", host.ETC / f"server.{kind}")
    host.run("systemctl", "start", "pjw-gateway")
    host.run("systemctl", "restart", host.UNIT)
    at = ("--server", "localhost:50052")
    assert pjw(*at, "logs", pjw(*at, "start", "echo hello")) == "hello"
    job_id = pjw(*at, "start", COUNT)
    pid = gateway_shown("MainPID")[0]
    status = host.status(int(pid))
    assert int(status["Uid"].split()[0]) == pwd.getpwnam("pjw-gateway").pw_uid
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    host.run("systemctl", "restart", "pjw-gateway")
    assert gateway_shown("MainPID")[0] != pid
    wait_for(lambda: get(job_id, *at)["state"] == "running")
    assert get(job_id, *at)["node"] == "n1"
    pjw(*at, "stop", job_id)
    host.run("dpkg", "--purge", "pjw-gateway", "pjw-node")
    for path, data in kept.items():
        path.write_bytes(data)
    for name in ("gate.crt", "gate.key", "gate.pjw"):
        (host.ETC / name).unlink()
    host.run("systemctl", "restart", host.UNIT)
    shutil.rmtree(host.STATE / "node")
    left = {path for path in files() - before if "gateway" in path or "pjw-node" in path}
    assert {path for path in left if not path.startswith("/usr/lib/pjw/")} == set()
    with pytest.raises(KeyError):
        pwd.getpwnam("pjw-gateway")


def gateway_shown(*names: str) -> list[str]:
    """Properties of the gateway's unit."""
    return [host.run("systemctl", "show", "--property", name, "--value", "pjw-gateway") for name in names]


def test_an_upgrade_leaves_jobs_running(tmp_path: Path) -> None:
    """A new server adopts them: no byte is missing, and the end of the one that ends meanwhile is known."""
    # V2: by hand, and as it was when address, certificates and state directory were options of the unit
    was = ("listen =", "ca_crt =", "server_crt =", "server_key =", "state_dir =")
    lines = [line for line in CONFIGURATION.read_text().splitlines() if not line.startswith(was)]
    CONFIGURATION.write_text("\n".join((*lines, "# by hand\n")))
    DROP_IN.parent.mkdir()
    DROP_IN.write_text("[Service]\nEnvironment=PJWD_LISTEN=127.0.0.1:50051\n")
    server, counting = host.server_pid(), pjw("start", COUNT)
    ending = pjw("start", "seq 1 1000; sleep 3; seq 1001 2000; exit 7")
    processes = host.processes_of(counting)
    package = higher_version(tmp_path)
    with host.follower(counting) as output:
        assert output.readline() == b"0\n"
        said = host.run("dpkg", "--install", package)
        assert "certs init" not in said
        assert host.server_pid() not in (0, server)
        assert processes[0] in host.processes_of(counting)
        numbers = [output.readline() for _ in range(8)]
    assert numbers == [b"%d\n" % number for number in range(1, 9)]
    assert pjw("logs", ending) == "\n".join(str(number) for number in range(1, 2001))
    assert (get(ending)["state"], get(ending)["exitCode"]) == ("exited", 7)
    assert CONFIGURATION.read_text().endswith("# by hand\n")
    assert host.journal().rpartition("ready on ")[2].startswith("127.0.0.1:50051")
    shutil.rmtree(DROP_IN.parent)
    host.run("systemctl", "daemon-reload")
    pjw("stop", counting)
    assert get(counting)["reason"] == "stopped"


def test_a_removal_ends_what_runs() -> None:
    """Nobody could stop it any more: each job is told, then killed. What was kept stays."""
    job_id = pjw("start", COUNT)
    stubborn = pjw("start", "trap 'echo heard' TERM; echo ready; while :; do sleep 1; done")
    with host.follower(stubborn) as output:
        assert output.readline() == b"ready\n"
    inits = [os.pidfd_open(host.processes_of(job)[0]) for job in (job_id, stubborn)]
    said = host.run("dpkg", "--remove", "pjw")
    assert "jobs ended: 2" in said
    # a pidfd can be read when its process has ended
    assert select.select(inits, [], [], 0)[0] == inits
    for init in inits:
        os.close(init)
    assert instance_cgroups(host.STATE) == []
    assert host.run("systemctl", "is-active", host.UNIT, check=False) == "inactive"
    assert not Path("/usr/bin/pjwd").exists()
    assert not Path("/usr/lib/pjw").exists()
    assert CONFIGURATION.read_text().endswith("# by hand\n")
    # and who installs it again finds them
    host.run("dpkg", "--install", PACKAGES[0])
    wait_for(lambda: host.shown("ActiveState") == "active")
    assert [get(job)["reason"] for job in (job_id, stubborn)] == ["stopped", "stopped"]
    assert pjw("logs", stubborn).endswith("heard")


def test_a_purge_leaves_nothing(before: set[str]) -> None:
    """No file, user, unit, cgroup or process."""
    pjw("start", COUNT)
    assert inits() != []
    host.run("dpkg", "--purge", "pjw")
    assert files() - before == set()
    with pytest.raises(KeyError):
        pwd.getpwnam("pjw")
    assert instance_cgroups(host.STATE) == []
    assert host.run("systemctl", "list-unit-files", "pjwd*", "--no-legend", check=False) == ""
    # those that waited were killed; a slow machine takes a moment to bury them
    with suppress(AssertionError):
        wait_for(lambda: inits() == [])
    assert inits() == []
