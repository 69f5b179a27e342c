"""What `make fuzz` begins with, and what it has found, without its tools: no input shows a bug."""

import importlib
from pathlib import Path

import pytest

from tests.fuzz import TARGETS

FOUND = Path(__file__).parents[1] / "fuzz" / "found"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take back what a target sets: later tests of this process start programs with these variables."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    """Each target takes the inputs that it begins with."""
    target = importlib.import_module(f"tests.fuzz.{name}")
    for seed in target.seeds():
        target.one_input(seed)


@pytest.mark.parametrize(
    ("name", "path"),
    [(path.parent.name, path) for path in sorted(FOUND.glob("*/*"))],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_found(name: str, path: Path) -> None:
    """What once found a bug finds it no more."""
    assert name in TARGETS
    importlib.import_module(f"tests.fuzz.{name}").one_input(path.read_bytes())
