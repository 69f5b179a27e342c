"""docs/library.md: each of its programs runs, and prints what stands below it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from pjw.certs.bundle import Bundle, bundle_bytes
from pjw.certs.files import load_client_credentials
from tests.support.service import Service

DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
EXAMPLES: Final = re.findall(r"## ([^\n]*)\n.*?```python\n(.*?)```\n\n```text\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture(scope="module")
def home(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user of this service works: the certificates, a bundle, and the context that was made of it."""
    home = tmp_path_factory.mktemp("home")
    for name in ("ca.crt", "alice.crt", "alice.key"):
        shutil.copy(service.certs / name, home)
    credentials = load_client_credentials(
        *(str(home / name) for name in ("ca.crt", "alice.crt", "alice.key"))
    )
    (home / "alice.pjw").touch(0o600)
    (home / "alice.pjw").write_bytes(bundle_bytes(Bundle(service.address, credentials)))
    service.pjw("context", "add", "prod", str(home / "alice.pjw"), HOME=str(home)).check_returncode()
    return home


@pytest.mark.parametrize(("program", "printed"), [pytest.param(*rest, id=head) for head, *rest in EXAMPLES])
def test_a_program_prints_what_the_document_says(
    service: Service, home: Path, program: str, printed: str
) -> None:
    """With the address of this service, beside its certificates; lines of jobs in any order."""
    assert "localhost:50051" in program or "prod" in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:50051", service.address)],
        cwd=home,
        env={"HOME": str(home)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr.decode(), done.returncode) == ("", 0)
    assert sorted(done.stdout.decode().splitlines()) == sorted(printed.splitlines())


def test_every_program_is_run() -> None:
    """A program without what it prints would not be seen above."""
    assert len(EXAMPLES) == DOCUMENT.count("```python\n") >= 5
