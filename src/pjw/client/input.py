"""The input of a job's stdin, between its source and the server; this neither reads nor sends.

Sent bytes are kept until the server acknowledges them: so a lost connection costs nothing, and the memory
used is bounded.
"""

from collections import deque
from typing import Final

from pjw.client.requests import JobId, Reached, wire_id
from pjw.v1 import job_worker_pb2 as pb

WINDOW_BYTES: Final = 4 * 1024 * 1024
# The most that pjwd takes in a message: half of the cost of 256 KiB is for the message.
PIECE_BYTES: Final = 1024 * 1024


class Outgoing:
    """The input of one job from its first byte on; bytes that the server has already are skipped."""

    gone_is_done: Final = False

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        """Begin the input of a job; with *append* it comes behind the bytes that the server already has.

        With the name of an *upload* the input is that upload, and belongs to no job.
        """
        self.job_id: Final = 0 if upload else wire_id(job_id)
        self.facts: Final = {} if upload else {"job_id": self.job_id}
        self.first: Final = pb.WriteInputRequest(id=self.job_id, session=session, upload=upload)
        # the number of bytes that the source has given, and the number that the server has
        self.given = 0
        self.acknowledged = 0
        self._appends = append
        self._complete = False
        self._pieces: Final[deque[bytes]] = deque()

    @property
    def full(self) -> bool:
        """Whether the source has to wait for the server."""
        return self.given - self.acknowledged >= WINDOW_BYTES

    @property
    def reached(self) -> Reached:
        """The progress of the input, and a next step."""
        if self.first.upload:
            return f" after {self.acknowledged} bytes of the upload", "nothing has been started: try again"
        return (
            f" after {self.acknowledged} bytes of input",
            f"job {self.job_id} waits for the rest of its input, or for a stop",
        )

    def give(self, data: bytes) -> None:
        """Take the next bytes of the source."""
        known = self.acknowledged - self.given
        self.given += len(data)
        if known > 0:
            data = data[known:]
        for start in range(0, len(data), PIECE_BYTES):
            self._pieces.append(data[start : start + PIECE_BYTES])

    def complete(self) -> None:
        """Note that the source has ended."""
        self._complete = True

    def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """Drop the bytes that the server has now."""
        if self._appends:
            self._appends = False
            self.given += answer.offset
            self.acknowledged = answer.offset
            return
        ahead = answer.offset - self.acknowledged
        while self._pieces and ahead >= len(self._pieces[0]):
            ahead -= len(self._pieces.popleft())
        if self._pieces and ahead > 0:
            self._pieces[0] = self._pieces[0][ahead:]
        self.acknowledged = max(self.acknowledged, answer.offset)

    def after(self, sent: int) -> pb.WriteInputRequest | None:
        """Return the request that follows the offset *sent*; None when there is nothing to send yet."""
        offset = self.acknowledged
        for piece in self._pieces:
            if offset >= sent:
                return pb.WriteInputRequest(offset=offset, data=piece)
            offset += len(piece)
        return pb.WriteInputRequest(offset=max(offset, sent), end=True) if self._complete else None
