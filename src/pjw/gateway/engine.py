"""The engine decides which node may claim a job. It knows the job's uuid, its shape and its client.

The queue (worker/queue.py) decides which job is next, and asks the engine whether there is room for that one.
So an engine gets few jobs at a time, in the order of the queue.
"""

from collections.abc import Callable
from typing import Protocol

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import Node, Shape
from pjw.model import JobSpec


class Engine(Protocol):
    """Jobs wait here for a node. Whatever an engine does, rows.claim lets a job be claimed once."""

    # called when there may be room that no end of a job has made
    freed: Callable[[], None]

    def has_room(self, shape: Shape) -> bool:
        """Whether it takes another job of this shape now, in addition to those with a reservation."""

    def check(self, spec: JobSpec) -> None:
        """Raise InvalidJobError for a job to which this engine can give no node.

        Raise NotAllowedError for one that asks for more than its client may.
        """

    def passed_over(self, shape: Shape) -> str:
        """Why a job that has no room waits, in words, when other shapes may start first; else empty."""

    def reserve(self, job_id: int, client_name: str, shape: Shape) -> None:
        """Keep the room for a job of the queue that is about to be submitted, if there is room."""

    def unreserve(self, job_id: int) -> None:
        """Forget a reservation: the job is submitted right now, or not after all. There may be none."""

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """Find a node for a job. The job may be submitted again, when its node could not start it."""

    def cancel(self, uuid: str) -> None:
        """Forget a job that needs no node any more, or no longer has one."""

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape, hold: str = "") -> None:
        """Count a job that a node has claimed, perhaps from an earlier process of the gateway."""

    def may_claim(self, uuid: str, node: Node, hold: str = "") -> bool:
        """Whether a node may claim a job, in a place that the engine has given for it (empty: in none)."""

    def started(self, node: Node) -> None:
        """Note that a node has started a job."""

    def refused(self, uuid: str, node: Node) -> None:
        """Note that a node could not start a job, for a reason of its own."""

    def why(self, uuid: str) -> str:
        """Why a job waits, in words."""

    def look(self) -> None:
        """See which job is next, since a node has come, or has room."""

    def session_over(self, node: Node) -> None:
        """Note that a node has gone, and will claim none of the jobs that were assigned to it."""

    def hold_here(self, node: Node, hold: pb.Hold) -> None:
        """Note that a node has a place that an engine gave to this gateway."""

    def hold_gone(self, node: Node, hold: str) -> None:
        """Note that a node has such a place no longer, and stops the job that has it."""
