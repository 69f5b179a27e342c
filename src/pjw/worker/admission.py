"""Whether this machine starts jobs: not while its operator has drained it (`pjwd drain`).

A drained machine starts no job. What runs goes on, and what waits in the queue waits on.
"""

from collections.abc import Callable
from typing import Final

from pjw.errors import LimitReachedError

DRAINED: Final = "the operator has drained this machine"


class Admission:
    """Whether jobs are started now, and who is told when that changes."""

    def __init__(self) -> None:
        self.drained = False
        # called when that has changed
        self.changed: Final[list[Callable[[], None]]] = []

    def set(self, *, drained: bool) -> None:
        """Start no more jobs, or start jobs again."""
        if drained != self.drained:
            self.drained = drained
            for each in self.changed:
                each()

    def require(self) -> None:
        """Raise LimitReachedError while the machine is drained."""
        if self.drained:
            raise LimitReachedError(
                f"cannot start a job: {DRAINED}",
                hint="try again later, or let the job wait for its turn: pjw start --queue",
            )
