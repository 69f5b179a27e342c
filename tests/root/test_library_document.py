"""docs/library.md: each of its programs runs, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.service import Service

DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
EXAMPLES: Final = re.findall(r"## ([^\n]*)\n.*?```python\n(.*?)```\n\n```text\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.parametrize(("program", "printed"), [pytest.param(*rest, id=head) for head, *rest in EXAMPLES])
def test_a_program_prints_what_the_document_says(service: Service, program: str, printed: str) -> None:
    """With the address of this service, beside its certificates; lines of jobs in any order."""
    assert "localhost:50051" in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:50051", service.address)],
        cwd=service.certs,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr.decode(), done.returncode) == ("", 0)
    assert sorted(done.stdout.decode().splitlines()) == sorted(printed.splitlines())


def test_every_program_is_run() -> None:
    """A program without what it prints would not be seen above."""
    assert len(EXAMPLES) == DOCUMENT.count("```python\n") >= 4
