"""scripts/: what they say before they begin, to a user who is not root (F4, F5, F7, F8)."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
NOBODY: Final = 65534


@pytest.fixture
def clone(visible: Path) -> Path:
    """The scripts in a directory of nobody's, with a space in its path."""
    clone = visible / "a clone"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", clone], check=True)
    return clone


def as_nobody(clone: Path, *command: str, path: str = os.environ["PATH"]) -> tuple[int, list[str]]:
    """The exit code of a script that nobody runs, and what it says on stderr."""
    done = subprocess.run(
        ["/usr/bin/setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", *command],
        cwd=clone, env={"PATH": path, "HOME": str(clone)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


def test_what_root_has_installed_is_said_with_a_way_on(clone: Path) -> None:
    """Before anything is removed or installed."""
    (clone / ".venv/bin").mkdir(parents=True)
    code, said = as_nobody(clone, "scripts/install")
    assert code == 1
    assert said == [
        "install: error: cannot install into .venv: .venv belongs to root",
        "hint: sudo make clean removes what an earlier sudo make has made",
    ]


def test_what_root_installs_belongs_to_the_owner_of_the_tree(clone: Path) -> None:
    """Also when it has built the wheels; and no directory of them stays behind. Here Python does nothing."""
    for path in (".venv/bin", "requirements", "packaging/client", "src", "temporary"):
        (clone / path).mkdir(parents=True)
    for path in ("pyproject.toml", "meson.build", "requirements/install.txt"):
        (clone / path).touch()
    for path in (".venv/bin/python", "scripts/system-packages"):
        (clone / path).write_text("#!/bin/sh\n")
        (clone / path).chmod(0o755)
    temporary = {**os.environ, "TMPDIR": str(clone / "temporary")}
    subprocess.run([clone / "scripts/install"], env=temporary, stdout=subprocess.PIPE, check=True)
    assert (clone / ".venv/pjw.sum").read_text()
    assert {each.lstat().st_uid for each in (clone / ".venv", *(clone / ".venv").rglob("*"))} == {NOBODY}
    assert list((clone / "temporary").iterdir()) == []


def test_a_package_needs_a_commit_and_says_so_first(clone: Path) -> None:
    """In git's own words: no repository, or one of another user's."""
    code, [said, hint] = as_nobody(clone, "scripts/package", "check")
    assert code == 1
    assert said.startswith(
        "package: error: cannot make a source distribution from the last commit: git says: fatal: "
    )
    assert "not a git repository" in said
    assert hint == "hint: make deb needs no git"
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    code, words = as_nobody(clone, "scripts/package", "check")
    assert code == 1
    assert "dubious ownership" in words[0]


def test_the_demo_without_sudo_names_a_command_that_works(clone: Path) -> None:
    """Before it installs anything; the path is quoted for both shells."""
    programs = clone / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "id", "env"):
        (programs / name).symlink_to(str(shutil.which(name)))
    code, [said, hint] = as_nobody(clone, "scripts/demo", path=str(programs))
    assert (code, said) == (
        1,
        "demo: error: the demo starts pjwd, which needs root, and there is no sudo here",
    )
    *_, command = shlex.split(hint.removeprefix("hint: "))
    assert shlex.split(command) == [str(clone / "scripts/demo")]


def test_git_ignores_the_keys_of_the_readme() -> None:
    """`pjwd certs init certs` in a clone, and one `git add -A` would commit them."""
    names = ["certs/ca.key", "certs/ca.crt", "server.key", "john.pjw"]
    done = subprocess.run(
        ["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "not a git repository" in done.stderr:
        pytest.skip("not a clone")
    assert done.stdout.split() == names
