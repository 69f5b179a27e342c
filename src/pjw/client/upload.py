"""Input of a job, sent by threads: the caller's takes it from its source, one of gRPC's sends it."""

import threading
from collections.abc import Callable, Iterator
from typing import Final

from pjw.client.input import Outgoing
from pjw.client.requests import JobId
from pjw.v1 import job_worker_pb2 as pb


class Upload:
    """`Outgoing` for threads: a thread that finds nothing to do waits."""

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        self.outgoing: Final = Outgoing(job_id, session, append=append, upload=upload)
        self._changed: Final = threading.Condition()
        # the number of the connection that sends, and whether its server has said where to begin
        self._connection = 0
        self._begun = False
        self._over = False
        self._failure: Exception | None = None
        self._cancel: Callable[[], object] = lambda: None

    def give(self, data: bytes) -> bool:
        """Take the next bytes of the source when there is room; return False once no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or not self.outgoing.full)
            if not self._over:
                self.outgoing.give(data)
                self._changed.notify_all()
            return not self._over

    def complete(self) -> None:
        """Note that the source has ended."""
        with self._changed:
            self.outgoing.complete()
            self._changed.notify_all()

    def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """Take the server's answer: it has so many bytes, and the bytes behind them may be sent."""
        with self._changed:
            self.outgoing.acknowledge(answer)
            self._begun = True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing is sent any more."""
        return self._over

    def on_end(self, cancel: Callable[[], object]) -> None:
        """Have the call under way cancelled at the end, whatever it waits for."""
        with self._changed:
            self._cancel = cancel
            over = self._over
        if over:
            cancel()

    def end(self, failure: Exception | None = None) -> None:
        """Send nothing any more."""
        with self._changed:
            if self._over:
                return
            self._over, self._failure = True, failure
            self._changed.notify_all()
        self._cancel()

    def result(self) -> int:
        """Wait for the end; return the number of bytes the server has. Raises the error that ended it."""
        with self._changed:
            self._changed.wait_for(lambda: self._over)
        if self._failure is not None:
            raise self._failure
        return self.outgoing.acknowledged

    def requests(self) -> Iterator[pb.WriteInputRequest]:
        """Yield the requests of a new connection until the input ends; those of the connection before end."""
        with self._changed:
            self._connection += 1
            self._begun = False
            self._changed.notify_all()
            connection = self._connection
        return self._requests(connection)

    def _requests(self, connection: int) -> Iterator[pb.WriteInputRequest]:
        request: pb.WriteInputRequest | None = self.outgoing.first
        while request is not None:
            yield request
            if request.end:
                return
            request = self._next(connection, request.offset + len(request.data))

    def _next(self, connection: int, sent: int) -> pb.WriteInputRequest | None:
        """Return the request behind the offset *sent*, once there is one; None: none on this connection."""
        with self._changed:
            while not self._over and connection == self._connection:
                request = self.outgoing.after(sent) if self._begun else None
                if request is not None:
                    return request
                self._changed.wait()
        return None
