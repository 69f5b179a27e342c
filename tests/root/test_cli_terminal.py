"""`pjw run -it`, `pjw exec -it` and `pjw attach` at a terminal, as a person sees them."""

import hashlib
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.root.test_cli_exec import kill_server_and_launcher
from tests.support.service import BIN, Service, wait_for
from tests.support.terminal import Terminal

SHELL = ("-e", "PS1=ready> ", "bash", "--norc", "--noprofile", "-i")


@contextmanager
def at(service: Service, *arguments: str, columns: int = 100, lines: int = 30) -> Iterator[Terminal]:
    """A pjw at a terminal of its own, under a shell that tells its exit code."""
    with Terminal(
        [str(BIN / "pjw"), *arguments], service.environment(), columns=columns, lines=lines
    ) as made:
        yield made


def newest(service: Service) -> str:
    """The id of the job that was started last."""
    return service.ok("list", "-n", "1").strip()


def await_prompt(terminal: Terminal, before: int) -> None:
    """Wait for one more prompt than there were."""
    terminal.wait_until(lambda text: text.count("ready>") > before, "another prompt")


@pytest.mark.parametrize("command", ["run", "exec"])
def test_a_job_with_a_terminal(service: Service, command: str) -> None:
    """Its size at the first prompt, a redraw after a resize, Ctrl-C, Ctrl-Z and fg, Ctrl-P, its exit code."""
    job = (service.ok("start", "sleep", "600").strip(),) if command == "exec" else ()
    with at(service, command, "-it", *SHELL[:2], *job, *SHELL[2:]) as terminal:
        terminal.wait_for("ready>")
        terminal.type("stty size; echo $TERM\r")
        terminal.wait_for("30 100", "xterm-256color")
        terminal.resize(120, 40)
        # the resize is a call of its own
        terminal.type("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; echo re''sized\r")
        terminal.wait_for("resized")
        terminal.type("sh -c 'echo go''ing; exec sleep 600'\r")
        prompts = terminal.wait_for("going").count("ready>")
        terminal.type("\x03")
        # not for ^C, which the kernel need not show (test_terminals.py)
        await_prompt(terminal, prompts)
        terminal.type("echo code $?\r")
        terminal.wait_for("code 130")
        terminal.type("sh -c 'echo st''arted; exec cat'\r")
        terminal.wait_for("started")
        terminal.type("\x1a")
        terminal.wait_for("Stopped")
        # Ctrl-P is the line before
        terminal.type("echo once-$((6*7))\r")
        terminal.wait_for("once-42")
        terminal.type("clear\r")
        terminal.wait_until(lambda text: "once-42" not in text)
        terminal.type("\x10\x10\r")
        terminal.wait_for("once-42")
        terminal.type("fg\r")
        terminal.wait_until(lambda text: re.search(r"^sh -c", text, re.MULTILINE))
        terminal.type("words\r")
        terminal.wait_until(lambda text: len(re.findall(r"^words$", text, re.MULTILINE)) == 2)
        prompts = terminal.text.count("ready>")
        terminal.type("\x03")
        await_prompt(terminal, prompts)
        terminal.type("exit 7\r")
        assert terminal.wait_for_end() == 7


def test_it_is_left_and_come_back_to(service: Service) -> None:
    """By ~. at the beginning of a line and nowhere else; ~? helps; attach shows where it stands."""
    with at(service, "run", "-it", *SHELL) as terminal:
        terminal.wait_for("ready>")
        terminal.type("echo a~.b\r")
        terminal.wait_for("a~.b\n")
        terminal.type("~~x\x15")
        terminal.type("x=kept\r")
        # what is not sent yet is lost with whoever leaves
        terminal.wait_for("x=kept\n")
        terminal.type("~?")
        terminal.wait_for("~.  leave")
        terminal.type("\r~.")
        assert terminal.wait_for_end() == 0
        job = newest(service)
        assert f"left job {job}, which goes on: pjw attach {job} comes back" in terminal.text
    with at(service, "attach", job, columns=77) as terminal:
        terminal.wait_for("ready>")
        terminal.type("echo $x; stty size\r")
        terminal.wait_for("kept", "30 77")
        with at(service, "attach", job) as other:
            other.wait_for("ready>")
            other.type("echo from ''another\r")
            other.wait_for("from another")
            terminal.type("z")
            terminal.wait_for("took over; nothing reads")
            other.type("exit 5\r")
            assert other.wait_for_end() == 5
        assert terminal.wait_for_end() == 5


def test_a_session_with_a_terminal(service: Service) -> None:
    """A shell in a job that hangs; left and come back to as well."""
    job = service.ok("start", "sleep", "600").strip()
    with at(service, "exec", "-it", "-e", "PS1=ready> ", job, "bash", "--norc", "-i") as terminal:
        terminal.wait_for("ready>")
        terminal.type("stty size; tr '\\0' ' ' </proc/2/cmdline\r")
        terminal.wait_for("30 100", "sleep 600")
        terminal.type("\r~.")
        assert terminal.wait_for_end() == 0
        assert f"pjw attach {job}/1 comes back" in terminal.text
    with at(service, "attach", f"{job}/1") as terminal:
        terminal.wait_for("ready>")
        terminal.type("exit 9\r")
        assert terminal.wait_for_end() == 9


def test_without_input_it_only_shows(service: Service) -> None:
    """-t alone: a program sees a terminal, and Ctrl-C stops the job as ever."""
    with at(service, "run", "-t", "test -t 1 && stty size && exit 3") as terminal:
        assert terminal.wait_for_end() == 3
        assert "30 100" in terminal.text
    with at(
        service, "exec", "-t", service.ok("start", "sleep", "600").strip(), "test -t 2 && exit 4"
    ) as terminal:
        assert terminal.wait_for_end() == 4


@pytest.mark.parametrize("command", ["run", "exec"])
@pytest.mark.parametrize(
    ("program", "code"),
    [
        (["exit 0"], 0),
        (["exit 3"], 3),
        (["--", "/etc/passwd"], 126),
        (["no-such-program", "x"], 127),
        (["kill -9 $$"], 137),
    ],
)
def test_exit_codes_are_exact(service: Service, command: str, program: list[str], code: int) -> None:
    """At a terminal, too."""
    job = [service.ok("start", "sleep", "600").strip()] if command == "exec" else []
    with at(service, command, "-it", *job, *program) as terminal:
        assert terminal.wait_for_end() == code


def test_our_own_terminal_is_put_right(service: Service) -> None:
    """At the end, when it is left, and when pjw is killed."""
    # what a program that draws the whole screen has turned on
    drawing = r"printf '\033[?1049h\033[?25l\033[?2004h'; echo drawn; exec sleep 600"
    for command in (SHELL, [drawing]):
        with at(service, "run", "-it", *command) as terminal:
            before = terminal.settings
            terminal.wait_for("ready>" if command is SHELL else "drawn")
            assert terminal.settings != before
            terminal.process.send_signal(signal.SIGKILL)
            wait_for(lambda: terminal.settings == before)  # noqa: B023  called at once
            # the main screen, the cursor, and pasting as ever; and the keys are echoed again
            terminal.wait_until(lambda _: terminal.bytes.endswith(b"\x1b[?2004l\x1b[0m"))
            assert b"\x1b[?1049l\x1b[?25h" in terminal.bytes
            service.ok("stop", "--grace", "0", newest(service))
    with at(service, "run", "-it", *SHELL) as terminal:
        terminal.wait_for("ready>")
        terminal.type("\r~.")
        assert terminal.wait_for_end() == 0
    with at(service, "attach", newest(service)) as terminal:
        before = terminal.settings
        terminal.wait_for("ready>")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait_for_end() == 0
    with at(service, "attach", newest(service)) as terminal:
        before = terminal.settings
        terminal.wait_for("ready>")
        terminal.type("exit\r")
        assert terminal.wait_for_end() == 0


def test_what_cannot_be(service: Service) -> None:
    """No terminal here, none there, an ended job, no such session."""
    code, words = service.refused("run", "-it", "true")
    assert code == 125
    refusal = "pjw: error: cannot use this terminal: stdin or stdout is no terminal\nhint: "
    assert words.startswith(f"{refusal}without -t")
    assert service.refused("attach", "1") == (125, f"{refusal}pjw logs shows the output of a job\n")
    ended = service.ok("start", "true").strip()
    service.ok("wait", ended)
    for job, words in ((ended, f"job {ended} has ended"), (f"{ended}/1", f"no session 1 of job {ended}")):
        with at(service, "attach", job) as terminal:
            assert terminal.wait_for_end() == 1
            assert words in terminal.text
    assert service.refused("attach", "1/x")[0] == 2
    assert service.refused("run", "--escape", "ab", "true")[0] == 2
    job = service.ok("start", "-i", "sleep", "600").strip()
    with at(service, "attach", job) as terminal:
        assert terminal.wait_for_end() == 1
        assert f"job {job} has no terminal" in terminal.text


def has_program(*names: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing."""
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no {' and no '.join(missing)} on this system")


@has_program("vi")
def test_an_editor(service: Service) -> None:
    """A program that draws the whole screen, and draws it anew for who comes back."""
    with at(service, "run", "-it", "-e", "HOME=/tmp", "-e", "TERM=vt100", "vi", "file") as terminal:
        terminal.wait_for("~")
        terminal.type("iwords in a file\x1b")
        terminal.wait_for("words in a file")
        job = newest(service)
        terminal.process.send_signal(signal.SIGKILL)
    with at(service, "attach", job, columns=60, lines=20) as terminal:
        terminal.wait_for("words in a file")
        terminal.type(":wq\r")
        assert terminal.wait_for_end() == 0


@has_program("less")
def test_a_pager(service: Service) -> None:
    """It shows pages of the terminal's size, also after that has changed."""

    def shows(first: int, lines: int) -> Callable[[str], bool]:
        numbers = [str(number) for number in range(first, first + lines - 1)]
        return lambda text: [*numbers, ":"] == text.splitlines()

    with at(service, "run", "-it", "seq 1000 | less") as terminal:
        terminal.wait_until(shows(1, 30))
        terminal.type(" ")
        terminal.wait_until(shows(30, 30))
        terminal.resize(100, 20)
        terminal.wait_until(shows(30, 20))
        terminal.type("q")
        assert terminal.wait_for_end() == 0


@has_program("top")
def test_a_program_that_draws_by_the_clock(service: Service) -> None:
    """The processes of the job and no others, in a table as wide as the terminal, again and again."""
    job = service.ok("start", "exec sleep 600").strip()
    with at(service, "exec", "-it", "-e", "HOME=/tmp", job, "top", "-d", "0.2") as terminal:
        shown = terminal.wait_for("Tasks:", "COMMAND", "pjw-init", "sleep", "top")
        assert "pjwd" not in shown
        # a time that moves on
        terminal.wait_until(lambda text: text.splitlines()[0] != shown.splitlines()[0])
        terminal.resize(60, 20)
        terminal.wait_until(lambda text: "Tasks:" in text and "sleep" in text)
        terminal.type("q")
        assert terminal.wait_for_end() == 0


def test_bytes_of_a_terminal_are_whole_over_a_kill(make_service: Callable[..., Service]) -> None:
    """What it had not shown when server and launcher were killed, and what came later, by their checksum."""
    service = make_service().start()
    script = "stty raw -echo; echo; seq 30000; head -c 1 >/dev/null; seq 30001 60000; exit 3"
    whole = b"".join(b"%d\n" % number for number in range(1, 60_001))
    with at(service, "exec", "-it", service.ok("start", "sleep", "600").strip(), script) as terminal:
        terminal.wait_until(lambda _: len(terminal.bytes) > 10_000)
        kill_server_and_launcher(service)
        service.start()
        terminal.type("x")
        assert terminal.wait_for_end() == 3
        shown = bytes(terminal.bytes[terminal.bytes.index(b"\n") + 1 :][: len(whole)])
        assert hashlib.sha256(shown).digest() == hashlib.sha256(whole).digest()


def test_a_terminal_goes_on_over_a_kill_of_server_and_launcher(make_service: Callable[..., Service]) -> None:
    """The same shell answers after the restart, at the same terminal."""
    service = make_service().start()
    with at(service, "run", "-it", *SHELL) as terminal:
        terminal.wait_for("ready>")
        terminal.type("x=kept; echo a''b\r")
        terminal.wait_for("ab\n")
        kill_server_and_launcher(service)
        service.start()
        terminal.type("echo still-$x; seq 3000 | sha256sum\r")
        terminal.wait_for("still-kept")
        terminal.wait_until(lambda text: re.search(r"^[0-9a-f]{64}  -", text, re.MULTILINE))
        terminal.type("exit 3\r")
        assert terminal.wait_for_end() == 3
