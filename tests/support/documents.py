"""The sessions of a document: each command is typed at a terminal, and must show what the document shows.

A block of ```console is a session: `$ ` or `# ` begins a command, which goes on in the next line after a
backslash, and in a here document (<<'END'); what follows is what a person sees. There `…` stands for anything
within a line, and for any lines where it is alone; `^C` is Ctrl-C, typed when all before it is on the screen.
A comment above a block, <!-- terminal: NAME -->, has it typed at another terminal, whose last command may go
on beside the others; a block there that begins without a command is what that command shows further on.
`NAME# ` and `NAME$ ` are root's terminal and a user's on the machine of that name.
A document without machines has a network of its own, so that its pjwd has the default port.
"""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pyte

COLUMNS: Final = 100
LINES: Final = 500
SECONDS: Final = 60
ANYTHING: Final = "…"
CTRL_C: Final = "^C"
COMMAND: Final = re.compile(r"(?P<machine>[a-z]+(?=[$#]))?(?P<sign>[$#]) (?P<typed>.*)")
# what no command prints: that one has ended
PROMPT: Final = "\x1e"
DONE: Final = re.compile(rb"\x1e\Z")


@dataclass
class Command:
    """What is typed, where, and what is to be seen. Nothing is typed where *typed* is empty.

    *machine* has the sign of the prompt: `server#`; it is empty in a document of one machine.
    """

    typed: str
    machine: str
    terminal: str
    document: str
    line: int
    shown: list[str] = field(default_factory=list)


def commands_of(document: Path) -> list[Command]:
    """Every command of a document's sessions, in its order."""
    found: list[Command] = []
    terminal, inside, begun = "", False, False
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = not inside and line == "```console"
            # a name is for one block
            terminal = terminal if inside else ""
            begun = False
        elif name := re.fullmatch(r"<!-- terminal: (\w+) -->", line):
            terminal = name[1]
        elif inside and begun and _goes_on(found[-1].typed):
            found[-1].typed += f"\n{line}"
        elif inside and (typed := COMMAND.fullmatch(line)):
            machine = f"{typed['machine']}{typed['sign']}" if typed["machine"] else ""
            found.append(Command(typed["typed"], machine, terminal, document.name, number))
            begun = True
        elif inside and not begun:
            before = next(one for one in reversed(found) if terminal and one.terminal == terminal)
            found.append(Command("", before.machine, terminal, document.name, number, [*before.shown, line]))
            begun = True
        elif inside:
            found[-1].shown.append(line)
    return found


def section_of(document: Path, heading: str) -> list[Command]:
    """The commands of a section: from its heading to the next one of its level or above."""
    lines = document.read_text().splitlines()
    first = lines.index(heading)
    level = heading.split(" ", 1)[0]
    last = next(
        (at for at in range(first + 1, len(lines)) if lines[at].split(" ", 1)[0] in _up_to(level)), len(lines)
    )
    return [command for command in commands_of(document) if first < command.line <= last]


def _up_to(level: str) -> set[str]:
    return {level[:count] for count in range(1, len(level) + 1)}


def line_of(document: Path, text: str) -> int:
    """The number of a line that is there as it stands."""
    return document.read_text().splitlines().index(text) + 1


def _goes_on(typed: str) -> bool:
    here = re.search(r"<<'(\w+)'", typed)
    return typed.endswith("\\") or (here is not None and not typed.endswith(f"\n{here[1]}"))


def matches(shown: list[str], seen: list[str]) -> bool:
    """Whether a document shows what was seen."""
    pattern = "".join(map(_pattern, shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in seen)) is not None


def _pattern(line: str) -> str:
    if line == ANYTHING:
        return r"(?:.*\n)*?"
    if line == CTRL_C:
        # the terminal shows it, but pjw may have written over it
        return r"(?:\^C\n)?"
    # columns move with what is in them, so the spaces beside it are part of it
    return ".*".join(re.escape(part) for part in re.split(f" *{ANYTHING} *", line)) + r"\n"


class Terminal:
    """A shell at a terminal of its own, with so many *columns*; a command may take *seconds*."""

    def __init__(
        self,
        shell: list[str],
        cwd: Path,
        env: dict[str, str],
        *,
        columns: int = COLUMNS,
        seconds: float = SECONDS,
    ) -> None:
        self._columns: Final = columns
        self._seconds: Final = seconds
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (LINES, columns))
        env = {"HOME": str(cwd), **env, "PS1": PROMPT, "PS2": "", "TERM": "xterm"}
        self._shell = subprocess.Popen(shell, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._seen = b""
        self._echo = 0
        assert self.until(None), self._seen

    def type(self, text: str) -> None:
        """Type a command; its end is awaited by `until`."""
        assert DONE.search(self._seen), f"{text}: the terminal is busy with another command"
        self._seen = b""
        # the terminal shows at once what is typed, each line with a carriage return
        self._echo = len(f"{text}\n".replace("\n", "\r\n").encode())
        os.write(self._ours, f"{text}\n".encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._ours, b"\x03")

    def lines(self) -> list[str]:
        """What the command has put on the screen, as a person sees it."""
        screen = pyte.Screen(self._columns, LINES)
        pyte.ByteStream(screen).feed(DONE.sub(b"", self._seen[self._echo :]))
        lines = [line.rstrip() for line in screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def until(self, shown: list[str] | None) -> bool:
        """Wait for the screen to show *shown*, or without that for the command's end; whether it came."""
        deadline = time.monotonic() + self._seconds
        while not (DONE.search(self._seen) if shown is None else matches(shown, self.lines())):
            ended = DONE.search(self._seen)
            if ended or not select.select([self._ours], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self._seen += os.read(self._ours, 65536)
        return True

    def close(self) -> None:
        """End what still runs, as a person would, and the shell."""
        try:
            if not DONE.search(self._seen):
                self.interrupt()
                assert self.until(None), self.lines()
            os.write(self._ours, b"exit\n")
            try:
                self._shell.wait(SECONDS)
            except subprocess.TimeoutExpired:
                while select.select([self._ours], [], [], 0)[0]:
                    self._seen += os.read(self._ours, 65536)
                raise AssertionError("\n".join(["the shell did not end:", *self.lines()])) from None
        finally:
            if self._shell.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(os.tcgetpgrp(self._ours), signal.SIGKILL)
                self._shell.kill()
                self._shell.wait()
            os.close(self._ours)


@contextmanager
def own_network() -> Iterator[int]:
    """A network namespace with loopback alone; the pid of a process that is in it."""
    # says so when it is there, and ends with its stdin
    script = "ip link set lo up && echo ready && exec cat"
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid


def run(
    commands: list[Command],
    cwd: Path,
    env: dict[str, str],
    internet: Callable[[list[str]], AbstractContextManager[Path]] | None = None,
) -> None:
    """Type the commands of a document without machines, in *cwd*; AssertionError as of `play`.

    *internet* is made of the words that run a command in the document's network: hosts that are there as long
    as the commands are typed, and the file with their names and addresses.
    """
    with own_network() as pid, ExitStack() as stack:
        words = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        if internet is not None:
            names = str(stack.enter_context(internet(words)))
            words = [
                *words,
                "unshare",
                "--mount",
                "sh",
                "-c",
                f'mount --bind {names} /etc/hosts && exec "$@"',
                "-",
            ]
        shell = [*words, "setsid", "--ctty", "bash", "--norc", "--noediting"]
        play(commands, lambda _: Terminal(shell, cwd, env))


def play(commands: list[Command], terminal_of: Callable[[str], Terminal]) -> None:
    """Type commands; raise AssertionError at the first one that shows something else.

    *terminal_of* opens a terminal on the machine that a command names.
    """
    terminals: dict[str, Terminal] = {}
    last = {command.terminal: command for command in commands if command.terminal and command.typed}
    try:
        for command in commands:
            name = command.terminal or command.machine
            if name not in terminals:
                terminals[name] = terminal_of(command.machine)
            beside = not command.typed or command is last.get(command.terminal)
            beside = beside and CTRL_C not in command.shown
            if not _play(terminals[name], command, beside=beside):
                screens = ["\n".join([f"[{name}]", *one.lines()]) for name, one in terminals.items()]
                where = f"{command.document}:{command.line}: {command.typed}"
                raise AssertionError("\n".join([where, *screens]))
    finally:
        # the last one first: those who talk to a service before the service
        for terminal in reversed(terminals.values()):
            terminal.close()


def _play(terminal: Terminal, command: Command, *, beside: bool) -> bool:
    """Type a command; whether it shows what it should. One that goes on *beside* the others need not end."""
    if command.typed:
        terminal.type(command.typed)
    for number, line in enumerate(command.shown):
        if line == CTRL_C:
            if not terminal.until(command.shown[:number]):
                return False
            terminal.interrupt()
    came = terminal.until(command.shown if beside else None)
    return came and matches(command.shown, terminal.lines())
