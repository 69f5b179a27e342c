"""The sections of documents about a job's own files and network: whoever types them sees what they show.

The reader of these has a service whose operator has an image with Python and offers names on the network. So
they go on where the tutorial has its first job, with that image, and with hosts of a made-up internet. There
the package index speaks http, as the image's pip is told; all else is as the documents say.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.root.test_documents import DOCS, TUTORIAL
from tests.root.test_egress import wheel
from tests.support import debian, documents
from tests.support.service import BIN, end_all, instance_cgroups

IMAGES: Final = DOCS / "images.md"
NETWORK: Final = DOCS / "network.md"
ADDRESS: Final = "127.1.0.1"
PIP: Final = "[global]\nindex-url = http://pypi.org/simple/\ntrusted-host = pypi.org files.pythonhosted.org\n"


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """The root of Debian's Python, whose pip knows the made-up index."""
    tar = debian.debian_tar(*debian.PYTHON)
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    subprocess.run(["tar", "--extract", "--file", tar, "--directory", where], check=True)
    (where / "etc/pip.conf").write_text(PIP)
    yield where
    shutil.rmtree(where)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the session is typed; whatever became of it, no job outlives the test."""
    made = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield made
    end_all(made / "state")
    shutil.rmtree(made)


def type_section(directory: Path, document: Path, heading: str, image: Path | None = None) -> None:
    """Type the tutorial up to its first job, with the operator's offer, and then a section."""
    start = documents.line_of(TUTORIAL, "## The first job")
    before = [command for command in documents.commands_of(TUTORIAL) if command.line < start]
    [serve] = [command for command in before if command.typed.startswith("pjwd serve ")]
    serve.typed += " --config pjwd.toml"
    [offer] = [block for block in NETWORK.read_text().split("```") if block.startswith("toml\n[network]\n")]
    private = f'private = ["{ADDRESS}/32"]\n'
    (directory / "pjwd.toml").write_text(offer.removeprefix("toml\n") + private)
    if image is not None:
        words = f'pjwd image import --state-dir "$PWD/state" python dir:{image}'
        before.append(documents.Command(words, "", "", document.name, 0, ["…", "sha256-…"]))
    env = {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "NO_COLOR": "1"}
    env |= {"PIP_CONFIG_FILE": str(directory / "pip.conf"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    (directory / "pip.conf").write_text(PIP)
    typed = documents.section_of(document, heading)
    assert typed, heading
    with tempfile.TemporaryDirectory(prefix="pjw-test-", dir="/var/lib") as made:
        hosts = Path(made)
        documents.run([*before, *typed], directory, env, lambda words: internet(hosts, words))
    assert instance_cgroups(directory / "state") == []


@contextmanager
def internet(where: Path, words: list[str]) -> Iterator[Path]:
    """pypi.org and files.pythonhosted.org with one package; the names of both."""
    names = where / "hosts"
    names.write_text(f"127.0.0.1 localhost\n{ADDRESS} pypi.org files.pythonhosted.org\n")
    simple = where / "files/simple/requests"
    simple.mkdir(parents=True)
    name = wheel(where / "files", "requests")
    link = f"<!DOCTYPE html><a href='http://files.pythonhosted.org/{name}'>requests</a>"
    (simple / "index.html").write_text(link)
    serve = [
        "python3",
        "-u",
        "-m",
        "http.server",
        "--bind",
        ADDRESS,
        "--directory",
        str(where / "files"),
        "80",
    ]
    with subprocess.Popen(
        [*words, *serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("Serving HTTP")
        try:
            yield names
        finally:
            server.terminate()


def test_run_untrusted_code(directory: Path, python: Path) -> None:
    """docs/images.md."""
    type_section(directory, IMAGES, "## Run untrusted code", python)


def test_install_packages_without_a_network(directory: Path, python: Path) -> None:
    """docs/images.md."""
    type_section(directory, IMAGES, "## Install packages in a job", python)


def test_install_packages_from_an_index(directory: Path, python: Path) -> None:
    """docs/network.md."""
    type_section(directory, NETWORK, "## Install packages in a job", python)


def test_a_database_beside_tests(directory: Path) -> None:
    """docs/network.md."""
    if not all(shutil.which(name, path="/usr/local/bin:/usr/bin") for name in ("initdb", "postgres", "psql")):
        pytest.skip("no PostgreSQL whose programs are in a job's PATH on this machine")
    type_section(directory, NETWORK, "## A database beside tests")
