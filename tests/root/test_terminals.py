"""Terminals of jobs and of sessions, by the library: theirs, of the right size, and durable."""

import asyncio
import hashlib
import re
from contextlib import aclosing
from typing import Any

import pytest

from pjw.errors import InvalidJobError, JobStateError
from pjw.model import ExitStatus, JobSpec, Session, TerminalSize
from pjw.worker import Part, Worker
from tests.support.worker_harness import DEADLINE_SECONDS, Bench, start

SIZE = TerminalSize(33, 101)
SHELL = ["bash", "--norc", "--noprofile", "-i"]


class Typist:
    """Somebody at the terminal of a job, or of a session."""

    def __init__(self, worker: Worker, job_id: int, session: int = 0) -> None:
        self.worker = worker
        self.job_id = job_id
        self.session = session
        self.seen = b""

    @classmethod
    async def at_job(cls, worker: Worker, command: Any = SHELL, **how: Any) -> "Typist":
        """Start a job with a terminal."""
        spec = JobSpec(command, input=True, terminal=SIZE, env={"PS1": "$ ", "TERM": "xterm"}, **how)
        return cls(worker, (await worker.start(spec)).id)

    @classmethod
    async def at_session(cls, worker: Worker, command: Any = SHELL, **how: Any) -> "Typist":
        """Start a session with one."""
        job = await start(worker, ["sleep", "600"])
        spec = JobSpec(command, input=True, terminal=SIZE, env={"PS1": "$ ", "TERM": "xterm"}, **how)
        session = await worker.exec(job.id, spec)
        return cls(worker, job.id, session.number)

    async def type(self, keys: bytes, *, end: bool = False) -> None:
        """Type keys."""
        async with self.worker.write_input(self.job_id, session=self.session) as writer:
            await writer.write(writer.offset, keys, end=end)

    async def see(self, pattern: bytes) -> re.Match[bytes]:
        """Wait until the terminal shows something, from where the last wait has ended; what it was."""
        got = b""
        part = Part(offset=len(self.seen), session=self.session)
        async with asyncio.timeout(DEADLINE_SECONDS), aclosing(self.worker.logs(self.job_id, part)) as pieces:
            async for data in pieces:
                got += data
                if match := re.search(pattern, got):
                    self.seen += got[: match.end()]
                    return match
        raise AssertionError(f"no {pattern!r} in {got!r}")

    async def end(self) -> ExitStatus | None:
        """Wait for the end; how it was."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            if self.session:
                return (await self.worker.wait_session(self.job_id, self.session)).exit_status
            return (await self.worker.wait(self.job_id)).exit_status

    async def resize(self, size: TerminalSize) -> None:
        """Make the window another size."""
        await self.worker.resize(self.job_id, size, session=self.session)


WAYS = pytest.mark.parametrize("way", [Typist.at_job, Typist.at_session], ids=["job", "session"])


@WAYS
async def test_a_shell(worker: Worker, way: Any) -> None:
    """Its size at the first prompt, its owner, job control, interrupts, and its exit code."""
    terminal = await way(worker)
    await terminal.see(rb"\$ ")
    await terminal.type(b"stty size; tty; stat -c %u $(tty); id -u\r")
    match = await terminal.see(rb"33 101\r\n/dev/pts/0\r\n(\d+)\r\n(\d+)\r\n")
    assert match[1] == match[2]
    # The shell has to give it the terminal first. exec: Ctrl-Z in the midst of a vfork(2) would stop a child
    # alone, whom nobody waits for
    await terminal.type(b"sh -c 'echo going; exec sleep 100'\r")
    await terminal.see(rb"[\r\n]going\r\n")
    await terminal.type(b"\x03")
    # Not ^C: the kernel sends the signal first, and echoes nothing if the shell has set its own modes by then
    await terminal.see(rb"\$ ")
    await terminal.type(b"echo $?\r")
    await terminal.see(rb"130\r\n")
    await terminal.type(b"sh -c 'echo going; exec cat'\r")
    await terminal.see(rb"[\r\n]going\r\n")
    await terminal.type(b"\x1a")
    await terminal.see(rb"Stopped")
    await terminal.type(b"jobs; fg\r")
    await terminal.see(rb"\[1\]\+ +Stopped +sh -c")
    await terminal.see(rb"\r\nsh -c .*exec cat'\r\n")
    await terminal.type(b"words\r")
    await terminal.see(rb"words\r\nwords\r\n")
    await terminal.type(b"\x03")
    await terminal.see(rb"\$ ")
    await terminal.type(b"exit 7\r")
    assert await terminal.end() == ExitStatus(7)


@WAYS
async def test_a_resize(worker: Worker, way: Any) -> None:
    """Is seen by who asks, and told to who waits; the input is untouched."""
    terminal = await way(
        worker, "trap 'stty size' WINCH; echo ready; read line; while read line; do echo $line; done"
    )
    await terminal.see(rb"ready")
    await terminal.resize(TerminalSize(50, 200))
    await terminal.type(b"one\rtwo\r")
    await terminal.see(rb"50 200\r\n")
    await terminal.see(rb"two\r\n")
    with pytest.raises(InvalidJobError):
        TerminalSize(0, 80)
    with pytest.raises(InvalidJobError):
        TerminalSize(24, 65_536)


@WAYS
async def test_the_last_bytes_come_before_the_end(worker: Worker, way: Any) -> None:
    """However much is written at once, and at once followed by the end."""
    terminal = await way(worker, "stty -opost; seq 100000; exit 3")
    match = await terminal.see(rb"1\n2\n(?s:.*)\n100000\n")
    assert match[0] == b"".join(b"%d\n" % n for n in range(1, 100001))
    assert await terminal.end() == ExitStatus(3)


@WAYS
async def test_every_byte_is_typed(worker: Worker, way: Any) -> None:
    """To a program that reads raw keys: all of them, Ctrl-P and Ctrl-D too."""
    keys = bytes(range(256)) * 100
    terminal = await way(worker, f"stty raw -echo; echo ready; head -c {len(keys)} | sha256sum; exit 3")
    await terminal.see(rb"ready")
    await terminal.type(keys)
    await terminal.see(hashlib.sha256(keys).hexdigest().encode())
    assert await terminal.end() == ExitStatus(3)


@WAYS
@pytest.mark.parametrize("keys", [b"", b"line\n", b"in the midst"])
async def test_the_end_of_the_input_is_typed(worker: Worker, way: Any, keys: bytes) -> None:
    """As Ctrl-D, so that a program that reads to the end ends."""
    terminal = await way(worker, "cat; exit 3")
    await terminal.type(keys, end=True)
    assert await terminal.end() == ExitStatus(3)


@WAYS
async def test_a_program_that_closes_its_terminal_for_a_while(worker: Worker, way: Any) -> None:
    """Nobody has it open, and yet it is no end."""
    script = "exec </dev/null >/dev/null 2>&1; sleep 0.3; exec >/dev/tty; echo again; exit 3"
    terminal = await way(worker, script)
    await terminal.see(rb"again\r\n")
    assert await terminal.end() == ExitStatus(3)


async def test_it_outlives_server_and_launcher(bench: Bench) -> None:
    """The same shells answer the next worker."""
    first = await bench.open()
    terminals = [await Typist.at_job(first), await Typist.at_session(first)]
    for terminal in terminals:
        await terminal.see(rb"\$ ")
        await terminal.type(b"x=kept\r")
        await terminal.see(rb"\$ ")
    await bench.close(first)
    second = await bench.open()
    for terminal in terminals:
        terminal.worker = second
        await terminal.resize(TerminalSize(44, 55))
        await terminal.type(b"echo $x; stty size\r")
        await terminal.see(rb"kept\r\n44 55\r\n")
        await terminal.type(b"exit 9\r")
        assert await terminal.end() == ExitStatus(9)


async def test_a_hung_up_terminal(worker: Worker) -> None:
    """The shell and what it runs in the foreground end."""
    terminal = await Typist.at_session(worker)
    await terminal.see(rb"\$ ")
    await terminal.type(b"sh -c 'echo going; exec sleep 100'\r")
    await terminal.see(rb"[\r\n]going\r\n")
    ended: Session = await worker.stop_session(terminal.job_id, terminal.session)
    assert ended.exit_status is not None
    assert ended.exit_status != ExitStatus(0)


async def test_what_has_no_terminal(worker: Worker) -> None:
    """Cannot be given a size; and a terminal has one output."""
    job = await start(worker, ["sleep", "600"])
    session = await worker.exec(job.id, JobSpec(["sleep", "600"]))
    for number in (0, session.number):
        with pytest.raises(JobStateError, match="has no terminal"):
            await worker.resize(job.id, SIZE, session=number)
    with pytest.raises(InvalidJobError, match="one output"):
        JobSpec(["true"], terminal=SIZE, split_stderr=True)
