"""A text file in the place of stderr, whose writes never wait.

A write to a full pipe, to a terminal that Ctrl-S has stopped or to a disk that hangs may take for ever, and
would hold up the event loop with every call. So a thread of its own writes. O_NONBLOCK does not help: it
would hold for every process that has the same terminal or pipe open (open(2), "open file description").
"""

import io
import logging
import os
import select
import threading
from queue import SimpleQueue
from typing import Final

# Records, with their tracebacks, that may wait to be written. Further ones are dropped and counted.
QUEUE_MAX: Final = 10_000
# Seconds that pjwd, when it ends, waits for the rest to be written.
END_SECONDS: Final = 2.0

log: Final = logging.getLogger(__name__)


class LogWriter(io.TextIOBase):
    """Writes text to a descriptor, in its order, from a thread that `start` starts.

    Before `start` it writes the text that it can write without waiting at once, such as the reason for a long
    start, and keeps the rest.
    """

    def __init__(self, descriptor: int) -> None:
        """Own *descriptor*, for as long as the process lives."""
        self._descriptor: Final = descriptor
        # only this queue allows a put that interrupts another one: from a signal handler, or a __del__
        self._pieces: Final[SimpleQueue[bytes]] = SimpleQueue()
        self._ending: Final = threading.Event()
        self._counting: Final = threading.RLock()
        self.lost_lines = 0
        # A daemon: a reader that never reads must not keep the process from ending.
        self._thread: Final = threading.Thread(target=self._run, name="pjw-log", daemon=True)

    def start(self) -> None:
        """Start the thread, unless it has been started."""
        if self._thread.ident is None:
            self._thread.start()

    def write(self, text: str) -> int:
        """Queue text to be written. Never waits, and never fails."""
        piece = text.encode(errors="backslashreplace")
        if self._thread.ident is None and self._pieces.empty() and self._takes_now(piece):
            self._write_whole(piece)
        elif self._pieces.qsize() < QUEUE_MAX:
            self._pieces.put(piece)
        else:
            self._lose(piece)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor that is written to."""
        return self._descriptor

    def end(self) -> None:
        """Wait until everything is written, END_SECONDS at most."""
        self._ending.set()
        self._pieces.put(b"")
        if self._thread.ident is None:
            # the thread could not be started
            self._run()
        else:
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        told = 0
        while not (self._ending.is_set() and self._pieces.empty()):
            was_taken = self._write_whole(self._pieces.get())
            # a reader that takes nothing at all would lose this line as well, and the next one about it
            if was_taken and self._pieces.empty() and (lost := self.lost_lines) > told:
                log.error("%d lines of this log were lost: nothing read them in time", lost - told)
                told = lost

    def _takes_now(self, piece: bytes) -> bool:
        # a pipe or terminal that is ready takes at least PIPE_BUF bytes (pipe(7))
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return len(piece) <= select.PIPE_BUF and bool(poll.poll(0))

    def _write_whole(self, piece: bytes) -> bool:
        """Write a piece; return whether a reader took something."""
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                # another process has set O_NONBLOCK
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                # no reader, or no space: no reader would see a message
                self._lose(piece)
                return False
        return bool(piece)

    def _lose(self, piece: bytes) -> None:
        with self._counting:
            self.lost_lines += piece.count(b"\n")
