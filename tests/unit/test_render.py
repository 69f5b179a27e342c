"""What is shown on stdout: the seed's JSON in the seed's order, and a table that fits."""

import json
import unicodedata
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pjw.cli import render
from pjw.model import EndReason, ExitStatus, Job, JobState, Limits, Usage, UsageSample

START = datetime(2026, 11, 23, 23, 59, 58, 999_999, UTC)
RUNNING = Job(1, "alice", 'echo "hello world"', JobState.RUNNING, Limits(), START)
ENDED = replace(
    RUNNING,
    state=JobState.EXITED,
    end=START + timedelta(seconds=1),
    exit_status=ExitStatus(0),
    reason=EndReason.COMPLETED,
    usage=Usage(1, 2, 3, 4, 5),
    output_bytes=6,
)


def table(job: Job, monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> str:
    """The one line of the table for a job."""
    monkeypatch.setenv("COLUMNS", str(columns))
    [_, line] = render.job_table([job])
    return line


def test_the_json_is_the_seeds_with_more_behind_it() -> None:
    """Text, not only values: layout and order are what a person compares with the seed."""
    assert render.job_json(ENDED).startswith(
        '{\n  "id": "1",\n  "command": "echo \\"hello world\\"",\n  "start": "2026-11-23T23:59:58Z",\n'
        '  "end": "2026-11-23T23:59:59Z",\n  "exitCode": 0,\n  "state": "exited",\n'
    )


def test_what_is_not_known_yet_is_null() -> None:
    """A running job has all keys, and null for what only its end will tell."""
    running, ended = json.loads(render.job_json(RUNNING)), json.loads(render.job_json(ENDED))
    assert list(running) == list(ended)
    assert {key for key, value in running.items() if value is None} == {
        "end",
        "exitCode",
        "reason",
        "signal",
        "usage",
        "outputBytes",
        "usageNow",
        "queued",
        "notBefore",
        "retriedAs",
        "array",
        "arrayId",
        "arrayIndex",
        "artifacts",
    }
    assert {key for key, value in ended.items() if value is None} == {
        "signal",
        "usageNow",
        "queued",
        "notBefore",
        "retriedAs",
        "array",
        "arrayId",
        "arrayIndex",
        "artifacts",
    }


def test_a_job_that_was_not_started() -> None:
    """It has no start in JSON; tables say how long it waits, and that it ended without a start."""
    waiting = replace(
        RUNNING,
        state=JobState.QUEUED,
        queued=START,
        not_before=START,
        held=True,
        priority=7,
        detail="waits until it is released",
    )
    shown = json.loads(render.job_json(waiting))
    assert shown["start"] is None
    assert (shown["queued"], shown["notBefore"]) == ("2026-11-23T23:59:58Z", "2026-11-23T23:59:58Z")
    assert (shown["priority"], shown["held"], shown["state"]) == (7, True, "queued")
    _, line, why = render.job_table([waiting])
    assert line.split()[:2] == ["1", "queued"]
    assert why.strip() == waiting.detail
    _, line, why = render.queue_table([waiting])
    assert line.split()[:2] == ["1", "7"]
    assert why.strip() == waiting.detail
    cancelled = replace(waiting, state=JobState.EXITED, end=START, reason=EndReason.CANCELLED)
    assert json.loads(render.job_json(cancelled))["start"] is None
    assert render.end_line(cancelled) == "1: exited without a start"


def test_what_a_running_job_uses() -> None:
    """A member of its own: `usage` stays null until it is final."""
    sample = UsageSample(START, 1, 2, 3, 4, 5)
    shown = json.loads(render.job_json(replace(RUNNING, usage_now=sample, workdir="/usr")))
    assert (shown["usage"], shown["workdir"]) == (None, "/usr")
    assert shown["usageNow"] == {
        "time": "2026-11-23T23:59:58Z",
        "cpuUsageUsec": 1,
        "memoryBytes": 2,
        "ioReadBytes": 3,
        "ioWriteBytes": 4,
        "pids": 5,
    }


def test_a_killed_job_has_the_code_of_a_shell() -> None:
    """null means that a job still runs (the seed), so one that a signal ended has 128 + the signal."""
    shown = json.loads(render.job_json(replace(ENDED, exit_status=ExitStatus(signal=9))))
    assert (shown["exitCode"], shown["signal"]) == (137, 9)


def test_every_limit_and_account_is_shown_in_camel_case() -> None:
    """A limit that is added to the model appears by itself; so does an account."""
    shown = json.loads(render.job_json(ENDED))
    assert list(shown["limits"].values()) == [value for _, value in Limits().items()]
    assert all(key.isalnum() and key[0].islower() for key in (*shown["limits"], *shown["usage"]))
    assert list(shown["usage"].values()) == [1, 2, 3, 4, 5]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_command_is_json(command: str) -> None:
    """Whatever the command is, its JSON is read back as it was."""
    assert json.loads(render.job_json(replace(RUNNING, command=command)))["command"] == command


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\x9b31mred \x7f \u202e")
def test_json_cannot_steer_a_terminal(text: str) -> None:
    """Control characters of both halves, and what turns text around, are escaped; letters are not."""
    job = replace(RUNNING, command=text)
    for shown in (render.job_json(job), render.job_line(job), "".join(render.jobs_json([job]))):
        assert all(c.isprintable() or c == "\n" for c in shown)
        found = json.loads(shown)
        assert (found[0] if isinstance(found, list) else found)["command"] == text
    assert '"Grüße, 世界"' in render.job_line(replace(RUNNING, command="Grüße, 世界"))


@given(st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    """No control, format, or other invisible character is left, and one line stays one."""
    shown = render.printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in shown)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exit_status": ExitStatus(0)}, " 0 "),
        ({"exit_status": ExitStatus(3)}, " 3 "),
        ({"exit_status": ExitStatus(signal=15), "reason": EndReason.STOPPED}, " signal 15 "),
        ({"exit_status": ExitStatus(signal=9), "reason": EndReason.OOM_KILLED}, " oom_killed "),
        ({"exit_status": ExitStatus(signal=9), "reason": EndReason.TIMED_OUT}, " timed_out "),
        ({"exit_status": ExitStatus(signal=9), "reason": EndReason.OUTPUT_LIMIT}, " output_limit "),
        ({"exit_status": None, "state": JobState.LOST, "reason": EndReason.LOST}, " lost "),
    ],
)
def test_the_table_says_how_a_job_ended(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: str
) -> None:
    """A code, a signal, or the reason where that says more."""
    assert words in table(replace(ENDED, **changes), monkeypatch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (3600, "1h"),
        (86_399, "23h"),
        (86_400, "1d"),
        (-5, "0s"),
    ],
)
def test_the_table_says_how_old_a_job_is(monkeypatch: pytest.MonkeyPatch, age: int, words: str) -> None:
    """In the largest unit; a clock that was set back is no negative age."""
    job = replace(RUNNING, start=datetime.now(UTC) - timedelta(seconds=age))
    assert table(job, monkeypatch).split()[2] in (words, f"{age + 1}s")


def test_a_table_of_all_clients_says_whose_each_job_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One column more, right behind the id, and the rest as it was."""
    monkeypatch.setenv("COLUMNS", "100")
    own, everybodys = (list(render.job_table([ENDED], with_clients=each)) for each in (False, True))
    assert [line.split() for line in own] == [
        [word for word in line.split() if word not in ("CLIENT", "alice")] for line in everybodys
    ]
    assert [line.split()[1] for line in everybodys] == ["CLIENT", "alice"]
    assert len({line.index(word) for line, word in zip(everybodys, ("STATE", "exited"), strict=True)}) == 1


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A long command is cut; in a very narrow terminal 20 characters of it are kept all the same."""
    line = table(replace(RUNNING, command="x\n" * 1000), monkeypatch, columns)
    assert "\n" not in line
    assert len(line) == max(columns, line.index("x") + 20)
