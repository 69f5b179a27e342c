"""The references of the site: all of them are told by the code, and nothing in them is without a word."""

import builtins
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

import pjw
from pjw import errors
from pjw.v1 import job_worker_pb2

SITE: Final = Path(__file__).parents[2] / "docs" / "site"
ERROR: Final = re.compile(r"\b[A-Z]\w+Error\b")
# where a docstring stands for the errors that its class names, and for those of other methods
EVERY: Final = re.compile(r"^Every (?:call|coroutine) may raise .+?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
NO_OTHERS: Final = re.compile(r"Raises\s+only\s+the\s+errors\s+of\s+every\s+(?:call|coroutine)\.")
ERRORS_OF: Final = re.compile(r"(?:errors\s+of|Raises\s+as)\s+(`\w+`(?:(?:,|,?\s+and)\s+`\w+`)*)")
RAISES_NOTHING: Final = {
    "AsyncClient.close": "ends what there is, however far it has come",
    "Client.close": "ends what there is, however far it has come",
    "Job.meets": "compares",
    "Limits.first_above": "compares",
    "Limits.first_below": "compares",
    "Limits.items": "reads fields",
    "Limits.lowered_to": "takes the lower one of two allowed numbers",
    "Worker.end_was_told": "sets a flag",
    "Worker.failed": "its return is the bad news",
    "Worker.gone": "its return is the bad news",
    "Worker.on_connection": "adds to a list",
    "Worker.on_end": "adds to a list",
}


@pytest.fixture
def generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that makes pages, which is no part of a package."""
    monkeypatch.syspath_prepend(str(SITE))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module(request.param)


def without_words(page: str) -> list[str]:
    """The rows of tables whose last cell is empty."""
    return re.findall(r"^\|.*\| +\|$", page, re.MULTILINE)


@pytest.mark.parametrize("generator", ["cli_reference"], indirect=True)
def test_every_option_is_explained(generator: ModuleType) -> None:
    """Both command lines, each command of theirs and each option."""
    for page, some in (
        (generator.pjw(), ("## pjw start", "`--timeout TIME`", "### pjw context add")),
        (generator.pjwd(), ("## pjwd serve", "`--state-dir DIR`", "### pjwd certs client")),
    ):
        assert all(one in page for one in some)
        assert without_words(page) == []


@pytest.mark.parametrize("generator", ["keys_reference"], indirect=True)
def test_every_key_is_explained(generator: ModuleType) -> None:
    """Each key of the configuration, with its default."""
    page = generator.keys()
    assert "| `waiting_inits` | integer, 0 to 1000 | `4` |" in page
    assert "## [ceilings]" in page
    assert without_words(page) == []


@pytest.mark.parametrize("generator", ["library_reference"], indirect=True)
def test_every_name_of_the_library_is_explained(generator: ModuleType) -> None:
    """Each class, method, argument and error; and the errors that words name are those of pjw.errors."""
    page = generator.library()
    assert without_words(page) == []
    used: set[str] = set()
    for name in pjw.__all__:
        cls = getattr(pjw, name)
        assert cls.__doc__
        for method_name, method in generator.public_methods(cls):
            words = inspect.getdoc(method) or ""
            assert words, (name, method_name)
            assert f"### {name}.{method_name}\n" in page
            for error in ERROR.findall(words):
                assert hasattr(errors, error) or hasattr(builtins, error), (name, method_name, error)
            if not isinstance(method, property):
                arguments = set(inspect.signature(method).parameters) - {"self", "cls"}
                unnamed = {each for each in arguments if not re.search(rf"\b{each}\b", words)}
                assert unnamed <= generator.ARGUMENTS.keys(), (name, method_name)
                used |= unnamed
    assert used == generator.ARGUMENTS.keys()


def errors_of(cls: type, method_name: str) -> set[str]:
    """The errors that a method names: itself, by other methods, or as those of every call."""
    words = inspect.getdoc(getattr(cls, method_name)) or ""
    named = set(ERROR.findall(words))
    if NO_OTHERS.search(words):
        named |= errors_of_every_call(cls)
    for others in ERRORS_OF.findall(words):
        for other in re.findall(r"`(\w+)`", others):
            named |= errors_of(cls, other) if other != method_name else set()
    return named


def errors_of_every_call(cls: type) -> set[str]:
    """The errors that the class names for all of its methods."""
    paragraph = EVERY.search(inspect.getdoc(cls) or "")
    assert paragraph, cls
    return set(ERROR.findall(paragraph[0]))


@pytest.mark.parametrize("generator", ["library_reference"], indirect=True)
def test_every_method_of_the_library_names_its_errors(generator: ModuleType) -> None:
    """Or is known to raise none. A property reads what is there, and is no call."""
    silent = {
        f"{name}.{method_name}"
        for name in pjw.__all__
        for method_name, method in generator.public_methods(getattr(pjw, name))
        if not isinstance(method, property) and not errors_of(getattr(pjw, name), method_name)
    }
    assert silent == RAISES_NOTHING.keys()


@pytest.mark.parametrize("generator", ["library_reference"], indirect=True)
def test_both_clients_are_documented_alike(generator: ModuleType) -> None:
    """One has the methods of the other, and names the same errors; help() has the whole text for both."""
    awaited, blocking = (dict(generator.public_methods(cls)) for cls in (pjw.AsyncClient, pjw.Client))
    assert awaited.keys() == blocking.keys()
    for name, method in blocking.items():
        assert errors_of(pjw.AsyncClient, name) == errors_of(pjw.Client, name), name
        assert (inspect.getdoc(awaited[name]) or "").startswith(inspect.getdoc(method) or name), name


@pytest.mark.parametrize("generator", ["api_reference"], indirect=True)
def test_every_method_is_explained(generator: ModuleType) -> None:
    """Each method of the contract, with its words."""
    page = generator.api()
    for method in job_worker_pb2.DESCRIPTOR.services_by_name["JobWorkerService"].methods:
        assert re.search(rf"^### {method.name}\n\n\S", page, re.MULTILINE), method.name


@pytest.mark.parametrize("generator", ["api_reference"], indirect=True)
def test_what_is_not_understood_is_named(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reader of the .proto does not know fails the build, instead of missing from the page."""
    odd = tmp_path / "odd.proto"
    odd.write_text(
        generator.PROTO.read_text().replace("int64 offset = 2;", "int64 offset = 2 [deprecated = true];")
    )
    monkeypatch.setattr(generator, "PROTO", odd)
    with pytest.raises(ValueError, match="not understood are LogsRequest, WriteInputRequest"):
        generator.api()
