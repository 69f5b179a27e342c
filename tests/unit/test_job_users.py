"""Ranges of user ids by themselves: each claimed in a process of its own, on a file of the test's."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.launcher import job_users
from pjw.launcher.job_users import FORMER_FIRST, OWN_END, OWN_FIRST, claimed_by, known_first, own_ranges
from tests.support.service import wait_for

# says what it has claimed, or why not; then holds it until its stdin closes. It has the lock of a launcher,
# by which others name it.
LAUNCHER = """
import sys
from pathlib import Path
from pjw.errors import PjwError
from pjw.errors import ConfigError
from pjw.launcher import job_users
from pjw.launcher.lock import hold_lock
job_users.CLAIMS, state, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
hold_lock(state)
try:
    print(*job_users.claim_users(state, first, count), flush=True)
except PjwError as error:
    print(error, flush=True)
sys.stdin.read()
"""

Launch = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Claim a range for a state directory by its name: the process that has it, and what it said."""
    monkeypatch.setattr(job_users, "CLAIMS", str(tmp_path / "run" / "job-users"))
    processes = []

    def launch(name: str, first: int = 0, count: int = 100) -> tuple[subprocess.Popen[str], str]:
        state = tmp_path / name
        state.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, job_users.CLAIMS, str(state), str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("first", "count"), [(1000, 100), (1099, 1), (901, 100), (500, 5000)])
def test_an_overlap_is_refused(launch: Launch, tmp_path: Path, first: int, count: int) -> None:
    """By one user id or by all: with the words that tell whose range it is."""
    assert launch("one", 1000)[1] == "1000"
    assert launch("other", first, count)[1] == (
        f"cannot have user ids {first} to {first + count - 1} for jobs: another pjwd on this host,"
        f" with the state directory {tmp_path}/one, has 1000 to 1099"
    )
    assert known_first(str(tmp_path / "other")) == 0


def test_neighbours_do_not_overlap(launch: Launch) -> None:
    """Ranges that touch."""
    assert [launch("one", 1000)[1], launch("two", 900)[1], launch("three", 1100)[1]] == [
        "1000",
        "900",
        "1100",
    ]


def test_a_claim_ends_with_its_launcher(launch: Launch, tmp_path: Path) -> None:
    """However that ends, without anything to clean up."""
    process, _ = launch("one", 1000)
    found = claimed_by(1050, 1)
    assert found == job_users.Claim(1000, 100, str(tmp_path / "one"))
    process.kill()
    process.communicate()
    assert claimed_by(1050, 1) is None
    assert launch("other", 1050)[1] == "1050"


def test_a_range_stays_with_its_state_directory(launch: Launch) -> None:
    """The same after a restart, whatever else has come; different ones for different directories."""
    process, first = launch("one")
    process.kill()
    process.communicate()
    others = {launch(str(number))[1] for number in range(5)}
    assert launch("one")[1] == first
    assert len({first, *others}) == 6
    assert all(OWN_FIRST <= int(each) <= OWN_END - 100 for each in (first, *others))


def test_a_taken_range_is_passed_over(launch: Launch, tmp_path: Path) -> None:
    """The next one is taken then, and that one is kept."""
    best, second = islice(own_ranges(str(tmp_path / "one"), 100), 2)
    holder, said = launch("holder", best)
    assert said == str(best)
    process, said = launch("one")
    assert said == str(second)
    for each in (holder, process):
        each.kill()
        each.communicate()
    assert launch("one")[1] == str(second)


@pytest.mark.parametrize("made", ["scratch", "scratch-dirs"])
def test_an_upgraded_pjw_keeps_its_range(launch: Launch, tmp_path: Path, made: str) -> None:
    """Where a version before has run, its jobs have the user ids that all had then."""
    (tmp_path / "one" / made).mkdir(parents=True)
    assert launch("one")[1] == str(FORMER_FIRST)
    assert f"with the state directory {tmp_path}/one" in launch("two", FORMER_FIRST + 5)[1]


def test_a_configured_range_is_kept_when_its_key_goes(launch: Launch) -> None:
    """So that jobs stay what they were."""
    process, _ = launch("one", 5000)
    process.kill()
    process.communicate()
    assert launch("one")[1] == "5000"


def test_ranges_of_users_for_containers_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """subuid(5) and subgid(5); nonsense in them is not ours to judge."""
    monkeypatch.setattr(job_users, "SUBORDINATES", (str(tmp_path / "missing"),))
    best, second = islice(own_ranges("/state", 100), 2)
    (tmp_path / "subuid").write_bytes(b"nonsense\n\xff:x:y\nalice:%d:1\n" % (best + 99))
    monkeypatch.setattr(job_users, "SUBORDINATES", (str(tmp_path / "missing"), str(tmp_path / "subuid")))
    assert next(own_ranges("/state", 100)) == second


def test_without_a_place_for_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of before may write nowhere in /run: that stops no service, and is said."""
    (tmp_path / "run").write_bytes(b"")
    monkeypatch.setattr(job_users, "CLAIMS", str(tmp_path / "run" / "job-users"))
    first, words = job_users.claim_users(str(tmp_path), 1000, 10)
    assert (first, known_first(str(tmp_path))) == (1000, 1000)
    assert re.match("cannot keep user ids 1000 to 1009 from other pjwd on this host: .*/run: ", words)


def test_what_is_written_down_cannot_be_read(tmp_path: Path) -> None:
    """No guess is made of whose the files of jobs are."""
    (tmp_path / job_users.RECORD).write_text("much\n")
    with pytest.raises(ConfigError, match=r"cannot read .*job-users"):
        known_first(str(tmp_path))


def test_more_than_there_are() -> None:
    """A range that does not fit takes the operator."""
    with pytest.raises(ConfigError, match="there are no 2000000000 user ids"):
        next(own_ranges("/state", 2_000_000_000))


def test_a_launcher_that_is_ending_is_waited_for(launch: Launch, tmp_path: Path) -> None:
    """Its lock on the state directory goes before its claim: it is not taken for another pjwd."""
    state = tmp_path / "one"
    state.mkdir()
    # as one that has lost the lock already, and dies in a moment
    program = LAUNCHER.replace("hold_lock(state)", "")
    with subprocess.Popen(
        [sys.executable, "-c", program, job_users.CLAIMS, str(state), "1000", "100"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as ending:
        assert ending.stdout is not None
        assert ending.stdout.readline().strip() == "1000"
        # what waits for a lock is in /proc/locks with an arrow
        waits = re.compile(rf"->.*:{os.stat(job_users.CLAIMS).st_ino} ")

        def end() -> None:
            wait_for(lambda: waits.search(Path("/proc/locks").read_text()))
            ending.terminate()

        with ThreadPoolExecutor() as thread:
            ended = thread.submit(end)
            assert launch("one", 1000)[1] == "1000"
            ended.result()
