"""What init packs of its job's files after the end, and how it says what has become of them."""

import os
import signal
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.init_harness import JOB_UID, Harness, Inotify, Running
from tests.support.service import packs, wait_for
from tests.unit.test_archive_program import PROGRAM

# In so deep a tree there are very many ways to try such a pattern: the packing lasts.
DEEP = "mkdir -p $(printf 'a/%.0s' $(seq 24))"
LASTING = "**/" * 12 + "z"


class Keeping:
    """Orders of jobs with files that are kept."""

    def __init__(self, init: Harness, path: Path) -> None:
        self._init = init
        self.file = path

    def start(self, script: str, pattern: str, output_max: int = 1_000_000) -> Running:
        """Start a script, and pack what matches when it has ended."""
        patterns = os.memfd_create("patterns")
        os.write(patterns, pattern.encode() + b"\0")
        fds = [os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o600), patterns, os.open(PROGRAM, os.O_RDONLY)]
        words = ("--uid", str(JOB_UID), "--gid", str(JOB_UID), "--output-max", str(output_max), "--keep")
        running = self._init.order(*words, script=script, more_fds=fds)
        for fd in fds:
            os.close(fd)
        return running

    def packing(self) -> Running:
        """A job whose command has ended with 3, and whose packing goes on for long."""
        running = self.start(f"{DEEP}; exit 3", LASTING)
        watch = Inotify(running.status_path)
        watch.wait_until(lambda: b"ended" in running.status_path.read_bytes())
        watch.close()
        return running


@pytest.fixture
def keeping(init: Harness, tmp_path: Path) -> Keeping:
    """Where the artifacts are."""
    return Keeping(init, tmp_path / "artifacts")


def told(running: Running) -> tuple[str, str]:
    """How the command ended, and what has become of the artifacts."""
    _, ended, artifacts = running.wait().status
    return " ".join(ended[2:]), " ".join(artifacts)


def test_what_matches_is_whole(keeping: Keeping) -> None:
    """The mode says so, which is set last; the end comes before it."""
    running = keeping.start("mkdir d e; echo text >d/f; echo >e/f; exit 3", "d")
    assert told(running) == ("exited 3 none", "artifacts whole")
    assert stat.S_IMODE(keeping.file.stat().st_mode) == 0o400
    with tarfile.open(keeping.file) as archive:
        assert archive.getnames() == [".", "./d", "./d/f"]
        assert {entry.uid for entry in archive} == {0}


@pytest.mark.parametrize(
    ("script", "output_max", "words"),
    [
        ("echo >other", 1_000_000, "nothing"),
        ("echo >d; chmod 0 .", 1_000_000, "failed cannot enter /run/job: permission denied"),
        ("echo >d; chmod 0 d", 1_000_000, "failed cannot read d: permission denied"),
        (
            "seq 1000 >d",
            1000,
            "failed cannot write the archive: it is larger than the job's output may be",
        ),
    ],
)
def test_what_is_not_whole_is_empty(keeping: Keeping, script: str, output_max: int, words: str) -> None:
    """The reason is recorded, behind the end."""
    assert told(keeping.start(script, "d", output_max)) == ("exited 0 none", f"artifacts {words}")
    assert (keeping.file.stat().st_size, stat.S_IMODE(keeping.file.stat().st_mode)) == (0, 0o600)


def kill_the_packer(running: Running) -> None:
    """SIGKILL to the only child of init, when it has been executed."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    wait_for(lambda: any(packs(int(child)) for child in children.read_text().split()))
    os.kill(int(children.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("interrupt", "word"),
    [
        # as the launcher stops a job, and as a shutdown of the host does
        (lambda running: running.send(signal.SIGQUIT), "stopped"),
        (lambda running: running.send(signal.SIGTERM), "stopped"),
        (kill_the_packer, "killed"),
    ],
    ids=["stop", "shutdown", "killed"],
)
def test_an_interrupted_packing(keeping: Keeping, interrupt: Callable[[Running], None], word: str) -> None:
    """It leaves nothing, and changes no end."""
    running = keeping.packing()
    interrupt(running)
    assert told(running) == ("exited 3 none", f"artifacts {word}")
    assert (keeping.file.stat().st_size, stat.S_IMODE(keeping.file.stat().st_mode)) == (0, 0o600)


def test_a_job_that_is_stopped_keeps_nothing(keeping: Keeping) -> None:
    """Nothing is packed then."""
    running = keeping.start("echo >d; echo written; exec sleep 600", "d")
    running.wait_for_output("written")
    running.send(signal.SIGQUIT)
    assert told(running) == ("signaled 9 stopped", "artifacts stopped")
