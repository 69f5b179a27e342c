"""Tells nodes of stops: notes a stop in the table first, and tells the node until it has heard of it."""

import logging
from typing import Final

from pjw.errors import JobNotFoundError, PjwError, ServerUnreachableError
from pjw.gateway.dial import Dial
from pjw.gateway.nodes import Node
from pjw.gateway.placement_states import PlacementState
from pjw.gateway.placements import Placed
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.tasks import Background

log: Final = logging.getLogger(__name__)


class Stops:
    """The stops of which the gateway tells nodes."""

    def __init__(self, dial: Dial, background: Background) -> None:
        self._dial: Final = dial
        self._background: Final = background

    def tell(self, placed: Placed, node: Node, *, again: bool = False) -> None:
        """Tell a node to stop a job, if a client asked for that and the node runs the job.

        The end comes by the session, as any other. If the node goes away meanwhile, it says in its next
        session that it runs the job, and we tell it once more. *again*: with another signal, or a shorter
        grace.
        """
        placement = placed.placement
        if (
            placement.stop_signal is None
            or placement.state is not PlacementState.RUNNING
            or node.session is None
            or (placed.stop_told is node.session and not again)
        ):
            return
        placed.stop_told = node.session
        self._background.spawn(self._tell(placed, node))

    def revoke(self, placed: Placed, node: Node) -> None:
        """Tell a node to stop a job whose place the engine took back.

        Nothing is noted for it: if the node goes away meanwhile, the engine finds the place gone once more.
        """
        if (
            placed.placement.state is PlacementState.RUNNING
            and node.session is not None
            and placed.stop_told is not node.session
        ):
            log.warning("job %d is stopped: the engine took its place back", placed.job.id)
            placed.stop_told = node.session
            self._background.spawn(self._tell(placed, node))

    async def _tell(self, placed: Placed, node: Node) -> None:
        placement = placed.placement
        request = pb.StopRequest(id=placement.node_job_id, signal=placement.stop_signal or 0)
        if placement.stop_grace is not None:
            request.grace.FromNanoseconds(round(placement.stop_grace * 1e9))
        try:
            await self._dial.call(node, "Stop", request, placed.job.client_name)
        except (ServerUnreachableError, JobNotFoundError):
            # the node hears of the stop when it is back; or it has told the end, and forgotten the job
            pass
        except PjwError as error:
            log.warning("node %s does not stop job %d: %s", node.row.name, placed.job.id, error)
