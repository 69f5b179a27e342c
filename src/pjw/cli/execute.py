"""`pjw exec`: another command in a job that runs, as if it ran here; its output, its exit code, and Ctrl-C.

As in `pjw run` threads follow and send, and the main thread alone decides.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from pjw.cli import stdin
from pjw.cli.connection import connect, resolve_id
from pjw.cli.exits import exit_code_of_session, say, why_session_ended
from pjw.cli.interrupts import Interrupt, in_thread, interrupts_into
from pjw.cli.spec import environment, terminal_size, words_of
from pjw.cli.terminal import write_all
from pjw.errors import JobStateError, PjwError
from pjw.model import JobSpec, Session

if TYPE_CHECKING:
    from pjw.client.sync import Client


class _Followed:
    """An output has been written out."""


# None: the input has been sent, or the session was asked to end
Event = _Followed | Interrupt | Exception | None


def execute(arguments: Namespace) -> int:
    """Start a command in a job, be its terminal, and end as it does; with --detach leave it running."""
    typed = arguments.terminal and arguments.stdin == "-"
    if typed and not arguments.detach:
        from pjw.cli import local_terminal

        local_terminal.require_terminal()
    with stdin.opened(arguments.stdin) as descriptor, connect(arguments) as client:
        terminal = terminal_size(arguments)
        spec = JobSpec(
            words_of(arguments.command),
            env=environment(arguments, terminal),
            workdir=arguments.workdir or "",
            input=descriptor is not None,
            terminal=terminal,
        )
        session = client.exec(resolve_id(client, arguments.job), spec, detach=arguments.detach)
        if arguments.detach:
            print(f"{session.job_id}/{session.number}", flush=True)
            if descriptor is not None and not typed:
                _send(client, session, descriptor)
            return 0
        if typed:
            from pjw.cli.interactive import at_session

            return at_session(client, session.job_id, session.number, arguments.escape)
        events: SimpleQueue[Event] = SimpleQueue()
        with interrupts_into(events):
            attached = _Attached(client, session, descriptor, events)
            ended = attached.run()
        if (words := why_session_ended(ended)) and not attached.interrupted:
            say(words)
        return exit_code_of_session(ended)


class _Attached:
    """A session that runs as if it did here."""

    def __init__(
        self,
        client: "Client",
        session: Session,
        descriptor: int | None,
        events: "SimpleQueue[Event]",
    ) -> None:
        self._client: Final = client
        self._session: Final = session
        self._descriptor: Final = descriptor
        self._events: Final = events
        # whether a user has typed Ctrl-C
        self.interrupted = False

    def run(self) -> Session:
        """Handle events until the output has ended; return the session. Raises an error that prevents it."""
        job_id, number = self._session.job_id, self._session.number
        outputs = ((sys.stdout.fileno(), False), (sys.stderr.fileno(), True))
        followed = outputs[:1] if self._session.terminal else outputs
        for descriptor, stderr in followed:
            pieces = self._client.logs(job_id, session=number, stderr=stderr)
            in_thread(self._events, partial(_follow, pieces, descriptor))
        if self._descriptor is not None:
            in_thread(self._events, partial(_send, self._client, self._session, self._descriptor))
        following = len(followed)
        while following:
            match self._events.get():
                case _Followed():
                    following -= 1
                case Interrupt() if self.interrupted:
                    say(f"session {number} of job {job_id} is left to itself")
                    sys.stderr.flush()
                    raise KeyboardInterrupt
                case Interrupt():
                    self.interrupted = True
                    in_thread(self._events, self._stop)
                case Exception() as error:
                    # a local command would end by that too: its reader has gone, or the disk is full
                    with suppress(PjwError):
                        self._client.stop_session(job_id, number)
                    raise error
        return self._client.wait_session(job_id, number)

    def _stop(self) -> None:
        self._client.stop_session(self._session.job_id, self._session.number)


def _follow(pieces: Iterator[bytes], descriptor: int) -> _Followed:
    write_all(pieces, descriptor)
    return _Followed()


def _send(client: "Client", session: Session, descriptor: int) -> None:
    # a command need not read all of its input
    with suppress(JobStateError):
        client.write_input(session.job_id, stdin.pieces(descriptor), session=session.number)
