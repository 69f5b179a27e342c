"""Completion in the shells themselves, at a terminal, with a real pjwd to ask."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import BIN, Service
from tests.support.terminal import Terminal

PROMPT = "ready> "
# how each shell is started without anybody's settings, and what makes it complete pjw
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], f"PS1='{PROMPT}'; eval \"$(pjw completion bash)\""),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"PS1='{PROMPT}'; autoload -U compinit; compinit -u; eval \"$(pjw completion zsh)\"",
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        f"function fish_prompt; echo -n '{PROMPT}'; end; pjw completion fish | source",
    ),
}


@pytest.fixture(params=SHELLS)
def name(request: pytest.FixtureRequest) -> str:
    """Each shell's name."""
    return str(request.param)


@pytest.fixture
def shell(name: str, service: Service, tmp_path: Path) -> Iterator[Terminal]:
    """Each shell, at its prompt."""
    command, setup = SHELLS[name]
    environment = service.environment() | {
        "HOME": str(tmp_path),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        # fish 4 asks the terminal for a keyboard protocol in a sequence that pyte shows as text
        "fish_features": "no-keyboard-protocols",
    }
    with Terminal(command, environment) as terminal:
        terminal.type(f"{setup}\n")
        # alone in its line: what is typed has it too
        terminal.wait_until(lambda text: text.rstrip().splitlines()[-1:] == [PROMPT.rstrip()])
        yield terminal


def line(terminal: Terminal, text: str) -> str:
    """Wait until the line at the prompt is *text*."""
    return terminal.wait_until(
        lambda screen: any(row.strip() == PROMPT + text for row in screen.splitlines())
    )


def test_commands_options_and_choices(shell: Terminal) -> None:
    """What is known without a server."""
    shell.type("pjw comp\tz\t")
    line(shell, "pjw completion zsh")


def test_an_option_with_a_value(service: Service) -> None:
    """Its name is completed, also where nobody can know the value."""
    assert completions(service, "pjw run --me") == {"--memory"}
    assert {"--cpus", "--name", "--label", "--timeout"} <= completions(service, "pjw start --")
    assert completions(service, "pjw list --limit ") == {"all"}
    assert completions(service, "pjw start --memory ") == set()
    assert {"table", "jsonl"} <= completions(service, "pjw list --format ")
    assert {"INT", "HUP"} <= completions(service, "pjw stop -s ")
    assert {"run", "context", "limits"} <= completions(service, "pjw help ")
    assert completions(service, "pjw help context a") == {"add"}


def test_a_job_is_completed(name: str, shell: Terminal, service: Service) -> None:
    """By its id, where there is only one, or shown with its command, where the shell has a place for it."""
    first, second = (service.ok("start", f"echo mark{number}; sleep 1000").strip() for number in (1, 2))
    try:
        # bash first types what all have in common
        shell.type("pjw stop \t\t" + ("\t" if name == "bash" else ""))
        seen = shell.wait_until(
            lambda text: all(
                re.search(rf"(^|\s){job_id}(\s|$)", text, re.MULTILINE) for job_id in (first, second)
            )
        )
        if name != "bash":
            shell.wait_until(lambda text: "running: echo mark1" in text and "running: echo mark2" in text)
        else:
            assert "mark" not in seen
    finally:
        for job_id in (first, second):
            service.ok("stop", job_id)


def test_only_jobs_that_a_command_is_for(service: Service) -> None:
    """`stop` completes what runs, `rm` what has ended, `logs` both; a name is completed once it has begun."""
    running = service.ok("start", "sleep 1000").strip()
    ended = service.ok("start", "true").strip()
    service.ok("logs", ended)
    try:
        assert running in completions(service, "pjw stop ")
        assert ended not in completions(service, "pjw stop ")
        assert ended in completions(service, "pjw rm ")
        assert running not in completions(service, "pjw rm ")
        assert {running, ended} <= completions(service, "pjw logs ")
    finally:
        service.ok("stop", running)


def test_a_server_that_is_not_there_is_no_completion(service: Service) -> None:
    """No words, no traceback, and no waiting."""
    assert completions(service, "pjw stop ", PJW_SERVER="127.0.0.1:1") == set()
    assert completions(service, "pjw stop ", PJW_CA_CRT="/nonexistent") == set()


def test_an_unknown_context_is_no_completion(service: Service, tmp_path: Path) -> None:
    """Nor is one of a file that cannot be read."""
    assert completions(service, "pjw --context nope stop ") == set()
    (tmp_path / "pjw").mkdir()
    (tmp_path / "pjw" / "config.toml").write_text("[contexts.prod]\n[contexts.lab]\n")
    assert completions(service, "pjw --context ", XDG_CONFIG_HOME=str(tmp_path)) == {"lab", "prod"}
    (tmp_path / "pjw" / "config.toml").write_text("x = ")
    assert completions(service, "pjw --context ", XDG_CONFIG_HOME=str(tmp_path)) == set()


def completions(service: Service, text: str, **env: str) -> set[str]:
    """What pjw answers a shell of which somebody has asked to complete *text*."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        # between a completion and its description
        "_ARGCOMPLETE_DFS": "\t",
        "_ARGCOMPLETE_SHELL": "fish",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(service.directory / "completions"),
        "COMP_LINE": text,
        "COMP_POINT": str(len(text)),
    }
    done = subprocess.run(
        [BIN / "pjw"], env=service.environment() | asked | env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("", "")
    lines = (service.directory / "completions").read_text().split("\n")
    return {line.split("\t")[0] for line in lines} - {""}
