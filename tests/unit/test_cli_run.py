"""`pjw run`: what becomes of a signal."""

import os
import signal
import threading
from pathlib import Path
from queue import SimpleQueue

from pjw.cli.interrupts import Interrupt, interrupts_into
from pjw.cli.run import Event
from tests.support.service import wait_for


def test_a_signal_that_does_not_wake_the_main_thread_is_seen() -> None:
    """One that comes just before a wait does not end it, nor does one that another thread takes."""
    events: SimpleQueue[Event] = SimpleQueue()
    seen: list[Event] = []
    read, write = os.pipe()
    main = threading.get_native_id()

    def interrupt() -> None:
        try:
            wait_for(lambda: "pipe_read" in Path(f"/proc/self/task/{main}/wchan").read_text())
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            seen.append(events.get(timeout=10))
        finally:
            os.close(write)

    # a shell that starts the tests in its background has it ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGINT)
    with interrupts_into(events):
        thread = threading.Thread(target=interrupt)
        thread.start()
        os.read(read, 1)
        thread.join()
    os.close(read)
    [event] = seen
    assert isinstance(event, Interrupt)
    assert event.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, inherited)
