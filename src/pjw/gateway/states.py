"""The life of a placement, a job on its way to a node and there, as a table. docs/cluster.md draws it.

The order of truth: the final record of the node, then the claim at the gateway. An engine decides nothing but
which node may claim.
"""

from enum import StrEnum
from typing import Final


class PlacementState(StrEnum):
    """Where a job of the gateway is."""

    # no node has it
    QUEUED = "queued"
    # a node has it, and nobody else gets it; whether its command was executed is not known yet
    CLAIMED = "claimed"
    # its command was executed
    RUNNING = "running"
    ENDED = "ended"
    # its node was not heard of for too long, or knows nothing of it any more
    LOST = "lost"

    @property
    def final(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self in (PlacementState.ENDED, PlacementState.LOST)


class PlacementEvent(StrEnum):
    """What can happen to a placement."""

    # a node claims the job; the gateway decides by a compare-and-swap
    CLAIM = "claim"
    # somebody stopped it before a node had it
    CANCELLED = "cancelled"
    # of the node: executed, told again after each break
    STARTED = "started"
    # of the node: not executed, and it may be elsewhere
    PUT_BACK = "put_back"
    # of the node: it can never be executed
    START_FAILED = "start_failed"
    # of the node: it has no such job, and never starts it
    UNKNOWN = "unknown"
    # of the node: its final record
    END_SEEN = "end_seen"
    # nobody has heard of the node for too long
    NODE_LOST = "node_lost"


_S = PlacementState
_E = PlacementEvent

# A pair that is not here changes nothing: it is old news, or none of the gateway's. What is final stays so:
# the end of a job that is LOST is kept beside it, and no more. UNKNOWN puts a claimed job back, for a node
# writes its row before it starts anything; of a running one it means that the node's table is gone.
TRANSITIONS: Final[dict[tuple[PlacementState, PlacementEvent], PlacementState]] = {
    (_S.QUEUED, _E.CLAIM): _S.CLAIMED,
    (_S.QUEUED, _E.CANCELLED): _S.ENDED,
    (_S.CLAIMED, _E.STARTED): _S.RUNNING,
    (_S.CLAIMED, _E.PUT_BACK): _S.QUEUED,
    (_S.CLAIMED, _E.UNKNOWN): _S.QUEUED,
    (_S.CLAIMED, _E.START_FAILED): _S.ENDED,
    # before the news of the start, as a short job may have it
    (_S.CLAIMED, _E.END_SEEN): _S.ENDED,
    (_S.CLAIMED, _E.NODE_LOST): _S.LOST,
    (_S.RUNNING, _E.UNKNOWN): _S.LOST,
    (_S.RUNNING, _E.END_SEEN): _S.ENDED,
    (_S.RUNNING, _E.NODE_LOST): _S.LOST,
}

# The events of which only the node that has the job may tell.
OF_THE_NODE: Final = frozenset({_E.STARTED, _E.PUT_BACK, _E.START_FAILED, _E.UNKNOWN, _E.END_SEEN})


def after(state: PlacementState, event: PlacementEvent) -> PlacementState | None:
    """The state after *event*; None when it changes nothing."""
    return TRANSITIONS.get((state, event))


def before(event: PlacementEvent) -> frozenset[PlacementState]:
    """The states in which *event* changes something."""
    return frozenset(state for state, each in TRANSITIONS if each is event)
