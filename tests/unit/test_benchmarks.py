"""What becomes of a benchmark's figures: a regression fails, a burst does not, and the document has them."""

from pathlib import Path

import pytest

from benchmarks import accounts, against, check, document, goals, peers, pjwd
from benchmarks.report import Figure, Held, Report

STORED: check.Ratios = {
    Held.ALWAYS: {"start: time / floor": 2.0, "start: rate / floor": 0.6, "cli: get / python": 4.0},
    Held.IF_THERE: {"start: time / crun": 0.5},
}


def start(time: float = 2, rate: float = 0.6, crun: float | None = 0.5) -> list[Figure]:
    """What a run of a suite finds, by its ratios."""
    figures = [
        Figure("start", "time", time, "ms", "floor", 1),
        Figure("start", "rate", rate, "/s", "floor", 1, more_is_better=True),
        Figure("start", "slowest", 100 * time, "ms", "floor", 1, held=Held.NEVER),
        Figure("start", "alone", time, "ms"),
    ]
    if crun is not None:
        figures.append(Figure("start", "time", crun, "ms", "crun", 1, held=Held.IF_THERE))
    return figures


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        (start(), set()),
        (start(time=0.1, rate=9, crun=0.1), set()),
        (start(time=2.9, rate=0.41), set()),
        (start(time=3.1), {"start: time / floor"}),
        (start(rate=0.39), {"start: rate / floor"}),
        (start(crun=0.8), {"start: time / crun"}),
        # not every machine has it
        (start(crun=None), set()),
        # and this one every machine has
        (start()[1:], {"start: time / floor"}),
        ([], {"start: time / floor", "start: rate / floor"}),
    ],
)
def test_what_is_worse_by_half_or_has_vanished_is_wrong(run: list[Figure], wrong: set[str]) -> None:
    """And what is better is not."""
    assert set(check.complaints(run, ["start"], STORED)) == wrong


def test_a_suite_fails_when_it_is_worse_each_time() -> None:
    """By the same figure, each time that the suite ran again."""
    asked: list[str] = []

    def better(suite: str) -> list[Figure]:
        asked.append(suite)
        # another one, which was good, is no reason either
        return start(rate=0.1)

    def as_bad(suite: str) -> list[Figure]:
        asked.append(suite)
        return start(time=9)

    cli = [Figure("cli", "get", 4, "ms", "python", 1)]
    suites = ["start", "cli"]
    assert check.check(start() + cli, suites, STORED, as_bad) == {}
    assert asked == []
    assert check.check(start(time=9) + cli, suites, STORED, better) == {}
    assert list(check.check(start(time=9) + cli, suites, STORED, as_bad)) == ["start: time / floor"]
    assert asked == ["start"] * (1 + 2)
    runs = iter([start(time=9), start()])
    assert check.check(start(time=9) + cli, suites, STORED, lambda _: next(runs)) == {}


def test_stored_ratios_are_those_of_the_last_run(tmp_path: Path) -> None:
    """Other suites, and peers that are missing, keep theirs."""
    path = tmp_path / "ratios.json"
    check.store([*start(), Figure("cli", "get", 4, "ms", "python", 1)], ["start", "cli"], path)
    assert check.load(path) == STORED
    # without the peer, and without a figure that no longer exists
    check.store(start(time=3, crun=None)[:1], ["start"], path)
    assert check.load(path) == {
        Held.ALWAYS: {"start: time / floor": 3, "cli: get / python": 4},
        Held.IF_THERE: {"start: time / crun": 0.5},
    }


def test_suites_of_one_day_and_machine_stand_in_one_report(tmp_path: Path) -> None:
    """Those of another day do not."""
    path = tmp_path / "build" / "figures.json"
    cli = Figure("cli", "get", 4, "ms", "python", 1)
    Report({"date": "today"}, [*start(time=1), cli]).save(path)
    earlier = Report.load(path)
    assert earlier == Report({"date": "today"}, [*start(time=1), cli])
    assert earlier.joined(Report({"date": "today"}, start())).figures == [cli, *start()]
    assert earlier.joined(Report({"date": "tomorrow"}, start())).figures == start()


def test_figures_replace_what_is_between_the_marks(tmp_path: Path) -> None:
    """And nothing else in the document."""
    path = tmp_path / "performance.md"
    path.write_text(f"above\n\n{document.FIGURES.begin}old\n{document.FIGURES.end}\nbelow\n")
    document.write(Report({"kernel": "6.1"}, start()), path)
    once = path.read_text()
    head, _, tail = once.partition("kernel 6.1\n\n| what ")
    assert (head, "old" in once, tail.endswith(f"|\n\n{document.FIGURES.end}\nbelow\n")) == (
        f"above\n\n{document.FIGURES.begin}\n",
        False,
        True,
    )
    document.write(Report({"kernel": "6.1"}, start()), path)
    assert path.read_text() == once
    path.write_text("no marks")
    with pytest.raises(ValueError, match="it has no marks"):
        document.write(Report({}, []), path)


def test_an_earlier_commit_is_measured_in_turns(tmp_path: Path) -> None:
    """Each number is beside that commit's, once, and what is never held to a ratio has no goal here."""
    turns: list[bool] = []

    def suite() -> list[Figure]:
        mine = pjwd.program() == pjwd.THIS
        turns.append(mine)
        return start(time=3 if mine else 2, rate=0.5 if mine else 0.6)

    found = {figure.name: figure for figure in against.run(suite, {"abc": tmp_path / "pjwd"})}
    assert turns == [False, True, True, False, False, True]
    assert pjwd.program() == pjwd.THIS
    assert {name: (figure.value, figure.reference, figure.met) for name, figure in found.items()} == {
        "time": (3, 2, False),
        "rate": (0.5, 0.6, False),
        "slowest": (300, 200, None),
        "alone": (3, 2, None),
    }
    assert {figure.against for figure in found.values()} == {"abc"}


def test_several_commits_are_measured_in_turns(tmp_path: Path) -> None:
    """Neither of them, nor this tree, is always the first or the last."""
    turns: list[str] = []

    def suite() -> list[Figure]:
        turns.append(pjwd.program().name)
        return start(time=len(turns))

    found = against.measure(suite, {"new": tmp_path / "new", "old": tmp_path / "old"}, turns=2)
    assert turns == ["new", "old", "pjwd", "pjwd", "old", "new"]
    assert {
        name: [figure.value for figure in figures["start: time / floor"]] for name, figures in found.items()
    } == {
        "new": [1, 6],
        "old": [2, 5],
        "this tree": [3, 4],
    }


def measured(cpu: float, life: float, crun: float | None = None) -> dict[str, list[Figure]]:
    """What two turns have found of one pjwd: the second was on a machine that had become half as fast."""
    keys = {goal.name: goal.key for goal in goals.GOALS}
    found = {
        keys["CPU of a life, 8 clients"]: [Figure("start", goals.CPU, cpu, "ms", "floor", 1)] * 2,
        keys["whole life"]: [
            Figure("start", "whole life", life * slower, "ms", "kernel's floor", slower) for slower in (1, 2)
        ],
    }
    found |= {f"start: {goals.CPU}: server / all": [Figure("start", "server", cpu / 2, "ms", "all", cpu)]}
    return found


def test_each_goal_stands_beside_its_ratio() -> None:
    """Either to the first commit, or to what ran beside it in the same turn; for the commits as well."""
    found = {"old": measured(8, 6), "before": measured(9, 7), "this tree": measured(4, 4.6)}
    text, missed = goals.table(found, ["old", "before"])
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {name: cells for name, *cells in table}
    assert rows["what"] == ["this tree", "old", "before", "beside", "ratio", "goal", ""]
    assert rows["CPU of a life, 8 clients"] == [
        *("4.00 ms (0.50)", "8.00 ms (1.00)", "9.00 ms (1.12)", "old", "0.50", "≤ 0.6", "met"),
    ]
    # 4.6 and 9.2 ms beside 1 and 2 ms
    assert rows["whole life"] == [
        *("6.90 ms (4.60)", "9.00 ms (6.00)", "10.5 ms (7.00)"),
        *("kernel's floor: 1.50 ms", "4.60", "≤ 4.5", "missed"),
    ]
    # nothing passes by having vanished
    assert rows["stop of a tree"][-1] == "not measured"
    assert missed == len(goals.GOALS) - 1
    cells = [cell.strip() for cell in goals.parts(found).splitlines()[-1].split("|")[1:-1]]
    assert cells == ["server", "4.00 ms", "4.50 ms", "2.00 ms"]


def test_every_goal_is_about_a_figure() -> None:
    """No two goals are about the same ratio, and a rate is the only one of which more is better."""
    assert len({goal.key for goal in goals.GOALS}) == len(goals.GOALS)
    assert [goal.name for goal in goals.GOALS if goal.more_is_better] == ["starts a second, 8 clients"]


def test_time_is_read_from_either_kind_of_cgroup(tmp_path: Path) -> None:
    """In nanoseconds or in microseconds; another hierarchy of v1 counts no time."""
    one, two, none = (tmp_path / name for name in ("v1", "v2", "cpu"))
    for directory in (one, two, none):
        directory.mkdir()
    (one / "cpuacct.usage").write_text("1500000000\n")
    (two / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\n")
    (none / "cpu.stat").write_text("nr_periods 0\nnr_throttled 0\n")
    assert [accounts.cgroup_seconds(path) for path in (one, two)] == [1.5, 2.5]
    assert [accounts.counts_time(path) for path in (one, two, none)] == [True, True, False]


def test_a_peer_that_cannot_run_says_why() -> None:
    """In its own last words: `make bench` goes on without it."""
    assert peers.why_not(["true"]) is None
    assert peers.why_not(["sh", "-c", "echo first >&2; echo 'no such thing' >&2; exit 1"]) == "no such thing"
    assert peers.why_not(["false"]) == "it ends with 1"
