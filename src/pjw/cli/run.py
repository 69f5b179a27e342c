"""`pjw run`: a job as if it ran here; its output, its exit code, and Ctrl-C.

Threads start, follow and stop; the main thread alone decides, by what they and signals put into one queue.
"""

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Final

from pjw.cli import stdin
from pjw.cli.commands import exit_code_of_job, start_job, write_all
from pjw.cli.exits import EXIT_INTERRUPTED, complain
from pjw.errors import ConfigError, PjwError
from pjw.model import EndReason, Job

if TYPE_CHECKING:
    from pjw.client.sync import Client

_WHY: Final = {
    EndReason.TIMED_OUT: "it reached its limit of time",
    EndReason.OUTPUT_LIMIT: "it reached its limit of output",
    EndReason.OOM_KILLED: "it reached its limit of memory",
}
# Ctrl-C for the first time, for the second; the next one leaves the job to itself.
_STOP, _KILL = 1, 2


class _Interrupt:
    """Somebody typed Ctrl-C, or ended us with SIGTERM."""


class _Followed:
    """One output has been written out, to its end."""


class _Sent:
    """The input has been sent, or is no longer wanted."""


Event = Job | _Interrupt | _Followed | _Sent | Exception


def run_attached(client: "Client", arguments: Namespace, stdin: int | None) -> int:
    """Start the job that is asked for, give it its input, and follow it to its end; its exit code."""
    events: SimpleQueue[Event] = SimpleQueue()
    with _interrupts_into(events):
        return _Attached(client, arguments, stdin, events).run()


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
        self._followed_by = 0

    def run(self) -> int:
        """Go by what happens until the job has ended, or we are to leave it."""
        self._in_thread(lambda: start_job(self._client, self._arguments))
        while True:
            match self._events.get():
                case _Interrupt():
                    if self._interrupted():
                        return EXIT_INTERRUPTED
                case _Followed():
                    self._followed_by -= 1
                    if not self._followed_by:
                        self._in_thread(self._wait)
                case _Sent():
                    pass
                case OSError() | ConfigError() as error:
                    # Whoever read our output has gone, its disk is full, or the input cannot be read. What
                    # runs here would end by that, and nobody has been told the id of this one.
                    if self._job is not None:
                        self._client.stop(self._job.id, grace=self._arguments.grace)
                    raise error
                case Exception() as error:
                    raise error
                case Job() as job if self._job is None:
                    self._started(job)
                case Job() as job:
                    return _ended(job)

    def _started(self, job: Job) -> None:
        self._job = job
        self._follow(job.id, sys.stdout.fileno(), stderr=False)
        if job.split_stderr:
            self._follow(job.id, sys.stderr.fileno(), stderr=True)
        if self._stdin is not None:
            self._send(job.id, self._stdin)
        if self._interrupts:
            self._stop(job.id)

    def _send(self, job_id: int, descriptor: int) -> None:
        def send() -> _Sent:
            stdin.send(self._client, job_id, descriptor, quietly=sys.stdout.isatty())
            return _Sent()

        self._in_thread(send)

    def _wait(self) -> Job:
        assert self._job is not None
        return self._client.wait(self._job.id)

    def _follow(self, job_id: int, descriptor: int, *, stderr: bool) -> None:
        def follow() -> _Followed:
            write_all(self._client.logs(job_id, stderr=stderr), descriptor)
            return _Followed()

        self._followed_by += 1
        self._in_thread(follow)

    def _interrupted(self) -> bool:
        """Stop the job, or kill it; whether to leave it."""
        self._interrupts += 1
        if self._interrupts > _KILL:
            return True
        if self._job is not None:
            self._stop(self._job.id)
        return False

    def _stop(self, job_id: int) -> None:
        grace = self._arguments.grace if self._interrupts == _STOP else 0
        if self._interrupts == _STOP:
            after = "its grace period" if grace is None else f"{grace:g} s"
            _tell(f"stopping job {job_id}: SIGKILL after {after}, or with another Ctrl-C")
        else:
            _tell(f"killing job {job_id}: another Ctrl-C leaves it to itself")

        def stop() -> None:
            try:
                self._client.stop(job_id, grace=grace)
            except PjwError as error:
                complain(error)

        threading.Thread(target=stop, daemon=True).start()

    def _in_thread(self, work: Callable[[], Event]) -> None:
        def report() -> None:
            try:
                self._events.put(work())
            except Exception as error:  # noqa: BLE001  raised again, by the main thread
                self._events.put(error)

        # daemons: whoever leaves does not wait for them
        threading.Thread(target=report, daemon=True).start()


def _ended(job: Job) -> int:
    if job.reason in _WHY:
        print(f"pjw: job {job.id} was killed: {_WHY[job.reason]}", file=sys.stderr)
    return exit_code_of_job(job)


def _tell(words: str) -> None:
    """A line for a person who has just typed ^C."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), f"\npjw: {words}\n".encode())


@contextmanager
def _interrupts_into(events: "SimpleQueue[Event]") -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        # the one thing that is safe wherever the main thread is at this moment
        events.put(_Interrupt())

    # one that is ignored stays so: a shell starts what is in its background like that
    caught = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
