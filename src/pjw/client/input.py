"""What is written to a job's stdin, between its source and the server; neither reads nor sends.

What was sent is kept until the server says that it has it: so a connection that is lost costs nothing, and
what is held is bounded.
"""

from collections import deque
from typing import Final

from pjw.client.requests import JobId, Reached, wire_id
from pjw.v1 import job_worker_pb2 as pb

WINDOW_BYTES: Final = 4 * 1024 * 1024
# The most that pjwd takes in a message: half of what 256 KiB cost is for the message.
PIECE_BYTES: Final = 1024 * 1024


class Outgoing:
    """The input of one job from its first byte on; what the server has already is passed over."""

    gone_is_done: Final = False

    def __init__(self, job_id: JobId, session: int = 0, *, append: bool = False, upload: str = "") -> None:
        """With *append* it comes behind what the server has when it is first asked.

        With the name of an *upload* it is that, and of no job.
        """
        self.job_id: Final = 0 if upload else wire_id(job_id)
        self.facts: Final = {} if upload else {"job_id": self.job_id}
        self.first: Final = pb.WriteInputRequest(id=self.job_id, session=session, upload=upload)
        # what the source has given, and what the server has of it
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
        """How far it has got, and a next step."""
        if self.first.upload:
            return f" after {self.acknowledged} bytes of the upload", "nothing has been started: try again"
        return (
            f" after {self.acknowledged} bytes of input",
            f"job {self.job_id} waits for the rest of its input, or for a stop",
        )

    def give(self, data: bytes) -> None:
        """Take what the source has next."""
        known = self.acknowledged - self.given
        self.given += len(data)
        if known > 0:
            data = data[known:]
        for start in range(0, len(data), PIECE_BYTES):
            self._pieces.append(data[start : start + PIECE_BYTES])

    def complete(self) -> None:
        """The source has no more."""
        self._complete = True

    def acknowledge(self, answer: pb.WriteInputResponse) -> None:
        """The server has so much: that is kept no longer."""
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
        """What is to be sent when all before the offset *sent* was; None when there is nothing yet."""
        offset = self.acknowledged
        for piece in self._pieces:
            if offset >= sent:
                return pb.WriteInputRequest(offset=offset, data=piece)
            offset += len(piece)
        return pb.WriteInputRequest(offset=max(offset, sent), end=True) if self._complete else None
