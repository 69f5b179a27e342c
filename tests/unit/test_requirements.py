"""The locked versions of requirements/: each set has all that pjw imports, in one version for all."""

import re
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]
SETS: Final = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT, CLIENT = (
    tomllib.loads((ROOT / name).read_text())["project"]
    for name in ("pyproject.toml", "packaging/client/pyproject.toml")
)
# pjw needs its own client, with all that this needs
NEEDED: Final = [
    *(text for text in PROJECT["dependencies"] if Requirement(text).name != CLIENT["name"]),
    *CLIENT["dependencies"],
    *CLIENT["optional-dependencies"]["top"],
]


def locked(path: Path) -> dict[str, str]:
    """The version of each library in a set."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_what_pjw_depends_on(path: Path) -> None:
    """None is missing, or of a version that pyproject.toml does not admit."""
    versions = locked(path)
    for text in CLIENT["dependencies"] if path.stem == "client" else NEEDED:
        wanted = Requirement(text)
        assert versions.get(canonicalize_name(wanted.name), "none") in wanted.specifier, text


@pytest.mark.parametrize("name", ["dev", "test"])
def test_what_is_optional_is_tested(name: str) -> None:
    """What checks and tests are run with has it all."""
    versions = locked(ROOT / f"requirements/{name}.txt")
    for texts in PROJECT["optional-dependencies"].values():
        for wanted in map(Requirement, texts):
            assert versions.get(canonicalize_name(wanted.name), "none") in wanted.specifier, wanted


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_one_version_for_all(path: Path) -> None:
    """What was tested is what is installed: all take their versions from dev.txt."""
    tested = locked(ROOT / "requirements/dev.txt")
    versions = locked(path)
    assert {name: versions[name] for name in versions.keys() & tested.keys()} == {
        name: tested[name] for name in versions.keys() & tested.keys()
    }
