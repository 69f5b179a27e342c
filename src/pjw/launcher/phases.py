"""The phases of a job's init in a launcher, as tables: the changes, and the permitted requests in each."""

from enum import StrEnum
from typing import Final

from pjw.errors import JobStateError


class InitPhase(StrEnum):
    """The phase of a job's init between its making and the last trace of it."""

    # This launcher has no init for the job. An earlier launcher's may run: the worker then asks to adopt it.
    ABSENT = "absent"
    # It was made ahead and waits for an order (inits.py).
    WAITING = "waiting"
    # It got no job and is on its way out.
    DISCARDED = "discarded"
    # A launch has given it an order, or waits until the init of a wrong guess has gone.
    LAUNCHING = "launching"
    # Its launch has failed. The launcher removes the init, its cgroup and its scratch directory.
    REFUSED = "refused"
    # Its launch has failed, and the worker knows. The init, or another process in its cgroup, does not end.
    LEFT = "left"
    # Its command was executed, or the init was adopted.
    RUNNING = "running"
    # It has ended, and with it every process of the job. Its cgroup and files may be left.
    ENDED = "ended"


_P = InitPhase

# A change that is not here cannot happen. A launch that gets no init goes back: the init could not be made,
# or the one of a wrong guess did not go in time and is still on its way out.
TRANSITIONS: Final[dict[InitPhase, frozenset[InitPhase]]] = {
    _P.ABSENT: frozenset({_P.WAITING, _P.DISCARDED, _P.LAUNCHING, _P.RUNNING}),
    _P.WAITING: frozenset({_P.DISCARDED, _P.LAUNCHING}),
    _P.DISCARDED: frozenset({_P.LAUNCHING, _P.ABSENT}),
    _P.LAUNCHING: frozenset({_P.RUNNING, _P.REFUSED, _P.DISCARDED, _P.ABSENT}),
    _P.REFUSED: frozenset({_P.LEFT, _P.ABSENT}),
    _P.LEFT: frozenset({_P.ABSENT}),
    _P.RUNNING: frozenset({_P.ENDED}),
    _P.ENDED: frozenset({_P.ABSENT}),
}

_WITHOUT_JOB: Final = frozenset({_P.WAITING, _P.DISCARDED, _P.REFUSED, _P.LEFT})
_NO_LAUNCH_UNDER_WAY: Final = frozenset({_P.ABSENT, _P.RUNNING, _P.ENDED})
_HAS_HAD_A_LAUNCH: Final = frozenset(_P) - {_P.WAITING, _P.DISCARDED}

# In which phases a request about one job is answered. Elsewhere the job would look like one that has ended:
# its cgroup has no process yet, or no longer, while a launch goes on.
PERMITTED: Final[dict[str, frozenset[InitPhase]]] = {
    "launch": frozenset({_P.ABSENT, _P.WAITING, _P.DISCARDED}),
    "exec": frozenset({_P.RUNNING}),
    "connect": frozenset({_P.RUNNING}),
    "departed": frozenset(_P) - {_P.LAUNCHING, _P.REFUSED},
    "adopt": _NO_LAUNCH_UNDER_WAY,
    # nothing to signal is success: the job may have ended meanwhile
    "terminate": _HAS_HAD_A_LAUNCH,
    "kill": _HAS_HAD_A_LAUNCH,
    "remains": frozenset(_P),
    "account": frozenset({_P.ABSENT, _P.ENDED}),
    "remove": frozenset({_P.ABSENT, _P.ENDED}),
}


class Phases:
    """The phase of each init that the launcher knows: the one place where a phase changes."""

    def __init__(self) -> None:
        """Begin with no init."""
        self._of: Final[dict[int, InitPhase]] = {}

    def of(self, job_id: int) -> InitPhase:
        """Return the phase of a job's init."""
        return self._of.get(job_id, InitPhase.ABSENT)

    def move(self, job_id: int, to: InitPhase) -> None:
        """Change the phase of a job's init. Raises AssertionError for a change that TRANSITIONS lacks."""
        former = self.of(job_id)
        if to not in TRANSITIONS[former]:
            raise AssertionError(f"the init of job {job_id} cannot become {to}: it is {former}")
        if to is InitPhase.ABSENT:
            del self._of[job_id]
        else:
            self._of[job_id] = to

    def is_without_job(self, job_id: int) -> bool:
        """Whether an init got no job, and leaves with all that was made for it."""
        return self.of(job_id) in _WITHOUT_JOB

    def require_permitted(self, op: str, job_id: int) -> None:
        """Raise JobStateError when no request *op* about a job is answered in the phase of its init."""
        phase = self.of(job_id)
        if phase not in PERMITTED[op]:
            raise JobStateError(f"cannot answer the request {op}: the init of job {job_id} is {phase}")
