"""pjw-hold, what Slurm runs in the place of jobs: what it says to pjwd, and what it does without one."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pjw.node import holds

# scripts/sanitize names another one
PROGRAM: Final = os.environ.get("PJW_HOLD") or str(Path(holds.__file__).with_name("pjw-hold"))
KIND: Final = "1:528:0::"
UUID: Final = "0d9e3c1c-54a5-4d2c-9d7f-0123456789ab"
SECONDS: Final = 30


class Pjwd:
    """The other end of its socket."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._listener = self._listening()
        self.connection: socket.socket | None = None

    def _listening(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(SECONDS)
        made.bind(str(self.path))
        made.listen()
        return made

    def accept(self) -> str:
        """Take a hold; what it says first."""
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(SECONDS)
        return self.hear()

    def hear(self) -> str:
        """What it says next."""
        assert self.connection is not None
        return self.connection.recv(4096).decode()

    def say(self, message: str) -> None:
        """Tell it something."""
        assert self.connection is not None
        self.connection.send(message.encode())

    def restart(self) -> None:
        """Go, and come back."""
        self.close()
        self.path.unlink()
        self._listener = self._listening()

    def close(self) -> None:
        """Go."""
        if self.connection is not None:
            self.connection.close()
        self._listener.close()


@pytest.fixture
def pjwd(tmp_path: Path) -> Iterator[Pjwd]:
    """One that listens."""
    made = Pjwd(tmp_path / "hold.sock")
    yield made
    made.close()


def hold(path: Path, *arguments: str, job: str = "7") -> "subprocess.Popen[str]":
    """Start it, as Slurm's job of this number."""
    return subprocess.Popen(
        [PROGRAM, str(path), *(arguments or (KIND, UUID))],
        env={"SLURM_JOB_ID": job},
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its exit code, and what it complained of."""
    _, said = process.communicate(timeout=SECONDS)
    return process.returncode, said


def test_it_waits_until_it_is_done(pjwd: Pjwd) -> None:
    """With its name, its age and no job at first."""
    process = hold(pjwd.path)
    assert re.fullmatch(rf"hold 1 7 \d {KIND} {UUID} -", pjwd.accept())
    pjwd.say("something that a newer pjwd says")
    pjwd.say("job a")
    pjwd.say("done")
    assert end(process) == (0, "")


def test_it_has_the_same_job_when_pjwd_is_back(pjwd: Pjwd) -> None:
    """The last one that it was given, and not that for which it was submitted."""
    process = hold(pjwd.path)
    pjwd.accept()
    for job in ("a", "b", "not a word", "x" * 256):
        pjwd.say(f"job {job}")
    pjwd.restart()
    assert pjwd.accept().split()[-1] == "b"
    pjwd.say("job -")
    pjwd.restart()
    assert pjwd.accept().split()[-1] == "-"
    pjwd.say("refused nobody needs this place")
    assert end(process) == (75, "pjw-hold: nobody needs this place\n")


def test_slurm_wants_the_place_back(pjwd: Pjwd) -> None:
    """It asks pjwd, again after a restart, and ends when the job has."""
    process = hold(pjwd.path)
    pjwd.accept()
    pjwd.say("job a")
    process.send_signal(signal.SIGTERM)
    assert pjwd.hear() == "end"
    pjwd.restart()
    assert pjwd.accept().split()[-1] == "a"
    assert pjwd.hear() == "end"
    pjwd.say("done")
    assert end(process) == (0, "")


def test_without_a_job_and_without_pjwd_it_just_ends(tmp_path: Path) -> None:
    """Nobody is to be asked."""
    process = hold(tmp_path / "nobody")
    process.send_signal(signal.SIGTERM)
    # before the program has blocked it, the signal has its usual effect
    assert end(process) in ((0, ""), (-signal.SIGTERM, ""))


def test_arguments_that_it_cannot_use(tmp_path: Path) -> None:
    """In words, and at once."""
    path = tmp_path / "nobody"
    for arguments, words in (
        ((KIND,), "usage: pjw-hold SOCKET SHAPE UUID"),
        ((KIND, UUID, "more"), "usage: pjw-hold SOCKET SHAPE UUID"),
        (("a b", UUID), "a shape and a uuid are one printable word each"),
        ((KIND, "x" * 256), "a shape and a uuid are one printable word each"),
        ((KIND, ""), "a shape and a uuid are one printable word each"),
    ):
        assert end(hold(path, *arguments)) == (64, f"pjw-hold: {words}\n")
    for job in ("", "12a", "-1", "9" * 300):
        assert end(hold(path, job=job)) == (
            64,
            "pjw-hold: no SLURM_JOB_ID: this program is for Slurm to run\n",
        )
    assert end(hold(Path("/" + "x" * 200))) == (64, "pjw-hold: the path of the socket is too long\n")
