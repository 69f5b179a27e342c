"""`pjw help`, and the man pages that are made of the same texts."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pjw.cli.parser import build_parser, commands_of
from pjw.cli.topics import TOPICS
from pjw.model import KNOWN_STATES, EndReason
from tests.support.service import BIN

ROOT = Path(__file__).parents[2]


def pjw_help(*words: str) -> "subprocess.CompletedProcess[str]":
    """What `pjw help` says, without a home, a server or a terminal."""
    return subprocess.run(
        [BIN / "pjw", "help", *words],
        env={"HOME": "/nonexistent", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_alone_names_every_command_and_topic() -> None:
    """As --help does, and what more there is to read."""
    text = pjw_help().stdout
    for word in (*commands_of(build_parser()), *TOPICS):
        assert re.search(rf"^ +{word}(  |$)", text, re.MULTILINE), word


def test_a_command_that_comes_first_is_parsed_by_itself() -> None:
    """As it is among all of them; they are all there when it does not come first, or when there is none."""
    every = commands_of(build_parser())
    for name, command in every.items():
        [(alone, parser)] = commands_of(build_parser([name, "--all"])).items()
        assert (alone, parser.format_help()) == (name, command.format_help())
    for words in ([], ["--all", "get"], ["gte"], ["--help"]):
        assert [*commands_of(build_parser(words))] == [*every]


def test_every_state_and_reason_can_be_asked_for() -> None:
    """The parser has its own list of them: the model's import would cost each command time."""
    parser = build_parser()
    assert parser.parse_args(["list", *(f"--reason={each}" for each in EndReason)]).reason == list(EndReason)
    assert parser.parse_args(["list", *(f"--state={each}" for each in KNOWN_STATES)]).state == [*KNOWN_STATES]


def test_every_command_has_help() -> None:
    """`pjw help COMMAND` is `pjw COMMAND --help`, at any depth."""
    assert pjw_help("start").stdout.startswith("usage: pjw start ")
    assert pjw_help("context", "add").stdout.startswith("usage: pjw context add ")


@pytest.mark.parametrize("name", TOPICS)
def test_every_topic_fits_a_terminal(name: str) -> None:
    """A text that is printed as it is, 80 columns wide, and ends in one newline."""
    text = pjw_help(name).stdout
    assert text.startswith(f"{name}: {TOPICS[name].title}\n\n")
    assert max(map(len, text.splitlines())) <= 90
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@pytest.mark.parametrize("words", [["nope"], ["list", "nope"], ["context", "nope"]])
def test_what_has_no_help_is_wrong_usage(words: list[str]) -> None:
    """With the words that there is help for."""
    done = pjw_help(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: no help for 'nope'; there is for: " in done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The man pages, as a package has them."""
    directory = tmp_path_factory.mktemp("man")
    environment = os.environ | {"SOURCE_DATE_EPOCH": "86400", "PYTHON": str(BIN / "python")}
    subprocess.run([ROOT / "scripts" / "make-man", directory], env=environment, check=True)
    return directory


def test_the_man_pages_say_all_that_help_says(pages: Path) -> None:
    """Every command, topic and key, and nothing of the day or the terminal of who made them."""
    assert sorted(os.listdir(pages)) == ["pjw.1", "pjwd.8", "pjwd.toml.5"]
    text = (pages / "pjw.1").read_text()
    for command in commands_of(build_parser()):
        assert rf".SS \fBpjw {command}\fR" in text
    for name, topic in TOPICS.items():
        assert f".SH {name}: {topic.title}".upper() in text
    assert '"1970-01-02"' in text.splitlines()[0]
    assert "pjwd serve" in (pages / "pjwd.8").read_text()
    # what begins with a space is not filled
    assert not re.search(r"^usage: .*\n ", text + (pages / "pjwd.8").read_text(), re.MULTILINE)
    keys = re.findall(r"^\| `([a-z_]+)` ", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(keys) > 10
    for key in keys:
        assert rf"\fB{key}\fR" in (pages / "pjwd.toml.5").read_text()


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here")
@pytest.mark.parametrize("page", ["pjw.1", "pjwd.8", "pjwd.toml.5"])
def test_groff_has_nothing_to_warn_of(pages: Path, page: str) -> None:
    """Every macro is known, every font ends."""
    done = subprocess.run(
        ["groff", "-Kutf8", "-man", "-Tutf8", "-ww", "-z", pages / page],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_make_man_takes_no_option_for_a_directory(tmp_path: Path) -> None:
    """`--help` was once a directory of the repository (U7)."""
    done = subprocess.run(
        [ROOT / "scripts" / "make-man", "--help"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (2, b"usage: scripts/make-man [DIR]\n", [])


@pytest.mark.parametrize("program", ["pjw", "pjwd"])
def test_the_version_is_that_of_the_package(program: str) -> None:
    """Without importlib.metadata, which takes longer to import than all else (U15)."""
    code = (
        "import sys; from pjw.version import version; print(version(), 'importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [metadata.version("pjw-client"), "False"]
    said = subprocess.run([BIN / program, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == f"{program} {metadata.version('pjw')}\n"
