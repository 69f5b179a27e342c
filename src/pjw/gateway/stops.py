"""Tells nodes of stops: a stop is noted in the table first, and told until the node has heard of it."""

import logging
from typing import Final

from pjw.errors import JobNotFoundError, PjwError, ServerUnreachableError
from pjw.gateway.dial import Dial
from pjw.gateway.jobs import Placed
from pjw.gateway.nodes import Node
from pjw.gateway.states import PlacementState
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.background import Background

log: Final = logging.getLogger(__name__)


class Stops:
    """The stops that nodes are being told of."""

    def __init__(self, dial: Dial, background: Background) -> None:
        self._dial: Final = dial
        self._background: Final = background

    def tell(self, placed: Placed, node: Node, *, again: bool = False) -> None:
        """Tell a node to stop a job, if that was asked for and the node runs it.

        The end comes by the session, as any other. A node that goes away meanwhile tells that it runs the job
        in its next session, and then it is told once more. *again*: with another signal, or a shorter grace.
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

    async def _tell(self, placed: Placed, node: Node) -> None:
        placement = placed.placement
        request = pb.StopRequest(id=placement.node_job_id, signal=placement.stop_signal or 0)
        if placement.stop_grace is not None:
            request.grace.FromNanoseconds(round(placement.stop_grace * 1e9))
        try:
            await self._dial.call(node, "Stop", request, placed.job.client_name)
        except (ServerUnreachableError, JobNotFoundError):
            # it hears of it when it is back; or it has told the end, and forgotten the job
            pass
        except PjwError as error:
            log.warning("node %s does not stop job %d: %s", node.row.name, placed.job.id, error)
