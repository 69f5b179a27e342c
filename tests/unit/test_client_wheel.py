"""The two wheels: which file is in which, what they depend on, and the client's by itself."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement

from tests.support import client_only

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT: Final[dict[str, Any]] = tomllib.loads((ROOT / "packaging/client/pyproject.toml").read_text())
PARTS: Final = sorted(
    path.removesuffix(".py")
    for path in CLIENT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].values()
)
# Every module of the client but `pjw.cli.top` and `pjw.cli.agents`, which need what the extras bring.
IMPORT_ALL: Final = """\
import importlib, pkgutil, sys, pjw
for module in pkgutil.walk_packages(pjw.__path__, "pjw."):
    if module.name not in ("pjw.cli.top", "pjw.cli.stats", "pjw.cli.agents"):
        importlib.import_module(module.name)
import pjw.cli.stats
print(*sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
"""


def files_of(package: str) -> set[str]:
    """What a wheel has put into `pjw/`."""
    files = metadata.distribution(package).files or ()
    return {str(file) for file in files if file.parts[0] == "pjw" and "__pycache__" not in file.parts}


def test_each_file_is_in_one_wheel() -> None:
    """None is in both, and none of the source is in neither."""
    pjw, client = files_of("pjw"), files_of("pjw-client")
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/pjw").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert pjw & client == set()
    assert pjw | client == source | {
        "pjw/launcher/pjw-archive",
        "pjw/launcher/pjw-init",
        "pjw/node/pjw-hold",
    }


def test_the_client_is_pure() -> None:
    """It fits any system, and both wheels together have the programs."""
    wheel = metadata.distribution("pjw-client").read_text("WHEEL") or ""
    assert re.findall(r"^Tag: (.*)$", wheel, re.MULTILINE) == ["py3-none-any"]
    for package, program in (("pjw", "pjwd"), ("pjw-client", "pjw")):
        assert [entry.name for entry in metadata.distribution(package).entry_points] == [program]


def test_they_have_one_version() -> None:
    """That of pyproject.toml: pjw needs the client's of the same, and the Debian package is of it too."""
    version = PROJECT["project"]["version"]
    assert metadata.version("pjw") == metadata.version("pjw-client") == version
    [needed] = [
        needed
        for needed in map(Requirement, PROJECT["project"]["dependencies"])
        if needed.name == client_only.NAME
    ]
    assert str(needed.specifier) == f"=={version}"
    assert (ROOT / "packaging/debian/changelog").read_text().startswith(f"pjw ({version}-1) ")


def test_the_contracts_of_imports_are_those_of_the_wheels() -> None:
    """What import-linter keeps apart is what is installed apart."""
    contracts = {found["name"]: found for found in PROJECT["tool"]["importlinter"]["contracts"]}
    contract = contracts["the client's wheel needs nothing of the service's"]
    modules = sorted(part.replace("/", ".") for part in PARTS if part not in ("pjw/__init__", "pjw/py.typed"))
    assert sorted(contract["source_modules"]) == modules
    rooms = {
        f"pjw.{path.name}"
        for path in (ROOT / "src/pjw").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    ours = {name for name in contract["forbidden_modules"] if name.startswith("pjw.")}
    assert ours == rooms - set(modules)


def test_it_needs_none_of_the_libraries_of_the_service() -> None:
    """Nor those of `top`, which are extra."""
    plain = {package.name.lower() for package in client_only.packages()}
    assert plain == {
        *("pjw-client", "argcomplete", "cffi", "cryptography", "grpcio", "protobuf", "pycparser", "tomlkit"),
        "typing_extensions",
    }
    assert {"textual", "plotext"} <= {package.name for package in client_only.packages("top")}
    # what tests install
    [needed] = [needed for needed in PROJECT["dependency-groups"]["test"] if "mcp" in needed]
    assert CLIENT["project"]["optional-dependencies"]["mcp"] == [needed]


@pytest.fixture(scope="module", params=[False, True], ids=["here", "as on Windows"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a client alone."""
    return client_only.install(tmp_path_factory.mktemp("client") / "venv", as_windows=request.param)


def run(*command: str | Path, home: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program for somebody who has no settings yet."""
    return subprocess.run(
        command,
        env=client_only.environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_is_importable(programs: Path, tmp_path: Path) -> None:
    """Without a package of the service, and where `fcntl` and the like do not exist."""
    done = run(programs / "python", "-c", IMPORT_ALL, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"grpc", "cryptography", "pjw"} <= set(done.stdout.split())
    assert not {"prometheus_client", "msgspec", "textual", "plotext", "grpc_reflection", "mcp"} & set(
        done.stdout.split()
    )


def test_it_starts(programs: Path, tmp_path: Path) -> None:
    """Its help, its version, and what it says to somebody who has no bundle yet."""
    assert run(programs / "pjw", "--help", home=tmp_path).stdout.startswith("usage: pjw ")
    version = PROJECT["project"]["version"]
    assert run(programs / "pjw", "--version", home=tmp_path).stdout == f"pjw {version}\n"
    refused = run(programs / "pjw", "list", home=tmp_path)
    assert (refused.returncode, refused.stdout) == (125, "")
    assert refused.stderr.startswith("pjw: error: no --ca-crt is given\n")


def test_what_is_not_installed_is_named(programs: Path, tmp_path: Path) -> None:
    """With the command that installs it."""
    for command, what, package, extra in (
        ("top", "show top", "textual", "top"),
        ("mcp", "serve agents", "mcp", "mcp"),
    ):
        done = run(programs / "pjw", command, home=tmp_path)
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr == (
            f"pjw: error: cannot {what}: the package {package} is not installed\n"
            f"hint: pip install 'pjw-client[{extra}]'\n"
        )
    for code in ("from pjw import Worker", "import pjw; pjw.Worker"):
        done = run(programs / "python", "-c", code, home=tmp_path)
        assert done.stderr.splitlines()[-1] == (
            "ImportError: pjw.Worker needs the package pjw: pip install pjw"
        )


def test_a_worker_whose_import_fails_for_another_reason(tmp_path: Path) -> None:
    """Is not said to be missing."""
    code = "import sys; sys.modules['sqlite3'] = None; from pjw import Worker"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of sqlite3 halted" in done.stderr
