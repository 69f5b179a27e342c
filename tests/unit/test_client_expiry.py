"""The warning before a client's certificate expires: of `pjw` at a terminal, and of the library in a log."""

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import pjw
from pjw.certs import authority
from pjw.certs.checks import EXPIRES_SOON
from pjw.cli.connection import DAY_SECONDS, OFF, VARIABLE
from pjw.client import config
from tests.support.service import BIN

ROOT = Path(__file__).parents[2]
DAYS = EXPIRES_SOON.days
ALICE = "the client certificate expires on"
AUTHORITY = "the certificate of the server's authority expires on"


def bundle(directory: Path, days: int, ca_days: int = 3650) -> str:
    """A bundle that is valid for so long, of a server that nobody runs."""
    certs = directory / f"{days}-{ca_days}"
    certs.mkdir()
    pair = authority.make_authority(days=ca_days)
    (certs / "ca.crt").write_bytes(pair.crt_pem)
    (certs / "ca.key").write_bytes(pair.key_pem)
    authority.write_client(str(certs), "alice", days=days, bundle_server="127.0.0.1:1")
    return str(certs / "alice.pjw")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with a home of its own."""
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "TERM": "dumb"}


def at_terminal(env: dict[str, str]) -> tuple[str, bytes]:
    """Run `pjw list` with a terminal for its stderr alone; what it says there, and on stdout."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [str(BIN / "pjw"), "list"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):
            while data := os.read(ours, 4096):
                said += data
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert b"Traceback" not in said
    return said.decode(), printed


def test_a_terminal_is_warned_once_a_day(tmp_path: Path, env: dict[str, str]) -> None:
    """In one line, for each certificate; and never when there is time."""
    env["PJW_BUNDLE"] = bundle(tmp_path, DAYS)
    said, printed = at_terminal(env)
    [line] = [each for each in said.splitlines() if "expires" in each]
    assert line.startswith(f"pjw: warning: {ALICE}")
    assert line.endswith(f"ask your operator for a new bundle ({VARIABLE}={OFF} hides this)")
    assert (printed, "expires" in at_terminal(env)[0]) == (b"", False)
    # a day later
    [stamp] = (tmp_path / "home" / ".local" / "state" / "pjw").iterdir()
    assert stamp.read_bytes() == b""
    yesterday = time.time() - DAY_SECONDS - 1
    os.utime(stamp, (yesterday, yesterday))
    assert ALICE in at_terminal(env)[0]
    # another certificate has a day of its own
    env["PJW_BUNDLE"] = bundle(tmp_path, DAYS - 1)
    assert ALICE in at_terminal(env)[0]
    env["PJW_BUNDLE"] = bundle(tmp_path, DAYS + 1)
    assert "expires" not in at_terminal(env)[0]


def test_the_end_of_the_authority_counts(tmp_path: Path, env: dict[str, str]) -> None:
    """It ends all certificates at once."""
    env["PJW_BUNDLE"] = bundle(tmp_path, DAYS + 1, DAYS - 1)
    said, _ = at_terminal(env)
    assert AUTHORITY in said


def test_who_wants_no_warning_has_none(tmp_path: Path, env: dict[str, str]) -> None:
    """Scripts never; a person by a variable. Without a writable home it comes each time."""
    env["PJW_BUNDLE"] = bundle(tmp_path, DAYS)
    done = subprocess.run([str(BIN / "pjw"), "list"], env=env, capture_output=True, check=False, timeout=60)
    assert (done.stdout, b"expires" in done.stderr) == (b"", False)
    assert "expires" not in at_terminal({**env, VARIABLE: OFF})[0]
    assert not (tmp_path / "home").exists()
    # no directory, or none that a user without HOME would find again
    for home in ("/proc/none", "/proc/none", "relative", "relative"):
        assert ALICE in at_terminal({**env, "XDG_STATE_HOME": home})[0]
    assert not Path("relative").exists()


@pytest.fixture
def told() -> Iterator[None]:
    """A program that has been told of nothing yet."""
    was = config.log.disabled
    config.log.disabled = False
    yield
    config.log.disabled = was


@pytest.mark.usefixtures("told")
def test_a_program_hears_of_it_in_its_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each certificate, from one logger, which turns it off."""
    path = bundle(tmp_path, DAYS)
    for _ in range(2):
        pjw.Client.from_bundle(path).close()
    [record] = caplog.records
    assert (record.name, record.levelno) == ("pjw.client.config", logging.WARNING)
    assert record.getMessage().startswith(ALICE)
    caplog.clear()
    pjw.Client.from_bundle(bundle(tmp_path, DAYS + 1)).close()
    config.log.setLevel(logging.ERROR)
    try:
        pjw.Client.from_bundle(bundle(tmp_path, DAYS - 1)).close()
    finally:
        config.log.setLevel(logging.NOTSET)
    assert caplog.records == []


def test_the_number_has_one_owner() -> None:
    """What repeats it, since it cannot import it, has the same one."""
    rules = (ROOT / "packaging/prometheus/pjw.rules.yml").read_text()
    assert f"pjw_certificate_expiry_timestamp_seconds - time() < {DAYS} * 86400" in rules
