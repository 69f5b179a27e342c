"""What `pjw list` prints beside ids: arrays, lines, templates, names and colours."""

import json
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pjw.cli import render
from pjw.cli.plain import stamped
from pjw.cli.template import Template
from pjw.client.requests import TimedOutput
from pjw.model import EndReason, ExitStatus, Job, JobState, Limits

START = datetime(2026, 11, 23, 23, 59, 58, 250_000, UTC)
RUNNING = Job(7, "alice", "sleep 300", JobState.RUNNING, Limits(), START, labels={"team": "x", "a.b/c": "y"})
ENDED = replace(
    RUNNING,
    id=8,
    name="build",
    state=JobState.EXITED,
    end=START + timedelta(seconds=75),
    exit_status=ExitStatus(3),
    reason=EndReason.COMPLETED,
)


@pytest.mark.parametrize("jobs", [[], [RUNNING], [RUNNING, ENDED]])
def test_json_is_an_array_and_jsonl_a_line_each(jobs: list[Job]) -> None:
    """The same keys in all, as `pjw get` has them; an array that nothing is in is one all the same."""
    single = [json.loads(render.job_json(job)) for job in jobs]
    assert json.loads("".join(render.jobs_json(jobs))) == single
    assert [json.loads(render.job_line(job)) for job in jobs] == single
    assert all("\n" not in render.job_line(job) for job in jobs)


def test_an_array_begins_before_all_jobs_are_there() -> None:
    """A list of a million is not held in memory."""

    def endless() -> Iterator[Job]:
        while True:
            yield RUNNING

    pieces = render.jobs_json(endless())
    assert next(pieces).startswith('[\n  {\n    "id": "7"')
    assert next(pieces).startswith(",\n  {")


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{id} {state}", "8 exited"),
        ("{id:>4}|{name:<7}|", "   8|build  |"),
        ("{exitCode} {signal} {end}", "3  2026-11-24T00:01:13Z"),
        ("{duration}", "1m15s"),
        ("{limits.pidsMax} {labels.team} {labels.a.b/c} {labels.none}", "512 x y "),
        ("{labels}", "team=x,a.b/c=y"),
        ("{splitStderr}", "false"),
        (r"{id}\t{{x}}\n", "8\t{x}\n"),
        ("", ""),
    ],
)
def test_a_template_is_filled_in(template: str, line: str) -> None:
    """With the names of the JSON; what a job does not have is empty."""
    assert Template(template).fill(ENDED, str) == line


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{nothing}", "'nothing' is none of"),
        ("{}", "'{}' is none of"),
        ("{0}", "'0' is none of"),
        ("{id.__class__}", None),
        ("{id[0]}", "is none of"),
        ("{id!r}", "is none of"),
        ("{id:{state}}", "is none of"),
        ("{id:d}", "format code"),
        ("{id:>99999999999}", "wider than 9999 columns"),
        ("{id:.20000}", "wider than 9999 columns"),
        ("{id", "expected '}'"),
        ("}", "Single '}'"),
    ],
)
def test_an_odd_template_is_refused_or_empty(template: str, words: str | None) -> None:
    """When it is typed, not in mid-list; no attribute of ours can be reached."""
    if words is None:
        assert Template(template).fill(ENDED, str) == ""
        return
    with pytest.raises(ArgumentTypeError) as caught:
        Template(template)
    assert words in str(caught.value)


def test_what_a_job_says_goes_through_the_filter() -> None:
    """A command cannot steer the terminal by way of a template."""
    job = replace(RUNNING, command="\x1b[2J")
    assert Template("{command}").fill(job, render.printable) == r"\x1b[2J"
    assert Template("{command}").fill(job, str) == "\x1b[2J"


def test_names_are_a_column_when_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no job has one there is no column; and each job is in the right one."""
    monkeypatch.setenv("COLUMNS", "100")
    assert "NAME" not in next(iter(render.job_table([RUNNING])))
    head, first, second = render.job_table([RUNNING, ENDED])
    assert head.split() == ["ID", "NAME", "STATE", "AGE", "DURATION", "EXIT", "COMMAND"]
    assert second.split()[1:3] == ["build", "exited"]
    assert {line.index(word) for line, word in ((head, "STATE"), (first, "running"), (second, "exited"))} == {
        head.index("STATE")
    }


def test_colours_change_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its colours a line is the same as one that never had any."""
    monkeypatch.setenv("COLUMNS", "60")
    jobs = [replace(RUNNING, command="x" * 100), ENDED]
    plain, painted = (list(render.job_table(jobs, with_colours=each)) for each in (False, True))
    assert plain[1:] != painted[1:]
    stripped = [line.replace("\x1b[0m", "") for line in painted]
    for code in ("1", "2", "31", "32", "33"):
        stripped = [line.replace(f"\x1b[{code}m", "") for line in stripped]
    assert stripped == plain


def test_times_stand_before_lines_however_they_come() -> None:
    """A line in pieces has the time of its first one; a carriage return ends none; no time is a dash."""
    late = START + timedelta(seconds=1)
    pieces = [
        TimedOutput(START, b"one\ntw"),
        TimedOutput(late, b"o\r50%\nthree\n"),
        TimedOutput(None, b"\nfour"),
        TimedOutput(late, b"\n"),
    ]
    first, second = b"2026-11-23T23:59:58.250000Z ", b"2026-11-23T23:59:59.250000Z "
    assert b"".join(stamped(pieces)) == (
        first + b"one\n" + first + b"two\r50%\n" + second + b"three\n" + b"- \n" + b"- four\n"
    )
