"""What `make package` has made: only `make test-package` has it made first."""

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip when there is nothing to test."""
    if "PJW_DIST" in os.environ:
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(
                pytest.mark.skip(reason="needs what make package makes; runs in make test-package")
            )


@pytest.fixture(scope="session")
def dist() -> Path:
    """Where it is."""
    return ROOT / os.environ["PJW_DIST"]


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """The wheel of pjw."""
    [path] = dist.glob("pjw-*.whl")
    return path


@pytest.fixture(scope="session")
def client_wheel(dist: Path) -> Path:
    """The wheel of pjw-client."""
    [path] = dist.glob("pjw_client-*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    """The source distribution."""
    [path] = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def deb(dist: Path) -> Path:
    """The Debian package."""
    [path] = dist.glob("pjw_*.deb")
    return path


@pytest.fixture(scope="session", params=["pjw-gateway", "pjw-node"])
def small_deb(dist: Path, request: pytest.FixtureRequest) -> Path:
    """The Debian packages that have no program of their own."""
    [path] = dist.glob(f"{request.param}_*.deb")
    return path


@pytest.fixture(scope="session")
def epoch() -> str:
    """The date of all files: that of the commit."""
    return subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True).strip()
