"""`pjw top` and `pjw stats`, at a terminal and without one, with real jobs of a real pjwd."""

import json
import re
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.support.service import BIN, Service, wait_for
from tests.support.terminal import Terminal

BUSY = "echo mark; while :; do :; done"
# not sync(1): that waits for all that anybody has written
WRITE = "dd if=/dev/zero of=x bs=1M count=1 oflag=direct 2>/dev/null"
WRITES = f"i=0; while :; do i=$((i+1)); {WRITE}; echo round $i; sleep 0.2; done"


def open_top(service: Service, *arguments: str, client: str = "alice", **env: str) -> Terminal:
    """Start `pjw top` at a terminal."""
    environment = service.environment(client) | env
    return Terminal([str(BIN / "pjw"), "top", *arguments], environment, columns=120, lines=30)


@pytest.fixture
def jobs(idle_service: Service) -> Iterator[list[str]]:
    """The only jobs of alice's that run: one that computes, one that writes; their ids."""
    ids = [idle_service.ok("start", command).strip() for command in (BUSY, WRITES)]
    yield ids
    for job_id in ids:
        idle_service.ok("stop", job_id)


def line_of(job_id: str, screen: str) -> str:
    """The line of a job in the table, or nothing."""
    found = re.search(rf"^ {job_id} .*$", screen, re.MULTILINE)
    return found[0] if found else ""


def test_top_shows_what_jobs_use(service: Service, jobs: list[str]) -> None:
    """Their processor time, memory and writes, as numbers and as small plots."""
    busy, writing = jobs
    with open_top(service) as top:
        screen = top.wait_until(lambda text: re.search(r" [1-9]\d+ % .*[▁-█]", line_of(busy, text)))
        assert "mark" in line_of(busy, screen)
        top.wait_until(lambda text: re.search(r"[▁-█].* [1-9][\d.]*[KM] ", line_of(writing, text)))
        assert service.address in top.text
        top.type("q")
        assert top.wait_for_end() == 0


def test_top_shows_commands_at_80_columns(service: Service, jobs: list[str]) -> None:
    """Plots and processes make room for them (U11)."""
    with Terminal([str(BIN / "pjw"), "top"], service.environment(), columns=80, lines=30) as top:
        top.wait_until(lambda text: "echo mark" in line_of(jobs[0], text))
        assert "PIDS" not in top.text
        top.type("q")
        assert top.wait_for_end() == 0


def test_top_shows_what_waits(make_service: Callable[..., Service]) -> None:
    """Jobs of the queue have a state and no usage, and are counted apart."""
    service = make_service().start()
    runs = service.ok("start", "echo mark; sleep 300").strip()
    waits = service.ok("start", "--hold", "echo later").strip()
    with open_top(service) as top:
        screen = top.wait_until(lambda text: " 1 jobs, 1 in the queue" in text and line_of(waits, text))
        assert re.search(r" queued +\d+s +echo later", line_of(waits, screen))
        assert re.search(r" running .* % ", line_of(runs, screen))
        service.ok("release", waits)
        top.wait_until(lambda text: not line_of(waits, text) and "in the queue" not in text)
        top.type("q")
        assert top.wait_for_end() == 0
    service.ok("stop", runs)


def test_top_stops_a_job_only_when_it_is_wanted(service: Service, jobs: list[str]) -> None:
    """The key asks first, and the cursor says which job is meant."""
    busy, writing = jobs
    with open_top(service) as top:
        top.wait_until(lambda text: line_of(busy, text) and line_of(writing, text))
        top.type("s")
        top.wait_until(lambda text: f"Stop job {busy}: echo mark" in text)
        top.type("n")
        top.wait_until(lambda text: "[y/n]" not in text)
        top.type("\x1b[B")
        top.type("k")
        top.wait_until(lambda text: f"Kill job {writing}: " in text)
        top.type("y")
        top.wait_until(lambda text: f"job {writing} has ended" in text and not line_of(writing, text))
        assert json.loads(service.ok("get", busy))["state"] == "running"
        ended = json.loads(service.ok("get", writing))
        assert (ended["reason"], ended["signal"]) == ("stopped", signal.SIGKILL)
        top.type("\x03")
        assert top.wait_for_end() == 0


def test_top_follows_the_output_of_a_job(service: Service, jobs: list[str]) -> None:
    """As it comes, in a pane of its own, which the same key closes."""
    _, writing = jobs
    with open_top(service) as top:
        top.wait_until(lambda text: line_of(writing, text))
        top.type("\x1b[B")
        top.type("\r")
        top.wait_until(lambda text: f"job {writing}" in text and "round 2" in text)
        seen = max(map(int, re.findall(r"round (\d+)", top.text)))
        top.wait_until(lambda text: f"round {seen + 3}" in text)
        top.type("l")
        top.wait_until(lambda text: "round 2\n" not in text)
        top.type("q")
        assert top.wait_for_end() == 0


def has_prompt(screen: str) -> bool:
    """Whether a shell waits. What top has drawn may still be beside its prompt: pyte has no second screen."""
    return re.search(r"[$#]( |$)", screen, re.MULTILINE) is not None


@pytest.mark.parametrize("shell", ["/opt/elsewhere/bash", "/no/such/shell", ""])
def test_top_opens_a_shell_in_a_job(service: Service, jobs: list[str], shell: str) -> None:
    """One's own by its name, or /bin/sh, of the terminal's size; afterwards top is there again (issue 15)."""
    _, writing = jobs
    environment = service.environment() | ({"SHELL": shell} if shell else {})
    with Terminal([str(BIN / "pjw"), "top"], environment, columns=80, lines=30) as top:
        # the keys fit into 80 columns
        top.wait_until(lambda text: line_of(writing, text) and text.endswith("e shell  o order  q quit"))
        before = top.settings
        top.type("\x1b[B")
        top.type("e")
        top.wait_until(has_prompt)
        top.type("stty size; echo in job $PJW_JOB_ID; tr '\\0' ' ' </proc/$$/cmdline\r")
        top.wait_for("30 80", f"in job {writing}", "bash " if "bash" in shell else "sh ")
        top.type("exit 3\r")
        # all is drawn anew
        top.wait_until(
            lambda text: f"in job {writing}" not in text and line_of(writing, text) and "e shell" in text
        )
        assert top.settings == before
        # keys are top's own again
        top.type("k")
        top.wait_until(lambda text: f"Kill job {writing}: " in text)
        top.type("n")
        top.wait_until(lambda text: "[y/n]" not in text)
        top.type("q")
        assert top.wait_for_end() == 0


def test_top_says_why_it_opens_no_shell(service: Service) -> None:
    """And stays. Whoever leaves a shell, which goes on, comes back as well."""
    job_id = service.ok("start", "--pids", "4", "exec sleep 600").strip()
    try:
        with open_top(service) as top:
            top.wait_until(lambda text: line_of(job_id, text))
            top.type("e")
            top.wait_until(has_prompt)
            top.type("echo in ''job\r")
            top.wait_for("in job")
            top.type("~.")
            top.wait_until(lambda text: "in job" not in text and line_of(job_id, text))
            # there is room for no more processes now
            top.type("e")
            top.wait_for("no shell: cannot ")
            top.type("q")
            assert top.wait_for_end() == 0
    finally:
        service.ok("stop", job_id)


def test_nothing_that_a_job_is_called_or_writes_steers_the_terminal(service: Service) -> None:
    """Escape sequences are shown as what they are, in the table, in a question and in output."""
    command = ": '\033]0;owned\007' '[red]a[/red]'; printf 'x\\033]0;owned\\007y\\n'; sleep 1000"
    job_id = service.ok("start", command).strip()
    try:
        with open_top(service) as top:
            top.wait_until(lambda text: r"\x1b]0;owned\x07" in line_of(job_id, text))
            assert "[red]a[/red]" in top.text
            top.type("l")
            top.wait_until(lambda text: r"x\x1b]0;owned\x07y" in text)
            top.type("s")
            top.wait_until(lambda text: "Stop job" in text)
            assert "owned" not in top.screen.title
            top.type("n")
            top.type("q")
            assert top.wait_for_end() == 0
    finally:
        service.ok("stop", job_id)


def test_top_outlives_the_service(make_service: Callable[..., Service]) -> None:
    """It says that nobody answers, and goes on when somebody does; the output that is followed as well."""
    service = make_service().start()
    job_id = service.ok("start", WRITES).strip()
    with open_top(service) as top:
        top.wait_until(lambda text: line_of(job_id, text))
        top.type("l")
        top.wait_until(lambda text: "round 2" in text)
        service.stop()
        top.wait_until(lambda text: "trying again" in text)
        service.start()
        screen = top.wait_until(lambda text: "trying again" not in text and line_of(job_id, text))
        seen = max(map(int, re.findall(r"round (\d+)", screen)))
        top.wait_until(lambda text: f"round {seen + 5}" in text)
        top.type("q")
        assert top.wait_for_end() == 0
    service.ok("stop", job_id)


def test_top_of_others_needs_a_role(service: Service) -> None:
    """It ends with the words of the server, on a terminal that is as it was."""
    for arguments in (["--all"], []):
        command = [str(BIN / "pjw"), "top", *arguments]
        environment = service.environment()
        if not arguments:
            command, environment = [command[0], "--all", "top"], service.environment()
        with Terminal(command, environment) as top:
            assert top.wait_for_end() == 1
            assert "pjw: error: " in top.text


def test_top_without_a_server_or_a_terminal_says_so(service: Service) -> None:
    """Neither is a screen that stays empty."""
    with open_top(service, PJW_SERVER="127.0.0.1:1") as top:
        assert top.wait_for_end() == 125
        assert "cannot connect to 127.0.0.1:1: connection refused" in top.text
    code, words = service.refused("top")
    assert code == 125
    assert "stdin and stdout are not a terminal" in words


def test_stats_plots_the_life_of_a_job(service: Service, jobs: list[str]) -> None:
    """Totals and a plot for each that was used, while it runs and after; as wide as the terminal."""
    busy, _ = jobs

    def samples() -> int:
        return len(json.loads(service.ok("stats", busy, "--format", "json"))["samples"])

    wait_for(lambda: samples() >= 3)
    text = service.ok("stats", busy)
    assert re.match(rf"job {busy}: running after \d+s: echo mark", text)
    assert re.search(r"^CPU .* % on average, \d+ of 100 % at most$", text, re.MULTILINE)
    assert re.search(r"^memory .* of 512M at most$", text, re.MULTILINE)
    assert "CPU, percent of a processor\n" in text
    assert "┤" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) == 80
    seen = service.at_terminal("stats", busy, columns=60)
    assert "\x1b" not in seen, "it is set not to have colours"
    assert max(map(len, seen.splitlines())) == 60
    with Terminal([str(BIN / "pjw"), "stats", busy], service.environment(), columns=60, lines=60) as stats:
        assert stats.wait_for_end() == 0
        colours = {cell.fg for line in stats.screen.buffer.values() for cell in line.values()}
        assert colours > {"default"}
    service.ok("stop", busy)
    assert service.ok("stats", busy).startswith(f"job {busy}: exited after ")


def test_stats_as_json_has_every_sample(service: Service, jobs: list[str]) -> None:
    """With the job as `get` shows it; counters never go back."""
    _, writing = jobs
    wait_for(lambda: len(json.loads(service.ok("stats", writing, "--format=json"))["samples"]) >= 3)
    shown = json.loads(service.ok("stats", writing, "--format=json"))
    assert shown["job"]["id"] == writing
    for key in ("cpuUsageUsec", "ioWriteBytes"):
        values = [sample[key] for sample in shown["samples"]]
        assert values == sorted(values)
    assert [sample["time"] for sample in shown["samples"]] == sorted(s["time"] for s in shown["samples"])


def test_stats_of_a_job_that_is_not_there(service: Service) -> None:
    """Is refused as `get` is; one that was over at once has totals, or says that there is nothing."""
    assert service.refused("stats", "999999")[1].startswith("pjw: error: no job 999999")
    job_id = service.ok("start", "true").strip()
    service.ok("logs", job_id)
    assert service.ok("stats", job_id).startswith(f"job {job_id}: exited after ")
