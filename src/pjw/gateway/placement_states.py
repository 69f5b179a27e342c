"""The life of a placement, a job on its way to a node and there, as a table. docs/cluster.md draws it.

The node's final record is the first source of truth, and the claim at the gateway the second. An engine
decides only which node may claim.
"""

from enum import StrEnum
from typing import Final


class PlacementState(StrEnum):
    """Where a job of the gateway is."""

    # no node has it
    QUEUED = "queued"
    # a node has it, and no other node gets it; it is not known yet whether its command was executed
    CLAIMED = "claimed"
    # its command was executed
    RUNNING = "running"
    ENDED = "ended"
    # the gateway heard nothing of its node for too long, or the node knows nothing of it any more
    LOST = "lost"

    @property
    def final(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self in (PlacementState.ENDED, PlacementState.LOST)


class PlacementEvent(StrEnum):
    """The events in the life of a placement."""

    # a node claims the job; the gateway decides by a compare-and-swap
    CLAIM = "claim"
    # a client stopped it before a node had it
    CANCELLED = "cancelled"
    # the node says: executed; it says so again after each break
    STARTED = "started"
    # the node says: not executed; another node may get it
    PUT_BACK = "put_back"
    # the node says: it can never be executed
    START_FAILED = "start_failed"
    # the node says: it has no such job, and never starts it
    UNKNOWN = "unknown"
    # the node sends its final record
    END_SEEN = "end_seen"
    # the gateway heard nothing of the node for too long
    NODE_LOST = "node_lost"


_S = PlacementState
_E = PlacementEvent

# A pair that is not here changes nothing: it is old news, or about no job of the gateway. Final states stay:
# the gateway only keeps the late end of a LOST job with it. UNKNOWN puts a claimed job back, since a node
# writes its row before it starts anything. For a running job UNKNOWN means that the node's table is gone.
TRANSITIONS: Final[dict[tuple[PlacementState, PlacementEvent], PlacementState]] = {
    (_S.QUEUED, _E.CLAIM): _S.CLAIMED,
    (_S.QUEUED, _E.CANCELLED): _S.ENDED,
    (_S.CLAIMED, _E.STARTED): _S.RUNNING,
    (_S.CLAIMED, _E.PUT_BACK): _S.QUEUED,
    (_S.CLAIMED, _E.UNKNOWN): _S.QUEUED,
    (_S.CLAIMED, _E.START_FAILED): _S.ENDED,
    # a short job may end before the news of its start arrive
    (_S.CLAIMED, _E.END_SEEN): _S.ENDED,
    (_S.CLAIMED, _E.NODE_LOST): _S.LOST,
    (_S.RUNNING, _E.UNKNOWN): _S.LOST,
    (_S.RUNNING, _E.END_SEEN): _S.ENDED,
    (_S.RUNNING, _E.NODE_LOST): _S.LOST,
}

# Only the node that has the job may send these events.
OF_THE_NODE: Final = frozenset({_E.STARTED, _E.PUT_BACK, _E.START_FAILED, _E.UNKNOWN, _E.END_SEEN})


def after(state: PlacementState, event: PlacementEvent) -> PlacementState | None:
    """Return the state after *event*; None when it changes nothing."""
    return TRANSITIONS.get((state, event))


def before(event: PlacementEvent) -> frozenset[PlacementState]:
    """Return the states in which *event* changes something."""
    return frozenset(state for state, each in TRANSITIONS if each is event)
