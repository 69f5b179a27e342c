"""The Debian package, as far as it can be judged without installing it (tests/vm/test_package.py)."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

from tests.package.conftest import ROOT


def test_lintian_has_nothing_to_say(deb: Path) -> None:
    """What it finds and we do on purpose is in packaging/debian/pjw.lintian-overrides, with the reason."""
    command = ["lintian", "--fail-on", "error,warning", "--allow-root", "--tag-display-limit", "0", str(deb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_packages_of_a_cluster(small_deb: Path) -> None:
    """They need pjw of the same version, and have no program; lintian finds nothing."""
    test_lintian_has_nothing_to_say(small_deb)
    version = field(small_deb, "Version")
    assert field(small_deb, "Depends").split(", ")[0] == f"pjw (= {version})"
    assert field(small_deb, "Architecture") == "all"
    listed = subprocess.check_output(["dpkg-deb", "--contents", str(small_deb)], text=True).splitlines()
    files = {line.split()[-1] for line in listed if not line.startswith("d")}
    if field(small_deb, "Package") == "pjw-node":
        own = {"./usr/lib/systemd/system/pjwd.service.d/pjw-node.conf"}
    else:
        own = {
            "./lib/systemd/system/pjw-gateway.service",
            "./usr/lib/sysusers.d/pjw-gateway.conf",
            "./etc/logrotate.d/pjw-gateway",
            "./etc/pjw-gateway/gateway.toml",
        }
    found = {name for name in files if not name.startswith(("./usr/share/doc/", "./usr/share/lintian/"))}
    # Debian 13 has its units below /usr
    assert {
        name.replace("./usr/lib/systemd/system/pjw-", "./lib/systemd/system/pjw-") for name in found
    } == own


def test_what_it_depends_on(deb: Path) -> None:
    """The one Python that its libraries are for, and no library that this Debian lacks."""
    python = os.path.basename(os.path.realpath("/usr/bin/python3"))
    depends = field(deb, "Depends").split(", ")
    assert {"python3", python} <= set(depends)
    assert {re.split("[ :]", name)[0] for name in depends} - {"systemd"} == {
        *("python3", python, "libc6", "libgcc-s1", "libstdc++6"),
    }
    assert field(deb, "Architecture") == "amd64"


def test_what_is_in_it(deb: Path) -> None:
    """What an administrator looks for, where Debian has it; pjw-init is that of the wheel."""
    files = set(subprocess.check_output(["dpkg-deb", "--contents", str(deb)], text=True).split())
    for name in (
        "lib/systemd/system/pjwd.service",
        "usr/lib/sysusers.d/pjw.conf",
        "usr/bin/pjw",
        "usr/bin/pjwd",
        "usr/share/doc/pjw/copyright",
        "usr/share/doc/pjw/changelog.Debian.gz",
        "etc/pjw/pjwd.toml",
    ):
        assert f"./{name}" in files
    conffiles = subprocess.check_output(["dpkg-deb", "--info", str(deb), "conffiles"], text=True)
    assert sorted(conffiles.split()) == ["/etc/logrotate.d/pjw", "/etc/pjw/pjwd.toml"]


def test_its_unit_has_only_what_its_systemd_knows(deb: Path) -> None:
    """V10: systemd 252 warns of DelegateSubgroup at each daemon-reload."""
    unit = "./lib/systemd/system/pjwd.service"
    archive = subprocess.check_output(["dpkg-deb", "--fsys-tarfile", str(deb)])
    text = subprocess.check_output(["tar", "--extract", "--to-stdout", unit], input=archive).decode()
    old = "VERSION_CODENAME=bookworm\n" in Path("/etc/os-release").read_text()
    assert ("\nDelegateSubgroup=" in text) != old


def test_its_files_are_those_of_the_wheels(
    deb: Path, wheel: Path, client_wheel: Path, tmp_path: Path
) -> None:
    """What was tested as wheels is what the package installs; and nothing names where it was made."""
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(tmp_path)], check=True)
    [site] = tmp_path.glob("usr/lib/pjw/lib/python3.*/site-packages")
    for path in (wheel, client_wheel):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith(("/", "/RECORD")):
                    assert (site / name).read_bytes() == archive.read(name), name
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert b"pjw-deb." not in data, path
            assert os.fsencode(ROOT) not in data, path


def test_another_build_is_the_same(deb: Path, wheel: Path, epoch: str, tmp_path: Path) -> None:
    """In another directory and with another umask, to the byte."""
    subprocess.run(
        ["sh", "-c", 'umask 077; exec "$0" "$@"', "scripts/package-deb", str(wheel), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "SOURCE_DATE_EPOCH": epoch},
        check=True,
    )
    assert (tmp_path / deb.name).read_bytes() == deb.read_bytes()


def field(deb: Path, name: str) -> str:
    """A field of the package's description."""
    return subprocess.check_output(["dpkg-deb", "--field", str(deb), name], text=True).strip()
