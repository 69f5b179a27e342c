"""Many jobs at the command line: what `list` shows of them, and `stop`, `rm` and `prune` by what they are."""

import json
import os
import re
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, CALL_SECONDS, Service, wait_for
from tests.support.terminal import Terminal

LABEL = "--label=test=many"


@pytest.fixture(scope="module")
def crowd(service: Service) -> Iterator[list[int]]:
    """One job that runs, and 24 that have ended after it, the last with 3; their ids."""
    with service.stub() as stub:
        labels = {"test": "many"}
        commands = ["sleep 300", *["true"] * 23, "exit 3"]
        ids = [stub.Start(pb.StartRequest(command=each, labels=labels)).job.id for each in commands]
        for each in ids[1:]:
            stub.Wait(pb.WaitRequest(id=each), timeout=CALL_SECONDS)
    yield ids
    service.pjw("stop", LABEL)


def shown(text: str) -> list[int]:
    """The ids in a table."""
    return [int(found) for found in re.findall(r"^ *(\d+)  ", text, re.MULTILINE)]


def test_a_terminal_shows_what_runs_and_what_is_new(service: Service, crowd: list[int]) -> None:
    """The others are told of; a pipe has all, as ever."""
    seen = service.at_terminal("list", LABEL)
    assert shown(seen) == [crowd[0], *crowd[-20:]]
    assert "`pjw list --limit all`" in seen
    assert shown(service.at_terminal("list", LABEL, "--limit", "all")) == crowd
    assert shown(service.at_terminal("list", LABEL, "--state", "exited")) == crowd[-20:]
    assert service.ok("list", LABEL).split() == [str(each) for each in crowd]


def test_get_shows_what_a_running_job_uses_and_where_it_began(service: Service) -> None:
    """Beside `usage`, which stays null until it is final; `list` measures nothing."""
    start = ("start", "--workdir", "/usr", "head -c 64M /dev/zero >/tmp/x; echo up; sleep 300")
    job = service.ok(*start).strip()
    with service.popen("logs", job) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"up\n"
        logs.terminate()

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(service.ok("get", job))
        return found

    # a sample of the moment before may be a second old
    wait_for(lambda: shown()["usageNow"]["memoryBytes"] > 64 * 1024**2)
    running = shown()
    assert (running["workdir"], running["usage"], running["usageNow"]["pids"]) == ("/usr", None, 3)
    assert running["usageNow"]["cpuUsageUsec"] > 0
    [listed] = json.loads(service.ok("list", "--format", "json", "--limit", "1"))
    assert (listed["workdir"], listed["usageNow"]) == ("/usr", None)
    service.ok("stop", job)
    ended = shown()
    assert (ended["workdir"], ended["usageNow"]) == ("/usr", None)
    assert ended["usage"]["cpuUsageUsec"] >= running["usageNow"]["cpuUsageUsec"]
    other = service.ok("start", "true").strip()
    assert json.loads(service.ok("get", other))["workdir"] == "/run/job"


def test_jobs_are_listed_by_how_they_ended_and_when_they_began(service: Service, crowd: list[int]) -> None:
    """In a pipe and at a terminal alike; with a number, the newest that fit."""
    running, *_, before, failed = map(str, crowd)
    assert service.ok("list", LABEL, "--failed").split() == [failed]
    assert shown(service.at_terminal("list", LABEL, "--failed")) == [int(failed)]
    assert service.ok("list", LABEL, "--failed", "--limit", "5").split() == [failed]
    assert service.ok("list", LABEL, "--reason", "completed", "--limit", "2").split() == [before, failed]
    assert service.ok("list", LABEL, "--since", "1h").split() == [str(each) for each in crowd]
    assert service.ok("list", LABEL, "--since", "2999-01-01T00:00Z") == ""
    start = json.loads(service.ok("get", before))["start"]
    assert running not in service.ok("list", LABEL, "--since", start, "--reason", "stopped").split()


def test_a_command_that_is_cut_says_so(service: Service) -> None:
    """With an ellipsis, within the width of the terminal."""
    job_id = service.start_job("true " + "x" * 200)
    line = service.at_terminal("list", "--limit", "1", columns=80).splitlines()[-1]
    assert (shown(line), line[-2:], len(line)) == ([job_id], "x…", 80)


def test_stop_and_rm_take_labels_and_states(service: Service) -> None:
    """All that fit, and no others; at a terminal a line each."""
    other = service.start_job("sleep 300")
    ids = [service.ok("start", "--label", "team=a", "sleep 300").strip() for _ in range(2)]
    seen = service.at_terminal("stop", "--label", "team=a")
    assert re.fullmatch("".join(rf"{each}: exited after \d+s, signal 15\r\n" for each in ids), seen)
    assert json.loads(service.pjw("stop", "--label", "team=a").stdout) == []
    assert service.job(other).state == pb.JOB_STATE_RUNNING
    assert service.ok("rm", "--label", "team=a", "--state", "exited").split() == ids
    assert service.ok("rm", "--label", "team=a") == ""
    assert re.fullmatch(
        rf"{other}: exited after \d+s, signal 15\r\n", service.at_terminal("stop", str(other))
    )
    for command in ("rm", "stop"):
        assert "not both" in service.refused(command, "--label", "team=a", "1")[1]
        assert "required: JOB, or --label or --state" in service.refused(command)[1]


def test_prune_forgets_what_has_ended(service: Service) -> None:
    """When somebody says yes, or with --force; what runs stays."""
    running = service.ok("start", "--label", "team=p", "sleep 300").strip()
    ended = [service.ok("start", "--label", "team=p", "true").strip() for _ in range(3)]
    service.ok("wait", *ended)
    assert "give --force" in service.refused("prune", "--label", "team=p")[1]
    assert service.ok("prune", "--label", "team=p", "--before", "1h", "--force") == ""
    prune = [str(BIN / "pjw"), "prune", "--label", "team=p"]
    for answer, code in (("n", 1), ("y", 0)):
        with Terminal(prune, service.environment()) as asked:
            asked.wait_until(lambda text: "forget 3 jobs that have ended, with the output? [y/N]" in text)
            assert service.ok("list", "--label", "team=p").split() == [running, *ended]
            asked.type(f"{answer}\n")
            assert asked.wait_for_end() == code
    assert service.ok("list", "--label", "team=p").split() == [running]
    service.ok("stop", running)


def test_the_id_of_a_run_is_told_in_a_file(service: Service, tmp_path: Path) -> None:
    """A new one; there is none when there is no job."""
    path = tmp_path / "id"
    assert service.ok("run", "--id-file", str(path), "echo here") == "here\n"
    assert service.job(int(path.read_text())).command == "echo here"
    before = service.made()
    assert "file exists" in service.refused("run", "--id-file", str(path), "true")[1]
    assert service.made() == before
    path.unlink()
    service.refused("run", "--id-file", str(path), "nosuchprogram", "x")
    assert not path.exists()


@pytest.mark.parametrize(("options", "hint"), [([], True), (["-i"], False)])
def test_what_is_piped_in_and_read_by_nobody_is_told(
    service: Service, options: list[str], hint: bool
) -> None:
    """`tar -c . | pjw run 'tar -x'`: at a terminal, and not where it is passed on."""
    ours, theirs = os.openpty()
    read_end, write_end = os.pipe()
    os.write(write_end, b"words\n")
    os.close(write_end)
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    done = subprocess.run(
        [str(BIN / "pjw"), "run", *options, "cat"],
        env=service.environment(),
        stdin=read_end,
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=CALL_SECONDS,
        check=True,
    )
    os.close(read_end)
    os.write(theirs, b".")
    said = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert done.stdout == (b"" if hint else b"words\n")
    assert ("pjw: the job did not read what is piped into pjw; -i passes it on\n" in said) is hint


@pytest.mark.parametrize("command", ["get", "list", "logs", "rm", "stats", "stop", "wait", "quota"])
def test_all_may_come_after_the_command(service: Service, command: str) -> None:
    """As before it; here for somebody without a role."""
    arguments = [] if command in ("list", "quota") else ["1"]
    before = service.refused("--all", command, *arguments)
    assert service.refused(command, *arguments, "--all") == before
    assert "alice" in before[1]
