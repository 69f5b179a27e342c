"""The life of a job as a table. docs/architecture.md draws its diagram from it."""

from enum import StrEnum
from typing import Final

from pjw.errors import JobStateError
from pjw.model import JobState


class JobEvent(StrEnum):
    """The events in the life of a job."""

    ADMITTED = "admitted"
    PUT_BACK = "put_back"
    CANCELLED = "cancelled"
    START_FAILED = "start_failed"
    EXEC_SEEN = "exec_seen"
    STOP_ASKED = "stop_asked"
    END_SEEN = "end_seen"
    END_UNKNOWN = "end_unknown"


_S = JobState
_E = JobEvent

# A pair that is not here cannot happen. Deliberate, though they look odd: a job may be
# stopped twice, and one that is asked to stop may end by itself first. A job that was never
# seen to exec can only be lost (the host or both our processes went down in between). A
# launch that fails leaves no job at all, unless the job came out of the queue: then it is
# put back, where its command was certainly not executed and may be later, or it has ended.
TRANSITIONS: Final[dict[tuple[JobState, JobEvent], JobState]] = {
    (_S.QUEUED, _E.ADMITTED): _S.STARTING,
    (_S.QUEUED, _E.CANCELLED): _S.EXITED,
    (_S.QUEUED, _E.START_FAILED): _S.EXITED,
    (_S.STARTING, _E.PUT_BACK): _S.QUEUED,
    (_S.STARTING, _E.START_FAILED): _S.EXITED,
    (_S.STARTING, _E.EXEC_SEEN): _S.RUNNING,
    (_S.STARTING, _E.END_UNKNOWN): _S.LOST,
    (_S.RUNNING, _E.STOP_ASKED): _S.STOPPING,
    (_S.RUNNING, _E.END_SEEN): _S.EXITED,
    (_S.RUNNING, _E.END_UNKNOWN): _S.LOST,
    (_S.STOPPING, _E.STOP_ASKED): _S.STOPPING,
    (_S.STOPPING, _E.END_SEEN): _S.EXITED,
    (_S.STOPPING, _E.END_UNKNOWN): _S.LOST,
}


def transition(state: JobState, event: JobEvent) -> JobState:
    """Return the state after *event*. Raises JobStateError for a pair that cannot happen."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise JobStateError(f"a job that is {state} cannot see {event}") from None
