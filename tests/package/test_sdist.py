"""The source distribution: what git has, no more and no less."""

import subprocess
import tarfile
from pathlib import Path

from tests.package.conftest import ROOT

# .gitattributes
LEFT_OUT = (".ci/", ".gitattributes", ".gitignore")


def test_it_is_what_git_has(sdist: Path) -> None:
    """Every file of the commit but those of the repository itself; and the metadata that an index reads."""
    listed = subprocess.check_output(
        ["git", "ls-tree", "-r", "--name-only", "-z", "HEAD"], cwd=ROOT, text=True
    )
    wanted = {name for name in listed.split("\0")[:-1] if not name.startswith(LEFT_OUT)}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert names == wanted | {"PKG-INFO"}
    for name in ("src/pjw/v1/job_worker.proto", "src/init/main.c", "packaging/debian/rules"):
        assert name in names


def test_the_sums_are_right(dist: Path) -> None:
    """SHA256SUMS names every file, and sha256sum agrees."""
    named = {line.split()[1] for line in (dist / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.name for path in dist.iterdir()} - {"SHA256SUMS"}
    assert {Path(name).suffix for name in named} == {".whl", ".gz", ".deb"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)
