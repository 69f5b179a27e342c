"""`pjw run -it`, `pjw exec -it`, `pjw attach`: the user's terminal becomes that of a job, or of a session.

Every key goes there, Ctrl-C too. Only `~.` at the beginning of a line leaves. Threads type and show, and the
main thread alone decides.
"""

import os
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from pjw.cli import local_terminal
from pjw.cli.connection import connect, resolve_id
from pjw.cli.exits import exit_code_of_job, exit_code_of_session, say, why_ended, why_session_ended
from pjw.cli.interrupts import Interrupt, in_thread, interrupts_into
from pjw.cli.local_terminal import HELP, Keys
from pjw.cli.terminal import write_all
from pjw.errors import JobStateError

if TYPE_CHECKING:
    from pjw.client.sync import Client

_READ_BYTES: Final = 4096
# the end of the input is known a moment before that of the output
_ENDS_SECONDS: Final = 1.0


class _Left:
    """The user wants to leave, or the terminal is gone."""


class _Shown:
    """All output has been shown."""


# None: a thread has done its work
Event = Interrupt | _Left | _Shown | Exception | None


class Interactive:
    """The user's terminal, as that of a job, or of one of its sessions."""

    def __init__(self, client: "Client", job_id: int, session: int, escape: str | None) -> None:
        self._client: Final = client
        self._job_id: Final = job_id
        self._session: Final = session
        self._keys: Final = Keys(escape)
        self._escape: Final = escape
        self._events: Final[SimpleQueue[Event]] = SimpleQueue()
        self._typed: Final[SimpleQueue[bytes]] = SimpleQueue()
        self._shown: Final = threading.Event()

    def run(self, *, come_back: bool) -> bool:
        """Show the output and pass on the keys until the command ends; return False when the user leaves.

        Show the output from its beginning. For a user who comes back, show its last lines, and have the
        program draw its screen anew. Raises the error that ends the connection.
        """
        if come_back:
            self._redraw()
        tail = local_terminal.size().rows if come_back else None
        with interrupts_into(self._events, local_terminal.RESIZED), local_terminal.raw():
            for work in (lambda: self._show(tail), self._type, self._read):
                in_thread(self._events, work)
            ended = self._decide()
        if not ended:
            local_terminal.show_usual()
        return ended

    def _redraw(self) -> None:
        """Have the programs there draw their screen anew: they do so only when the size changes."""
        size = local_terminal.size()
        other = type(size)(size.rows, size.columns - 1 if size.columns > 1 else 2)
        for each in (other, size):
            self._client.resize(self._job_id, each, session=self._session)

    def _decide(self) -> bool:
        while True:
            match self._events.get():
                case Interrupt(signal_number=local_terminal.RESIZED):
                    in_thread(self._events, self._resize)
                case Interrupt() | _Left():
                    return False
                case _Shown():
                    return True
                case Exception() as error:
                    raise error

    def _show(self, tail: int | None) -> _Shown:
        pieces = self._client.logs(self._job_id, tail=tail, session=self._session)
        write_all(pieces, sys.stdout.fileno())
        self._shown.set()
        return _Shown()

    def _resize(self) -> None:
        # the command may just have ended
        with suppress(JobStateError):
            self._client.resize(self._job_id, local_terminal.size(), session=self._session)

    def _type(self) -> None:
        try:
            self._client.write_input(self._job_id, self._pieces(), session=self._session, append=True)
        except JobStateError as error:
            # the command has ended, or else another terminal has taken over
            if not self._shown.wait(_ENDS_SECONDS):
                self._tell(f"{error}; nothing reads what you type here any more")

    def _pieces(self) -> Iterator[bytes]:
        while True:
            yield self._typed.get()

    def _read(self) -> _Left:
        while not self._keys.left:
            typed = os.read(sys.stdin.fileno(), _READ_BYTES)
            if not typed:
                break
            if passed := self._keys.take(typed):
                self._typed.put(passed)
            if self._keys.wants_help:
                self._keys.wants_help = False
                self._tell(HELP.format(self._escape))
        return _Left()

    def _tell(self, words: str) -> None:
        lines = "".join(f"\r\npjw: {line}" for line in words.strip().splitlines())
        os.write(sys.stderr.fileno(), f"{lines}\r\n".encode())


def at_job(client: "Client", job_id: int, escape: str | None, *, come_back: bool = False) -> int:
    """Be the terminal of a job; return its exit code, or 0 when the user leaves it."""
    if not Interactive(client, job_id, 0, escape).run(come_back=come_back):
        say(f"left job {job_id}, which goes on: pjw attach {job_id} comes back")
        return 0
    job = client.wait(job_id)
    if words := why_ended(job):
        say(words)
    return exit_code_of_job(job)


def at_session(
    client: "Client", job_id: int, session: int, escape: str | None, *, come_back: bool = False
) -> int:
    """Be the terminal of a session; return its exit code, or 0 when the user leaves it."""
    if not Interactive(client, job_id, session, escape).run(come_back=come_back):
        say(
            f"left session {session} of job {job_id}: pjw attach {job_id}/{session} comes back;"
            " after two minutes it is hung up, unless it was started with --detach"
        )
        return 0
    ended = client.wait_session(job_id, session)
    if words := why_session_ended(ended):
        say(words)
    return exit_code_of_session(ended)


def attach(arguments: Namespace) -> int:
    """Come back to the terminal of a job, or of a session."""
    local_terminal.require_terminal(hint="pjw logs shows the output of a job")
    with connect(arguments) as client:
        name, session = arguments.terminal
        job_id = resolve_id(client, name)
        if session:
            return at_session(client, job_id, session, arguments.escape, come_back=True)
        job = client.get(job_id)
        if job.state.final:
            raise JobStateError(f"job {job_id} has ended", hint=f"pjw logs {job_id} shows its output")
        if not job.input:
            raise JobStateError(f"job {job_id} takes no input", hint=f"pjw logs {job_id} shows its output")
        return at_job(client, job_id, arguments.escape, come_back=True)
