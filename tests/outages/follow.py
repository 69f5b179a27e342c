"""A live follower of a job that writes numbered lines: what it has seen, and when it saw nothing."""

import os
import threading
import time
from typing import Final

from tests.support.service import CALL_SECONDS, Service

# A line twenty times a second, until it is told to end.
COUNT: Final = (
    # the shell would say that the sleep was terminated
    "exec 2>/dev/null; trap 'echo end; exit 0' TERM;"
    " i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done"
)


def numbered(data: bytes) -> bool:
    """Whether these are the lines from the first on, without a gap; the last may be a part of a line."""
    lines = data.removesuffix(b"end\n").split(b"\n")
    whole = [b"line %d" % (number + 1) for number in range(len(lines))]
    return lines[:-1] == whole[:-1] and whole[-1].startswith(lines[-1])


class Follow(threading.Thread):
    """`pjw logs` of a job, read as it comes."""

    def __init__(self, gateway: Service, job_id: int, client: str = "alice") -> None:
        super().__init__()
        self._logs: Final = gateway.popen("logs", str(job_id), client=client)
        self._came: Final = threading.Condition()
        self.data = b""
        self._at: Final[list[float]] = []
        self.start()

    def run(self) -> None:
        """Read until the end."""
        assert self._logs.stdout is not None
        descriptor = self._logs.stdout.fileno()
        while piece := os.read(descriptor, 65536):
            with self._came:
                self.data += piece
                self._at.append(time.monotonic())
                self._came.notify_all()

    def await_lines(self, more: int) -> None:
        """Wait for so many lines more than it has now."""
        with self._came:
            wanted = self.data.count(b"\n") + more
            assert self._came.wait_for(lambda: self.data.count(b"\n") >= wanted, CALL_SECONDS), self.data

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit code, and what it said."""
        assert self._logs.stderr is not None
        with self._logs:
            code = self._logs.wait(CALL_SECONDS)
            self.join()
            return code, self._logs.stderr.read().decode()

    @property
    def gap(self) -> float:
        """The longest time without a byte, between the first and the last."""
        return max(after - before for before, after in zip(self._at[:-1], self._at[1:], strict=True))
