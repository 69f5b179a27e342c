"""`pjw run`: a job as if it ran here; its output, its exit code, and Ctrl-C.

Threads start, follow and stop; the main thread alone decides, by the events that they and signals put into
one queue. No other program knows the id of the job. So after any failure here the job is stopped, or the
user learns that it goes on.
"""

import os
import sys
from argparse import Namespace
from contextlib import nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from pjw.cli import stdin
from pjw.cli.commands import send_upload, start, start_job, telling_if_stuck, wait_for_end
from pjw.cli.connection import connect
from pjw.cli.exits import EXIT_INTERRUPTED, complain, exit_code_of_job, say, why_ended
from pjw.cli.interrupts import HANGUP, Interrupt, in_thread, interrupts_into
from pjw.cli.terminal import write_all
from pjw.errors import PjwError, ServerUnreachableError
from pjw.model import EndReason, Job, JobState

if TYPE_CHECKING:
    from pjw.client.sync import Client

# Ctrl-C for the first time, for the second; the next one leaves the job to itself.
_STOP, _KILL = 1, 2


class _Followed:
    """One output has been written out: to its end, or as far as that went."""


class _Sent:
    """The input has been sent, or is no longer wanted."""


class _Stopped:
    """A stop has ended the job."""

    def __init__(self, job: Job) -> None:
        self.job: Final = job


class _Unstopped:
    """A stop was refused."""

    def __init__(self, error: PjwError) -> None:
        self.error: Final = error


class _Retried:
    """The job has failed, and goes on as another one."""

    def __init__(self, job: Job) -> None:
        self.job: Final = job


Event = Job | Interrupt | _Followed | _Sent | _Stopped | _Unstopped | _Retried | Exception


def run(arguments: Namespace) -> int:
    """Start a job, be its terminal, and end as it does."""
    if arguments.output_dir is not None and not arguments.outputs:
        arguments.parser.error("--output-dir needs --output GLOB, which names the files to keep")
    if arguments.detach:
        if arguments.output_dir is not None:
            arguments.parser.error("with -d nobody waits for the files: pjw cp JOB:. DIR copies them later")
        return start(arguments)
    if arguments.array is not None:
        arguments.parser.error(
            "pjw run shows the output of one job: start an array with pjw start, or with -d"
        )
    if arguments.terminal and arguments.stdin == "-":
        from pjw.cli import interactive, local_terminal

        local_terminal.require_terminal()
        with connect(arguments) as client:
            send_upload(client, arguments)
            job = start_job(client, arguments)
            if job.state == "queued":
                say(f"job {job.id} {job.detail}")
            code = interactive.at_job(client, job.id, arguments.escape)
            if arguments.outputs:
                from pjw.cli.copy import fetch

                fetch(client, client.get(job.id), arguments.output_dir)
            return code
    with stdin.opened(arguments.stdin) as descriptor, connect(arguments) as client:
        send_upload(client, arguments)
        code = _run_attached(client, arguments, descriptor)
    if descriptor is None and stdin.is_left():
        say("the job did not read what is piped into pjw; -i passes it on")
    return code


def _run_attached(client: "Client", arguments: Namespace, stdin: int | None) -> int:
    """Start the requested job, give it its input, follow it to its end, and return its exit code."""
    events: SimpleQueue[Event] = SimpleQueue()
    attached = _Attached(client, arguments, stdin, events)
    with interrupts_into(events):
        code = attached.run()
    # signals end us as usual from here on: the job has ended
    if attached.ended is not None and attached.ended.artifacts is not None:
        from pjw.cli.copy import fetch

        fetch(client, attached.ended, arguments.output_dir)
    return code


class _Attached:
    """One job that runs as if it did here."""

    def __init__(
        self, client: "Client", arguments: Namespace, stdin: int | None, events: "SimpleQueue[Event]"
    ) -> None:
        self._client: Final = client
        self._stdin: Final = stdin
        self._arguments: Final = arguments
        self._events: Final = events
        self._interrupts = 0
        self._job: Job | None = None
        # the job, when it has
        self.ended: Job | None = None
        self._followed_by = 0
        self._failure: Exception | None = None

    def run(self) -> int:
        """Handle events until the job has ended, or we are to leave it."""
        in_thread(self._events, lambda: start_job(self._client, self._arguments))
        while True:
            match self._events.get():
                case Interrupt() as interrupt:
                    if self._interrupted(interrupt.signal_number):
                        return self._left()
                case _Followed():
                    self._followed_by -= 1
                    if not self._followed_by and self.ended is None:
                        in_thread(self._events, self._wait)
                case _Sent():
                    pass
                case _Unstopped() as refused:
                    self._not_stopped(refused.error)
                case _Retried() as retried:
                    self._again(retried.job)
                case Exception() as error:
                    self._failed(error)
                case Job() as job if self._job is None:
                    self._started(job)
                case Job() as job:
                    self.ended = job
                case _Stopped() as stopped:
                    self.ended = stopped.job
            if self.ended is not None and not self._followed_by:
                return self._end(self.ended)

    def _started(self, job: Job) -> None:
        self._job = job
        if job.state is JobState.QUEUED:
            say(f"job {job.id} {job.detail}")
        self._follow(job.id, sys.stdout.fileno(), stderr=False)
        if job.split_stderr:
            self._follow(job.id, sys.stderr.fileno(), stderr=True)
        if self._stdin is not None:
            self._send(job.id, self._stdin)
        if self._interrupts:
            self._stop(job.id)

    def _again(self, job: Job) -> None:
        """Follow the next attempt."""
        assert self._job is not None
        say(f"job {self._job.id} failed; attempt {job.attempt} is job {job.id}")
        self._started(job)

    def _failed(self, error: Exception) -> None:
        """Stop the job: its output can no longer be shown whole, and a local command would end too.

        The reader of our output has gone, or its disk is full; the input cannot be read, or is too long; we
        are not let in any more. Raises the error when there is no job, or no server that could stop it.
        """
        if self._job is None:
            raise error
        if isinstance(error, ServerUnreachableError):
            self._not_stopped(error)
        elif self._failure is None:
            self._failure = error
            if not self._interrupts:
                self._interrupts = _STOP
                # `pjw run … | head` is as usual as it is quiet
                self._stop(self._job.id, quietly=isinstance(error, BrokenPipeError))

    def _not_stopped(self, error: PjwError) -> None:
        """Raise an error that ends the wait; report a mere refusal, after which the job goes on."""
        if self._failure is not None:
            assert self._job is not None
            self._failure.add_note(f"job {self._job.id} could not be stopped, and may still run: {error}")
            raise self._failure
        if isinstance(error, ServerUnreachableError):
            raise error
        complain(error)

    def _left(self) -> int:
        """Return the exit code for a user who waits no longer. Raises the failure there was, if any."""
        if self._job is None:
            say("the job may have started: see pjw list")
        if self._failure is not None:
            raise self._failure
        return EXIT_INTERRUPTED

    def _end(self, job: Job) -> int:
        """Return the exit code of an ended job. Raises the failure that kept its output from being shown."""
        if self._failure is not None:
            if job.reason in (EndReason.STOPPED, EndReason.CANCELLED):
                self._failure.add_note(f"job {job.id} was stopped")
            raise self._failure
        # a user who typed Ctrl-C knows
        if job.reason is EndReason.CANCELLED and self._interrupts:
            return EXIT_INTERRUPTED
        if (words := why_ended(job)) and not (job.reason is EndReason.STOPPED and self._interrupts):
            say(words)
        return exit_code_of_job(job)

    def _send(self, job_id: int, descriptor: int) -> None:
        def send() -> _Sent:
            stdin.send(self._client, job_id, descriptor, quietly=sys.stdout.isatty())
            return _Sent()

        in_thread(self._events, send)

    def _wait(self) -> Job | _Retried:
        assert self._job is not None
        job_id, may_be_retried = self._job.id, self._job.attempt > 0
        job = self._client.get(job_id) if may_be_retried else self._job
        if not job.state.final:
            job = wait_for_end(self._client, lambda: job_id, nullcontext)
        if may_be_retried and job.id != job_id:
            # the newest attempt has ended, and we have not shown the next one
            job = self._client.get(job_id)
        return job if job.retried_as is None else _Retried(self._client.get(job.retried_as))

    def _follow(self, job_id: int, descriptor: int, *, stderr: bool) -> None:
        def follow() -> _Followed:
            try:
                # the follower of stdout reports it, so that it is said once
                with nullcontext() if stderr else telling_if_stuck(self._client, job_id):
                    write_all(self._client.logs(job_id, stderr=stderr), descriptor)
            except Exception as error:  # noqa: BLE001  as in every thread
                self._events.put(error)
            return _Followed()

        self._followed_by += 1
        in_thread(self._events, follow)

    def _interrupted(self, signal_number: int) -> bool:
        """Stop the job, or kill it; return whether to leave it."""
        if signal_number == HANGUP and self._interrupts:
            # a terminal that closes sends it, and the shell that ends there sends it again
            return False
        self._interrupts += 1
        if self._interrupts > _KILL:
            return True
        if self._job is not None:
            self._stop(self._job.id)
        elif self._interrupts == _STOP:
            _tell("the job is stopped once its start is answered; with another Ctrl-C it is killed then")
        else:
            _tell("the job is killed once its start is answered: another Ctrl-C does not wait for that")
        return False

    def _stop(self, job_id: int, *, quietly: bool = False) -> None:
        grace = self._arguments.grace if self._interrupts == _STOP else 0
        if self._interrupts != _STOP:
            _tell(f"killing job {job_id}: another Ctrl-C leaves it to itself")
        elif not quietly:
            after = "its grace period" if grace is None else f"{grace:g} s"
            _tell(f"stopping job {job_id}: SIGKILL after {after}, or with another Ctrl-C")

        def stop() -> Event:
            try:
                return _Stopped(self._client.stop(job_id, grace=grace))
            except PjwError as error:
                return _Unstopped(error)

        in_thread(self._events, stop)


def _tell(words: str) -> None:
    """Tell a user who has just typed ^C, in a line."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), f"\npjw: {words}\n".encode())
