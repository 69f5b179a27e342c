"""The phases of a job's init in a launcher, and the worker's possible requests in each, as a table."""

from enum import StrEnum
from typing import Final

from pjw.errors import JobStateError


class InitPhase(StrEnum):
    """The phase of a job's init between its making and the last trace of it."""

    # This launcher has no init for the job. An earlier launcher's may run: the worker then asks to adopt it.
    ABSENT = "absent"
    # It was made ahead and waits for an order (pool.py).
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


def require_permitted(op: str, job_id: int, phase: InitPhase) -> None:
    """Raise JobStateError when no request *op* about a job is answered in this phase of its init."""
    if phase not in PERMITTED[op]:
        raise JobStateError(f"cannot answer the request {op}: the init of job {job_id} is {phase}")
