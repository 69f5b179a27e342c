"""Signals and the results of threads, as events in one queue, for commands that follow a job."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Final

# Windows has none
HANGUP: Final = getattr(signal, "SIGHUP", None)


class Interrupt:
    """The user typed Ctrl-C, ended us with SIGTERM, or closed our terminal (SIGHUP)."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number: Final = signal_number


def in_thread(events: "SimpleQueue[Any]", work: Callable[[], object]) -> None:
    """Run *work* in a thread, and put its result into the queue, or the error that it raises."""

    def report() -> None:
        try:
            events.put(work())
        except Exception as error:  # noqa: BLE001  raised again, by the main thread
            events.put(error)

    # daemons: a user who leaves does not wait for them
    threading.Thread(target=report, daemon=True).start()


@contextmanager
def interrupts_into(events: "SimpleQueue[Any]", *more: int | None) -> Iterator[None]:
    """Put an event into the queue for each signal that arrives; for *more* than those that end programs.

    Python's signal handler in C writes each signal to a socket, and a thread reads them there. A handler in
    Python runs only when the main thread runs. A signal does not always end the main thread's wait: the
    signal may arrive just before the wait, or in another thread.
    """
    # an ignored signal stays so: a shell starts its background commands like that
    numbers = (signal.SIGINT, signal.SIGTERM, HANGUP, *more)
    caught = [n for n in numbers if n is not None and signal.getsignal(n) is not signal.SIG_IGN]
    # not a pipe: not every system can make its writes non-blocking
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def report() -> None:
        with reader:
            while signals := reader.recv(64):
                for number in signals:
                    events.put(Interrupt(number))

    threading.Thread(target=report, daemon=True).start()
    former = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former)
        writer.close()
