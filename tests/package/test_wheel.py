"""The wheels: named for what they run on, with nothing of their builder, the same from every builder."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.package.conftest import ROOT

PROGRAMS = {"pjw/launcher/pjw-archive", "pjw/launcher/pjw-init", "pjw/node/pjw-hold"}


def test_its_name_says_what_it_runs_on(wheel: Path) -> None:
    """Every Python 3 and every Linux of this processor, and auditwheel finds the same."""
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    tags = set(wheel.stem.split("-")[4].split("."))
    [metadata] = [name for name in contents(wheel) if name.endswith(".dist-info/WHEEL")]
    lines = contents(wheel)[metadata].decode().splitlines()
    assert {line.partition(": ")[2] for line in lines if line.startswith("Tag: ")} == {
        f"py3-none-{tag}" for tag in tags
    }
    said = run(sys.executable, "-m", "auditwheel", "show", str(wheel)).replace("\n", " ")
    assert "manylinux_2_5_x86_64" in tags
    assert '"manylinux_2_5_x86_64"' in said
    assert "requires no external shared libraries" in said


def test_what_is_in_it(wheel: Path, tmp_path: Path) -> None:
    """The package, what is told of it, and nothing else; its programs are static."""
    files = contents(wheel)
    assert {name.split("/")[0].rpartition(".")[2] for name in files} == {"pjw", "dist-info"}
    assert {Path(name).suffix for name in files if name.startswith("pjw/")} == {".py", ""}
    [licence] = [name for name in files if name.endswith("licenses/LICENSE")]
    assert files[licence] == (ROOT / "LICENSE").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 & 0o777 for info in archive.infolist()}
    assert {name for name, mode in modes.items() if mode & 0o111 and not name.endswith("/")} == PROGRAMS
    for name in PROGRAMS:
        (tmp_path / "program").write_bytes(files[name])
        assert "INTERP" not in run("readelf", "--wide", "--program-headers", str(tmp_path / "program"))


def test_what_is_in_the_client_s(client_wheel: Path, wheel: Path) -> None:
    """Any system, all that types and contract need, the licence; nothing that is in the other one."""
    assert client_wheel.name.endswith("-py3-none-any.whl")
    files = contents(client_wheel)
    assert {name.split("/")[0].rpartition(".")[2] for name in files} == {"pjw", "dist-info"}
    assert {"pjw/py.typed", "pjw/v1/job_worker.proto", "pjw/v1/job_worker_pb2.pyi"} <= files.keys()
    suffixes = {Path(name).suffix for name in files if name.startswith("pjw/")}
    assert suffixes == {".py", ".pyi", ".typed", ".proto"}
    [licence] = [name for name in files if name.endswith("licenses/LICENSE")]
    assert files[licence] == (ROOT / "LICENSE").read_bytes()
    assert not contents(wheel).keys() & files.keys()


def test_they_name_no_directory_of_their_builder(wheel: Path, client_wheel: Path) -> None:
    """Neither the program nor a file tells where it was built."""
    for name, data in (contents(wheel) | contents(client_wheel)).items():
        for path in (os.fsencode(ROOT), b"pjw-wheel.", b"/pip-"):
            assert path not in data, (name, path)


def test_another_build_is_the_same(
    wheel: Path, client_wheel: Path, sdist: Path, epoch: str, tmp_path: Path
) -> None:
    """In another directory and with another umask, to the byte."""
    command = ["sh", "-c", 'umask 077; exec "$0" "$@"', "scripts/package-wheel", str(sdist), str(tmp_path)]
    run(*command, TMPDIR=str(tmp_path), SOURCE_DATE_EPOCH=epoch)
    for one in (wheel, client_wheel):
        assert (tmp_path / one.name).read_bytes() == one.read_bytes()


def test_the_source_builds_in_isolation(
    wheel: Path, client_wheel: Path, sdist: Path, epoch: str, tmp_path: Path
) -> None:
    """With build tools that pip fetches, as it does when it installs the source: the same files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = [path for path in tmp_path.iterdir() if path.is_dir()]
    locked = re.findall(r"^([\w-]+==[\w.]+)", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(locked))
    for one, part in ((wheel, source), (client_wheel, source / "packaging/client")):
        run(
            *(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / one.stem)),
            *("--dependency-constraints-txt", str(constraints), str(part)),
            SOURCE_DATE_EPOCH=epoch,
        )
        [built] = (tmp_path / one.stem).glob("*.whl")
        # its tags are those before auditwheel
        ours, theirs = (
            {
                name: data
                for name, data in contents(path).items()
                if not name.endswith(("/WHEEL", "/RECORD", "/"))
            }
            for path in (one, built)
        )
        assert ours == theirs


def test_the_client_installs_alone(client_wheel: Path, tmp_path: Path) -> None:
    """With what pip finds today for it: the command line runs, and nothing of the service is there."""
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv/bin"
    run(str(binaries / "python"), "-m", "pip", "install", "--quiet", str(client_wheel))
    assert "usage: pjw" in run(str(binaries / "pjw"), "--help")
    assert not (binaries / "pjwd").exists()
    listed = run(str(binaries / "python"), "-m", "pip", "list", "--format", "freeze")
    names = {line.partition("==")[0] for line in listed.splitlines()}
    assert {"pjw-client", "grpcio"} <= names
    assert not {"pjw", "textual", "plotext", "prometheus_client", "msgspec", "grpcio-reflection"} & names


def test_they_install_into_a_fresh_environment(wheel: Path, client_wheel: Path, tmp_path: Path) -> None:
    """With what pip finds today for them, and both programs run."""
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv/bin"
    run(str(binaries / "python"), "-m", "pip", "install", "--quiet", str(wheel), str(client_wheel))
    assert "usage: pjw" in run(str(binaries / "pjw"), "--help")
    assert "usage: pjwd" in run(str(binaries / "pjwd"), "--help")
    if os.geteuid() != 0:
        pytest.skip("pjwd check needs root")
    assert "this host can run pjwd" in run(
        str(binaries / "pjwd"), "check", "--state-dir", str(tmp_path / "state")
    )


def contents(wheel: Path) -> dict[str, bytes]:
    """Every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def run(*command: str, **environment: str) -> str:
    """Run a command, which must succeed; its output."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr
