"""Compare an installation of the client alone with a whole one: disk space, packages, time of commands.

pip makes both from the wheels of this tree and the locked libraries, which it fetches or has cached.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.cli import timed
from benchmarks.pjwd import running
from benchmarks.report import Figure, Held, median
from tests.support.service import BIN

ROOT: Final = Path(__file__).parents[1]
ROUNDS: Final = 40
QUICK_ROUNDS: Final = 10
COMMANDS: Final = ("--help", "list")
# the name of each: its locked libraries, and our wheels in it
KINDS: Final = {"pjw-client": ("client", ["pjw_client"]), "pjw": ("run", ["pjw", "pjw_client"])}


@dataclass(slots=True)
class Installed:
    """An installation: the place of its packages, its command line, and the seconds of its runs."""

    site: Path
    pjw: Path
    wall: dict[str, list[float]] = field(default_factory=lambda: {command: [] for command in COMMANDS})

    @property
    def size(self) -> int:
        """The size of its packages in bytes, with the files that pip has compiled."""
        return sum(path.stat().st_size for path in self.site.rglob("*") if path.is_file())

    @property
    def packages(self) -> int:
        """The number of packages that pip has installed."""
        return sum(1 for _ in metadata.distributions(path=[str(self.site)]))


def run(*, quick: bool) -> list[Figure]:
    """Run the commands in turns, so that other work of the machine hits both alike."""
    with tempfile.TemporaryDirectory(prefix="pjw-install-") as work, running() as service:
        wheels = _build(Path(work))
        kinds = {name: _install(Path(work) / name, wheels, *kind) for name, kind in KINDS.items()}
        service.start_job("true")
        said = Path(work) / "stdout"
        environment = service.environment()
        # the first round warms the cache, and does not count
        for number in range((QUICK_ROUNDS if quick else ROUNDS) + 1):
            for installed in kinds.values():
                for command, taken in installed.wall.items():
                    wall, _ = timed([str(installed.pjw), command], environment, said)
                    assert said.read_bytes().startswith(b"1\n" if command == "list" else b"usage: pjw"), (
                        command
                    )
                    if number:
                        taken.append(wall)
        client, everything = kinds.values()
        rows = [("size", client.size / 1e6, everything.size / 1e6, "MB")]
        rows += [("packages", client.packages, everything.packages, "")]
        rows += [
            (
                f"pjw {command}, wall",
                median(client.wall[command]) * 1e3,
                median(everything.wall[command]) * 1e3,
                "ms",
            )
            for command in COMMANDS
        ]
    own, reference = KINDS
    return [
        Figure("install", f"{own}, {name}", value, unit, reference, other, held=Held.NEVER)
        for name, value, other, unit in rows
    ]


def _build(work: Path) -> Path:
    """Build the wheels of this tree; return their directory."""
    _pip(
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        work,
        ".",
        "packaging/client/",
    )
    return work


def _install(directory: Path, wheels: Path, locked: str, ours: list[str]) -> Installed:
    """Return an environment with the libraries of `requirements/LOCKED.txt` and our wheels."""
    venv.create(directory, symlinks=True)
    python = ("--python", directory / "bin/python", "install")
    _pip(*python, "--require-hashes", "--requirement", f"requirements/{locked}.txt")
    _pip(*python, "--no-index", "--no-deps", *(next(wheels.glob(f"{name}-*.whl")) for name in ours))
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    return Installed(site, directory / "bin/pjw")


def _pip(*arguments: str | Path) -> None:
    # the build tools are those of .venv
    path = f"{BIN}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=True)
