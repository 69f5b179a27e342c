"""Counters of a gateway for Prometheus, besides those of every pjwd (docs/monitoring.md)."""

from collections import Counter
from collections.abc import Sequence

from pjw.gateway.archiving import Archiver
from pjw.gateway.nodes import Nodes, NodeState
from pjw.gateway.placement_states import PlacementState
from pjw.gateway.placements import Placements
from pjw.worker.metrics import Series


def series_of(nodes: Nodes, placements: Placements, archiver: Archiver | None) -> Sequence[Series]:
    """Return the numbers of nodes and placements, at this moment."""
    states = Counter(node.state for node in nodes.known.values())
    placed = Counter(each.placement.state for each in placements.live.values())
    return (
        Series("pjw_nodes", "Nodes by state.", "state", {state.value: states[state] for state in NodeState}),
        Series(
            "pjw_placements",
            "Jobs that have not ended, by where they are.",
            "state",
            {state.value: placed[state] for state in PlacementState if not state.final},
        ),
        Series("pjw_claims", "Jobs that nodes have claimed.", total=placements.claims),
        Series("pjw_node_sessions", "Sessions that nodes have begun.", total=nodes.sessions),
        Series("pjw_nodes_lost", "How often a node was silent for too long.", total=nodes.lost),
        *(
            ()
            if archiver is None
            else (
                Series("pjw_archived_jobs", "Jobs whose output was archived.", total=archiver.made),
                Series("pjw_archive_failures", "How often that failed.", total=archiver.failed),
            )
        ),
    )
