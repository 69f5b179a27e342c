"""A root of Debian's packages, as `mmdebstrap` makes it, for tests of images; made once, and kept.

It lies beside the machines of scripts/fresh-root, in $PJW_ROOTS. Its packages are unpacked, and their scripts
do not run: that takes seconds, and programs need no more.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

PYTHON: Final = ("base-files", "coreutils", "dash", "grep", "python3-pip", "sed")
_SECONDS: Final = 300
_ROOTS: Final = Path(os.environ.get("PJW_ROOTS", "/var/tmp/pjw-roots"))


def debian_tar(*packages: str) -> Path:
    """A tar archive of these packages and what they depend on; skips the test where there can be none."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("no mmdebstrap on this machine: apt-get install mmdebstrap")
    suite = _of_release("VERSION_CODENAME")
    name = hashlib.sha256(" ".join(sorted(packages)).encode()).hexdigest()[:12]
    path = _ROOTS / f"{suite}-{name}.tar"
    _ROOTS.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make(path, suite, packages)
    return path


def _make(path: Path, suite: str, packages: tuple[str, ...]) -> None:
    # this machine's own mirror, and its way to it, as scripts/fresh-root has them
    uris = _said("apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian").split()
    if not uris:
        pytest.skip("this machine has no Debian mirror: apt-get update")
    options = [
        f"--aptopt={line}"
        for line in _said("apt-config", "dump").splitlines()
        if line.startswith(("Acquire::Check", "Acquire::http", "Acquire::Retries", "Acquire::ForceIPv"))
        and '""' not in line
    ]
    new = path.with_suffix(".new.tar")
    make = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract", f"--include={','.join(packages)}"]
    done = subprocess.run(
        [*make, *options, suite, new, uris[0]],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        new.unlink(missing_ok=True)
        pytest.skip(f"mmdebstrap cannot make a root here: {done.stderr.strip().splitlines()[-1:]}")
    new.rename(path)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _of_release(key: str) -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    return "".join(shlex.split(found.get(key, "")))
