"""`pjw run`: a job as if it ran here; and what one waits for, at a terminal and elsewhere."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, Service, wait_for
from tests.support.terminal import Terminal

# says that its trap is set, and lets SIGTERM do nothing for as long as it is told to
CTRL_C: Final = "\x03"
STUBBORN: Final = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done"


def terminal(service: Service, *arguments: str) -> Terminal:
    """A pjw at a terminal."""
    return Terminal([str(BIN / "pjw"), *arguments], service.environment())


def newest(service: Service) -> pb.Job:
    """The job that was started last."""
    with service.stub() as stub:
        return stub.List(pb.ListRequest()).jobs[-1]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["exit 0"], 0),
        (["exit 3"], 3),
        (["exit 137"], 137),
        (["false", "x"], 1),
    ],
)
def test_the_exit_code_is_the_jobs(service: Service, command: list[str], code: int) -> None:
    """And nothing is said of it."""
    done = service.pjw("run", *command)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize(("name", "code"), [("KILL", 137), ("TERM", 143)])
def test_a_signal_from_within_the_job_is_said(service: Service, name: str, code: int) -> None:
    """As a shell says "Killed": 128+n may also be a code of the command's own."""
    done = service.pjw("run", f"kill -{name} $$")
    assert (done.returncode, done.stdout) == (code, b"")
    said = f"pjw: job {newest(service).id} was ended by signal {code - 128} (SIG{name})\n"
    assert done.stderr.decode() == said


def test_the_output_is_the_jobs_to_the_byte(service: Service) -> None:
    """All of it, in order, before pjw ends."""
    done = service.pjw("run", "head -c 3000000 /dev/zero; printf '\\377end'; exit 9")
    assert (done.returncode, done.stderr) == (9, b"")
    assert done.stdout == b"\0" * 3_000_000 + b"\xffend"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nosuchprogram", "x"], 127, "cannot execute nosuchprogram"),
        (["/etc/passwd", "x"], 126, "cannot execute /etc/passwd"),
        ([""], 1, "the command is empty"),
        (["--memory", "1K", "true"], 1, "--memory must be at least 2M, or 0 for no limit"),
        (["--env", "1X=y", "true"], 1, "'1X' is no name of an environment variable"),
        (["--env-file", "/nonexistent", "true"], 125, "cannot read --env-file /nonexistent: no such file"),
        (["--env-file", "/dev/zero", "true"], 125, "cannot read --env-file /dev/zero: it is longer than"),
        (["--memory", "9999P", "true"], 1, "limit memory_max_bytes must be a whole number from 0 to 2^62"),
    ],
)
def test_what_cannot_be_started_has_its_code_and_words(
    service: Service, arguments: list[str], code: int, words: str
) -> None:
    """As of `pjw start`, and no job is left of it."""
    before = service.made()
    found, said = service.refused("run", *arguments)
    assert (found, words in said) == (code, True), said
    assert service.made() == before


def test_a_limit_of_time_may_be_longer_than_anybody_waits(service: Service) -> None:
    """It is kept as it was asked for."""
    job_id = service.ok("start", "--timeout", "99999999d", "true").strip()
    assert json.loads(service.ok("get", job_id))["limits"]["timeMaxSeconds"] == 99_999_999 * 86_400
    assert service.ok("wait", job_id) == "0\n"
    code, words = service.refused("logs", "--offset", "9999P", job_id)
    assert (code, "cannot read output from byte" in words) == (1, True)


def test_detached_it_prints_the_id_alone(service: Service) -> None:
    """As `pjw start` does."""
    job_id = int(service.ok("run", "--detach", "sleep 300"))
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    service.ok("stop", str(job_id))


def test_limits_are_what_was_typed(make_service: Callable[..., Service]) -> None:
    """Each option sets its limits, in the units of the API, where the operator lets clients limit reads."""
    service = make_service(config="[floors]\nio_rbps_max = 1048576\nio_riops_max = 100\n").start()
    options = (
        "--cpus 0.5 --memory 64M --pids 50 --io-read 10M --io-write 20M --iops 300 --output 1G --timeout 1h"
    )
    job_id = service.ok("start", *options.split(), "true").strip()
    assert json.loads(service.ok("get", job_id))["limits"] == {
        "cpuMaxMillicores": 500,
        "memoryMaxBytes": 64 * 1024**2,
        "pidsMax": 50,
        "ioRbpsMax": 10 * 1024**2,
        "ioWbpsMax": 20 * 1024**2,
        "ioRiopsMax": 300,
        "ioWiopsMax": 300,
        "outputMaxBytes": 1024**3,
        "timeMaxSeconds": 3600,
    }


@pytest.mark.parametrize(("option", "limit"), [("--io-read", "io_rbps_max"), ("--iops", "io_riops_max")])
def test_reads_are_not_limited_by_clients(service: Service, option: str, limit: str) -> None:
    """It would hold up whoever reads the same files."""
    done = service.pjw("start", option, "1000000", "true")
    assert (done.returncode, done.stderr) == (
        1,
        b"pjw: error: cannot start the job: this server lets no client limit reads from disk (%s)\n"
        b"hint: leave it out, and limit writes with --io-write; the operator allows it by floors.%s\n"
        % (option.encode(), limit.encode()),
    )


@pytest.mark.parametrize(
    ("option", "typed", "said"),
    [("--memory", "3G", "2G"), ("--cpus", "2.5", "1.5"), ("--timeout", "0", "1h00m")],
)
def test_a_ceiling_is_named_in_what_was_typed(
    make_service: Callable[..., Service], option: str, typed: str, said: str
) -> None:
    """The option, the most that it may be, and whose word that is."""
    service = make_service(
        config="[limits]\ntime_max_seconds = 60\n[ceilings]\nmemory_max_bytes = 2147483648\n"
        "cpu_max_millicores = 1500\ntime_max_seconds = 3600\n"
    ).start()
    code, words = service.refused("start", option, typed, "true")
    assert code == 1
    assert words.startswith(
        f"pjw: error: cannot start the job: {option} may be at most {said} on this server\n"
        f"hint: give {option} {said} or less; the operator's ceiling for "
    )


def test_why_it_was_killed_is_said(service: Service) -> None:
    """137 alone does not tell a limit from anything else."""
    done = service.pjw("run", "--timeout", "1", "sleep 300")
    assert done.returncode == 137
    assert done.stderr.decode() == f"pjw: job {newest(service).id} was killed: it reached its limit of time\n"


def test_ctrl_c_stops_the_job_and_says_so(service: Service) -> None:
    """The job gets SIGTERM, what it still writes is seen, and the exit code is its own."""
    with terminal(service, "run", "trap 'echo cleaned up; exit 5' TERM; echo ready; sleep 300 & wait") as run:
        run.wait_for("ready")
        run.type(CTRL_C)
        assert run.wait_for_end() == 5
        job_id = newest(service).id
        assert (
            f"pjw: stopping job {job_id}: SIGKILL after its grace period, or with another Ctrl-C" in run.text
        )
        assert run.text.rstrip().endswith("cleaned up")
    assert service.job(job_id).reason == pb.END_REASON_STOPPED


def test_a_second_ctrl_c_kills_it(service: Service) -> None:
    """Whatever the grace period that is left."""
    with terminal(service, "run", "--grace", "1h", STUBBORN) as run:
        run.wait_for("ready")
        run.type(CTRL_C)
        run.wait_for("asked")
        assert "SIGKILL after 3600 s" in run.text
        run.type(CTRL_C)
        assert run.wait_for_end() == 137
        assert f"pjw: killing job {newest(service).id}: another Ctrl-C leaves it to itself" in run.text


def test_the_grace_period_is_the_one_that_was_asked_for(service: Service) -> None:
    """After it the job is killed without another key."""
    with terminal(service, "run", "--grace", "1", STUBBORN) as run:
        run.wait_for("ready")
        run.type(CTRL_C)
        assert run.wait_for_end() == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_ctrl_c_without_words(service: Service, number: signal.Signals) -> None:
    """Where nobody looks at a terminal nothing is said, and the job is stopped all the same."""
    with service.popen("run", "trap 'exit 6' TERM; echo ready; sleep 300 & wait") as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"ready\n"
        run.send_signal(number)
        assert (run.wait(30), run.stderr.read()) == (6, b"")


def test_who_reads_no_more_ends_the_job(service: Service) -> None:
    """`pjw run yes | head -1`: the pipe's end is the job's, as it would be of a program that runs here."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {BIN}/pjw run yes x | head -1"],
        env=service.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"x\n", b"", 141)
    assert newest(service).state == pb.JOB_STATE_EXITED


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("run 'echo x; sleep 300' >/dev/full", "cannot write to stdout: no space left on device"),
        ("run --stdin /proc/self/mem 'cat; sleep 300'", "cannot read --stdin: input/output error"),
    ],
)
def test_what_cannot_be_written_or_read_here_ends_the_job(service: Service, typed: str, words: str) -> None:
    """Nobody was told its id, and it would wait for what does not come."""
    before = service.ok("list").split()
    done = subprocess.run(
        ["bash", "-c", f"{BIN}/pjw {typed}"],
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, words in done.stderr) == (125, True), done
    [job_id] = set(service.ok("list").split()) - set(before)
    assert json.loads(service.ok("get", job_id))["reason"] == "stopped"


@pytest.mark.parametrize(
    ("typed", "code"),
    [("logs nothing", 1), ("run --split-stderr 'echo x >&2; exit 3'", 3), ("list --nonsense", 2)],
)
def test_a_closed_stderr_is_no_stderr(service: Service, typed: str, code: int) -> None:
    """What goes there goes nowhere, and least of all to stdout."""
    done = subprocess.run(
        ["bash", "-c", f"{BIN}/pjw {typed} 2>&-"],
        env=service.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_run_goes_on_through_a_restart(make_service: Callable[..., Service]) -> None:
    """Not a byte is lost or doubled when pjwd is killed, and the exit code is the job's."""
    service = make_service().start()
    command = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 4"
    with service.popen("run", command) as run:
        assert run.stdout is not None and run.stderr is not None
        first = run.stdout.readline()
        service.stop(signal.SIGKILL)
        service.start()
        rest = run.stdout.read()
        assert (run.wait(60), run.stderr.read()) == (4, b"")
    assert first + rest == b"".join(b"line %d\n" % number for number in range(300))


def test_wait_prints_the_code_of_each_in_the_order_asked_for(service: Service) -> None:
    """A line each, 128+n for a signal; one that is not there is told, and the others are waited for."""
    slow, killed = service.start_job("sleep 0.3; exit 3"), service.start_job("kill -KILL $$")
    done = service.pjw("wait", str(slow), "999999", str(killed))
    assert done.stdout == b"3\n137\n"
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        "pjw: error: no job 999999",
        f"pjw: job {killed} was ended by signal 9 (SIGKILL)",
    ]
    # of one job it is pjw's own as well: `pjw wait A && ...` goes on when A did
    done = service.pjw("wait", str(slow))
    assert (done.stdout, done.returncode, done.stderr) == (b"3\n", 3, b"")


def test_a_script_tells_one_137_from_another(service: Service) -> None:
    """A limit, a stop and a signal from within have one exit code; words and `reason` tell them apart."""
    with service.stub() as stub:
        asked = pb.StartRequest(command="sleep 300", limits=pb.Limits(time_max_seconds=1))
        timed_out = stub.Start(asked).job.id
    stopped, own = service.start_job("sleep 300"), service.start_job("kill -KILL $$")
    service.ok("stop", "--signal", "KILL", str(stopped))
    form = "template:{exitCode} {reason} {signal}"
    for job, line, words in (
        (timed_out, "137 timed_out 9", "was killed: it reached its limit of time"),
        (stopped, "137 stopped 9", "was stopped"),
        (own, "137 completed 9", "was ended by signal 9 (SIGKILL)"),
    ):
        done = service.pjw("wait", "--format", form, str(job))
        assert (done.returncode, done.stdout.decode()) == (137, f"{line}\n")
        assert done.stderr.decode() == f"pjw: job {job} {words}\n"
    lines = service.pjw("wait", "--format", "jsonl", str(stopped), str(own)).stdout.decode().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["stopped", "completed"]
    code, words = service.refused("wait", "--format", "table", str(own))
    assert (code, "neither jsonl nor template" in words) == (2, True)


def test_run_says_that_another_stopped_its_job(service: Service) -> None:
    """The code is the job's own, and may be any."""
    with service.popen("run", "trap 'exit 0' TERM; echo up; sleep 300 & wait") as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"up\n"
        job_id = newest(service).id
        service.ok("stop", str(job_id))
        assert (run.wait(60), run.stderr.read()) == (0, f"pjw: job {job_id} was stopped\n".encode())


def test_waiting_is_seen_at_a_terminal_and_leaves_nothing_there(service: Service) -> None:
    """A line that counts, and is gone when there is an answer."""
    job_id = service.start_job("while ! [ -e done ]; do sleep 0.05; done; exit 7")
    with terminal(service, "wait", str(job_id)) as wait:
        # on a slow machine a second may not be seen
        wait.wait_until(lambda text: re.search(rf"waiting for job {job_id} to end: [1-9]\d* s", text))
        (service.state / "scratch" / str(job_id) / "done").touch()
        assert wait.wait_for_end() == 7
        assert wait.text.strip() == "7"


def test_a_stop_counts_its_grace_period_down(service: Service) -> None:
    """At a terminal; what is left when the job has ended is how."""
    job_id = service.start_job(STUBBORN)
    wait_for(lambda: service.open_outputs(job_id) == 0 and service.job(job_id).state == pb.JOB_STATE_RUNNING)
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        with terminal(service, "stop", "--grace", "3s", str(job_id)) as stop:
            words = rf"waiting for job {job_id} to end: SIGKILL in [12] s"
            stop.wait_until(lambda text: re.search(words, text))
            assert stop.wait_for_end() == 0
            assert "waiting" not in stop.text
            assert re.search(rf"^{job_id}: exited after \d+s, signal 9$", stop.text, re.MULTILINE)


def test_several_jobs_are_stopped_beside_each_other(service: Service) -> None:
    """In one grace period for all; an array in the order asked for, without what is not there."""
    jobs = [service.start_job(STUBBORN) for _ in range(3)]
    done = service.pjw("stop", "--grace", "0", *map(str, jobs), "999999")
    assert [int(job["id"]) for job in json.loads(done.stdout)] == jobs
    assert (done.returncode, done.stderr) == (1, b"pjw: error: no job 999999\n")


def test_get_of_several_is_an_array(service: Service) -> None:
    """Of those that are there; of one it stays the seed's object."""
    jobs = [service.start_job("true") for _ in range(2)]
    shown = json.loads(service.ok("get", *map(str, jobs)))
    assert [int(job["id"]) for job in shown] == jobs
    done = service.pjw("get", str(jobs[0]), "999999")
    assert [int(job["id"]) for job in json.loads(done.stdout)] == jobs[:1]
    assert (done.returncode, done.stderr) == (1, b"pjw: error: no job 999999\n")


def test_a_list_at_a_terminal_has_colours_for_who_wants_them(make_service: Callable[..., Service]) -> None:
    """Green runs, red has failed; with NO_COLOR nothing but text is sent, and the columns are the same."""
    service = make_service().start()
    service.ok("start", "--name", "runs", "sleep 300")
    service.ok("start", "--name", "failed", "exit 3")
    service.pjw("wait", "failed")
    with terminal(service, "list") as painted:
        assert painted.wait_for_end() == 0
        rows = [line for line in painted.text.splitlines() if line.strip()]
        assert [row.split()[:3] for row in rows] == [
            ["ID", "NAME", "STATE"],
            ["1", "runs", "running"],
            ["2", "failed", "exited"],
        ]
        column = rows[0].index("STATE")
        assert [painted.screen.buffer[line][column].fg for line in (1, 2)] == ["green", "red"]
    command = [str(BIN / "pjw"), "list"]
    with Terminal(command, {**service.environment(), "NO_COLOR": "1"}) as plain:
        assert plain.wait_for_end() == 0
        same = [line for line in plain.text.splitlines() if line.strip()]
        assert [
            line.index(word) for line, word in zip(same, ("STATE", "running", "exited"), strict=True)
        ] == [column] * 3
        assert {plain.screen.buffer[line][column].fg for line in (1, 2)} == {"default"}


def test_a_name_is_as_good_as_an_id(service: Service) -> None:
    """For every command, and for one job that has not ended at a time."""
    assert service.ok("start", "--name", "twin", "--label", "a=b", "sleep 300")
    job_id = newest(service).id
    code, words = service.refused("start", "--name", "twin", "true")
    assert code == 1
    assert str(job_id) in words
    assert json.loads(service.ok("get", "twin"))["labels"] == {"a": "b"}
    assert json.loads(service.ok("stop", "--signal", "USR1", "twin"))["signal"] == signal.SIGUSR1
    assert service.pjw("wait", "twin").stdout.decode() == f"{128 + signal.SIGUSR1}\n"
    assert service.ok("logs", "twin") == ""
    assert service.ok("list", "--name", "twin") == f"{job_id}\n"
    assert service.ok("rm", "twin") == "twin\n"
    assert service.refused("get", "twin") == (1, "pjw: error: no job twin\n")


def test_what_surrounds_a_job_is_what_was_asked_for(service: Service, tmp_path: Path) -> None:
    """Variables given, passed on, from a file; a directory; stderr kept apart."""
    (tmp_path / "env").write_text("# a comment\n\nFILE=from a file\nGIVEN=less\nHOME\n")
    options = ["--env-file", str(tmp_path / "env"), "-e", "GIVEN=x=y", "-e", "HOME", "-e", "UNSET_HERE"]
    command = 'echo "$FILE|$GIVEN|$HOME|${UNSET_HERE-unset}"; pwd; echo apart >&2'
    done = service.pjw("run", *options, "--workdir", "/usr", "--split-stderr", command)
    home = service.environment()["HOME"]
    assert done.stdout.decode() == f"from a file|x=y|{home}|unset\n/usr\n"
    assert (done.stderr, done.returncode) == (b"apart\n", 0)
    job_id = str(newest(service).id)
    assert service.ok("logs", job_id, "--stderr") == "apart\n"
    assert "apart" not in service.ok("logs", job_id)


def test_what_pjw_says_at_a_terminal_begins_a_line(service: Service) -> None:
    """Also behind output whose last line was not ended (U14)."""
    seen = service.at_terminal("run", "--timeout", "1s", "printf partial; sleep 60")
    assert re.fullmatch(r"partial\r\npjw: job \d+ was killed: it reached its limit of time\r\n", seen)
    seen = service.at_terminal("run", "--timeout", "1s", "echo whole; sleep 60")
    assert re.fullmatch(r"whole\r\npjw: job \d+ was killed: it reached its limit of time\r\n", seen)


def test_a_wrong_line_of_an_env_file_is_named(service: Service, tmp_path: Path) -> None:
    """With its file and its number (U15)."""
    (tmp_path / "env").write_text("# ours\nA=1\n\nexport B=2\n")
    code, words = service.refused("start", "--env-file", f"{tmp_path}/env", "true")
    assert (code, f"{tmp_path}/env, line 4: 'export B' is no name of an environment var" in words) == (
        1,
        True,
    )
