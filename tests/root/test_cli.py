"""pjw as a program: help, exit codes, settings, terminals, pipes and signals.

Whatever it is given, it shows no traceback: `Service.pjw` sees to that.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import ASK

COMMANDS: Final = ("run", "start", "list", "get", "logs", "wait", "stop", "rm")


def test_help_names_every_command_option_and_exit_code(service: Service) -> None:
    """`pjw --help` is enough to begin with, and says what each exit code means."""
    text = service.ok("--help")
    for word in (*COMMANDS, "--all", "--server", "--ca-crt", "--client-crt", "--client-key", "PJW_SERVER"):
        assert word in text
    for code in (
        "0 done",
        "1 refused",
        "2 wrong usage",
        "125 pjw failed",
        "126 not",
        "127 no such",
        "130 inter",
    ):
        assert code in text
    for command in COMMANDS:
        assert f"usage: pjw {command}" in service.ok(command, "--help")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["get"],
        ["get", "1__0"],
        ["list", "x"],
        ["rm"],
        ["--frob", "list"],
        ["logs", "-f"],
        ["logs", "1", "2"],
        ["list", "--state", "dead"],
        ["list", "--format", "yaml"],
        ["list", "--format", "template:{nothing}"],
        ["stop", "--signal", "64", "1"],
        ["--all", "run", "true"],
        ["--all", "start", "true"],
    ],
)
def test_wrong_usage_is_2_and_shows_the_right_one(service: Service, arguments: list[str]) -> None:
    """What pjw cannot parse is answered with its usage, before any connection."""
    code, words = service.refused(*arguments, PJW_SERVER="127.0.0.1:1")
    assert code == 2
    assert words.startswith("usage: pjw ")
    assert "error: " in words


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["get", "999999"], 1, "no job 999999"),
        (
            ["start", "nosuchprogram", "x"],
            127,
            "cannot execute nosuchprogram: no such file or directory (ENOENT)",
        ),
        (
            ["start", "/nonexistent/x", "x"],
            127,
            "cannot execute /nonexistent/x: no such file or directory (ENOENT)",
        ),
        (["start", "/etc/passwd", "x"], 126, "cannot execute /etc/passwd: permission denied (EACCES)"),
        (["start", "/etc", "x"], 126, "cannot execute /etc: permission denied (EACCES)"),
    ],
)
def test_refusals_have_exit_codes_and_words(
    service: Service, arguments: list[str], code: int, words: str
) -> None:
    """Each documented exit code comes with one line that says what was refused and why."""
    before = service.made()
    assert service.refused(*arguments) == (code, f"pjw: error: {words}\n")
    assert service.made() == before


def test_no_such_program_in_a_shell_command_is_the_shells_answer(service: Service) -> None:
    """A command string is the shell's to run, so its 127 is an exit code of the job, not of pjw."""
    job_id = service.ok("start", "nosuchprogram x").strip()
    assert "nosuchprogram: not found" in service.ok("logs", job_id)
    assert json.loads(service.ok("get", job_id))["exitCode"] == 127


def test_one_argument_is_a_shell_command_several_are_an_argv(service: Service) -> None:
    """`$HOME`, quotes and options are the shell's in one case and plain bytes in the other."""
    shell = service.ok("start", "printf '<%s>' \"$HOME\" -n").strip()
    assert service.ok("logs", shell) == "</run/job><-n>"
    argv = service.ok("start", "printf", "<%s>", "$HOME", "-n", "--", "a b").strip()
    assert service.ok("logs", argv) == "<$HOME><-n><--><a b>"
    assert json.loads(service.ok("get", argv))["command"] == "printf '<%s>' '$HOME' -n -- 'a b'"
    dashes = service.ok("start", "--", "printf", "%s", "--help").strip()
    assert service.ok("logs", dashes) == "--help"


def test_text_is_utf_8_whatever_the_locale(service: Service) -> None:
    """A command in any script is shown as it was given, even to a program in the C locale."""
    command = "echo 'grüße ☃ \N{GRINNING FACE}'"
    job_id = service.ok("start", command).strip()
    for env in (
        {},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ):
        done = service.pjw("get", job_id, **env)
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout)["command"] == command


def test_options_win_over_environment_and_that_over_the_file(service: Service, tmp_path: Path) -> None:
    """Where a setting is given twice, the nearer one counts; a file alone is enough."""
    environment = service.environment()
    lines = [
        f'{name[4:].lower()} = "{value}"\n' for name, value in environment.items() if name.startswith("PJW_")
    ]
    config = tmp_path / "pjw" / "config.toml"
    config.parent.mkdir()
    config.write_text("".join(lines))
    file = {"XDG_CONFIG_HOME": str(tmp_path)}

    def pjw(*arguments: str, **env: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run([str(BIN / "pjw"), *arguments], env=env, capture_output=True, check=False)

    assert pjw("list", **file).returncode == 0
    assert b"127.0.0.1:1: connection refused" in pjw("list", **file, PJW_SERVER="127.0.0.1:1").stderr
    assert pjw("--server", service.address, "list", **file, PJW_SERVER="127.0.0.1:1").returncode == 0
    config.write_text("color = 'red'\n")
    broken = pjw("list", **file)
    assert broken.returncode == 125
    assert f"pjw: error: {config}: color is not a setting".encode() in broken.stderr


@pytest.mark.parametrize("name", ["PJW_CA_CRT", "PJW_CLIENT_CRT", "PJW_CLIENT_KEY"])
def test_a_missing_or_broken_file_is_named(service: Service, name: str, tmp_path: Path) -> None:
    """Each file that pjw needs: not given, not there, a directory, not PEM: always named."""
    option = "--" + name[4:].lower().replace("_", "-")
    environment = {key: value for key, value in service.environment().items() if key != name}
    done = subprocess.run(
        [str(BIN / "pjw"), "list"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (125, f"pjw: error: no {option} is given")
    assert done.stderr.splitlines()[1].startswith(f"hint: give {option} FILE, set {name}")
    assert service.refused("list", **{name: ""}) == (
        125, f"pjw: error: the variable {name} is empty\nhint: leave it out, or give it a value\n"
    )  # fmt: skip
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\xff\x00 no PEM")
    garbage.chmod(0o600)
    for path in ("/nonexistent/file", str(tmp_path), str(garbage), "/dev/null"):
        code, words = service.refused("list", **{name: path})
        assert code == 125
        assert words.startswith("pjw: error: cannot ")
        assert path in words


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "cannot connect to 127.0.0.1:1: connection refused\nhint: is pjwd running there?"),
        ("nosuchhost.invalid:50051", "cannot connect to nosuchhost.invalid:50051: no such host\nhint: "),
    ],
)
def test_no_server_is_125_and_says_what_to_look_at(service: Service, address: str, words: str) -> None:
    """No connection, no such host: told apart, with a next step."""
    for command in (["list"], ["logs", "1"], ["start", "true"]):
        code, said = service.refused(*command, PJW_SERVER=address)
        assert code == 125
        assert said.startswith(f"pjw: error: {words}")


def test_what_is_not_pjwd_is_125_without_a_traceback(service: Service) -> None:
    """Something that listens and hangs up is told apart from a server that refuses."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        pjw = service.popen("--server", f"127.0.0.1:{other.getsockname()[1]}", "list")
        other.settimeout(60)
        connection, _ = other.accept()
        connection.recv(1)
        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        connection.close()
        other.close()
        out, err = pjw.communicate(timeout=60)
    assert (pjw.returncode, out) == (125, b"")
    assert err.startswith(b"pjw: error: ")
    assert b"Traceback" not in err


@pytest.mark.parametrize("server", ["localhost", "localhost:", ":50051", "localhost:99999", "a b:1", ""])
def test_an_odd_server_address_is_no_crash(service: Service, server: str) -> None:
    """An address that is none ends in an error of one line or two, not in silence or a traceback."""
    done = subprocess.run(
        [str(BIN / "pjw"), "list"],
        env=service.environment() | {"PJW_SERVER": server or "::::"},
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stdout) == (125, b"")
    assert re.match(rb"pjw: error: [^\n]+\n(hint: [^\n]+\n)?\Z", done.stderr), done.stderr


def test_a_closed_pipe_ends_logs_like_sigpipe(service: Service) -> None:
    """`pjw logs | head -1` with pipefail: the line, 141 for the pipe, and nothing on stderr."""
    job_id = service.start_job(
        "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; sleep 0.2; echo more"
    )
    for command in ("logs", "list"):
        many = f"{BIN}/pjw {command} {job_id if command == 'logs' else ''}"
        reader = "head -1" if command == "logs" else "true"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {many} | {reader}"],
            env=service.environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == b""
        if command == "logs":
            assert (done.stdout, done.returncode) == (b"line 0\n", 141)
        else:
            assert done.returncode in (0, 141)


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["logs", "JOB"], ["get", "JOB"], ["start", "true"], ["--help"], ["--version"]],
)
def test_a_full_or_closed_stdout_is_an_error_in_words(service: Service, arguments: list[str]) -> None:
    """Where nothing can be written, pjw says so and does not claim success."""
    job_id = str(service.start_job("echo hello"))
    words = " ".join(f"'{job_id if word == 'JOB' else word}'" for word in arguments)
    for redirection in (">/dev/full", ">&-"):
        done = subprocess.run(
            ["bash", "-c", f"{BIN}/pjw {words} {redirection}"],
            env=service.environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 125, (redirection, done)
        assert re.fullmatch(rb"pjw: error: cannot write to stdout: [^\n]+\n", done.stderr), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_logs_leaves_quietly(service: Service, number: signal.Signals) -> None:
    """SIGINT is 130 with nothing on stderr; the job is not touched."""
    job_id = service.start_job("echo ready; sleep 300")
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None and logs.stderr is not None
        assert logs.stdout.readline() == b"ready\n"
        logs.send_signal(number)
        assert logs.wait(60) == (130 if number is signal.SIGINT else -number)
        assert (logs.stdout.read(), logs.stderr.read()) == (b"", b"")
    assert '"state": "running"' in service.ok("get", str(job_id))
    service.ok("stop", str(job_id))


def test_ctrl_c_during_stop_leaves_quietly_and_the_stop_goes_on(service: Service) -> None:
    """Who no longer wants to wait for a stop has asked for it all the same."""
    job_id = service.start_job(ASK + "trap 'read x <&3; exit 4' TERM; echo ready; sleep 300 & wait")
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None
        logs.stdout.readline()
        with service.popen("stop", "--grace", "60", str(job_id)) as stop:
            assert stop.stderr is not None
            wait_for(lambda: service.job(job_id).state == pb.JOB_STATE_STOPPING)
            stop.send_signal(signal.SIGINT)
            assert (stop.wait(60), stop.stderr.read()) == (130, b"")
        service.tell(job_id)
        assert logs.wait(60) == 0
    assert json.loads(service.ok("get", str(job_id)))["exitCode"] == 4


def test_a_server_that_does_not_come_back_ends_logs_with_a_hint(service: Service, tmp_path: Path) -> None:
    """`pjw logs` gives up on a lost server in time, and says how much it has seen."""
    own = Service(tmp_path, clients=["alice"]).start()
    job_id = own.start_job("echo hello; sleep 300")
    program = (
        "import functools, sys, pjw.client.sync as sync\nfrom pjw.cli.main import main\n"
        "sync.Client = functools.partial(sync.Client, reconnect_seconds=1)\nsys.exit(main())"
    )
    logs = subprocess.Popen(
        [sys.executable, "-c", program, "logs", str(job_id)],
        env=own.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with logs:
        assert logs.stdout is not None and logs.stderr is not None
        assert logs.stdout.readline() == b"hello\n"
        assert own.stop() == 0
        assert logs.wait(30) == 125
        words = logs.stderr.read().decode()
    assert re.match(r"pjw: error: the connection to \S+ was lost after 6 bytes of output, and did not", words)
    assert f"\nhint: job {job_id} goes on without it: pjw logs {job_id}\n" in words
    own.start()
    own.ok("stop", str(job_id))
    assert own.stop() == 0


def test_rm_prints_what_it_removed_and_goes_on_after_a_refusal(service: Service) -> None:
    """Each id on a line when it is gone; what cannot be removed is said, and the exit code tells."""
    running = service.start_job("sleep 300")
    ended = [service.start_job(f"echo {number}") for number in range(2)]
    for job_id in ended:
        service.ok("logs", str(job_id))
        wait_for(lambda: service.job(job_id).HasField("end"))  # noqa: B023
    done = service.pjw("rm", str(ended[0]), str(running), "999999", str(ended[1]))
    assert done.stdout.decode() == f"{ended[0]}\n{ended[1]}\n"
    assert done.stderr.decode() == (
        f"pjw: error: cannot remove job {running}: it has not ended\nhint: pjw stop {running}\n"
        "pjw: error: no job 999999\n"
    )
    assert done.returncode == 1
    assert service.refused("get", str(ended[0])) == (1, f"pjw: error: no job {ended[0]}\n")
    service.ok("stop", str(running))
    assert service.ok("rm", str(running)) == f"{running}\n"


def test_a_table_reaches_a_narrow_terminal(service: Service) -> None:
    """A terminal of few columns still shows some of each command, on one line each."""
    service.start_job("echo \t 'tab and\nnewline' " + "x" * 200)
    lines = service.at_terminal("list", columns=20).replace("\r", "").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any("\\t 'tab and\\n" in line for line in lines)


def test_nothing_but_the_bytes_goes_to_a_terminal(service: Service) -> None:
    """Logs at a terminal are the job's bytes: no colour, no prefix, no newline of ours."""
    job_id = service.ok("start", "printf hello").strip()
    assert service.at_terminal("logs", job_id) == "hello"
    assert os.linesep not in service.at_terminal("logs", job_id)
