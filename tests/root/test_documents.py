"""The documents that are sessions: whoever types what they show sees what they show."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import documents
from tests.support.service import BIN, end_all, instance_cgroups

DOCS: Final = Path(__file__).parents[2] / "docs"
TUTORIAL: Final = DOCS / "tutorial.md"
# each is typed from its first command to its last, in an empty directory
SESSIONS: Final = ("tutorial.md", "limits.md", "certificates.md", "cli.md")
# these are for who has a service: they go on where the tutorial has its first job
GO_ON: Final = ("ci.md",)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the session is typed; whatever became of it, no job outlives the test."""
    # not /tmp, which may be memory: the limits of disk IO need a disk
    made = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield made
    end_all(made / "state")
    shutil.rmtree(made)


@pytest.mark.parametrize("name", [*SESSIONS, *GO_ON])
def test_a_session_is_as_it_is_shown(name: str, directory: Path) -> None:
    """Each command of the document is typed at a terminal, and shows what the document says."""
    commands = documents.commands_of(DOCS / name)
    if name in GO_ON:
        start = documents.line_of(TUTORIAL, "## The first job")
        commands = [one for one in documents.commands_of(TUTORIAL) if one.line < start] + commands
    path = f"{BIN}:{os.environ['PATH']}"
    documents.run(commands, directory, {"PATH": path, "LANG": "C.UTF-8", "NO_COLOR": "1"})
    assert instance_cgroups(directory / "state") == []
