"""The engine decides which node may claim a job. It knows the job's uuid, its shape and its client."""

from typing import Protocol

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import Node, Shape


class Engine(Protocol):
    """Jobs wait here for a node. Whatever an engine does, rows.claim lets a job be claimed once."""

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """Find a node for a job. The job may be submitted again, when its node could not start it."""

    def cancel(self, uuid: str) -> None:
        """A job needs no node any more, or no longer has one."""

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape, hold: str = "") -> None:
        """A node has claimed a job, perhaps from an earlier process of the gateway."""

    def may_claim(self, uuid: str, node: Node, hold: str = "") -> bool:
        """Whether a node may claim a job, in a place that the engine has given for it (empty: in none)."""

    def started(self, node: Node) -> None:
        """A node has started a job."""

    def refused(self, uuid: str, node: Node) -> None:
        """A node could not start a job, for a reason of its own."""

    def why(self, uuid: str) -> str:
        """Why a job waits, in words."""

    def look(self) -> None:
        """A node has come, or has room: see which job is next."""

    def session_over(self, node: Node) -> None:
        """A node has gone, and will claim none of the jobs that were assigned to it."""

    def hold_here(self, node: Node, hold: pb.Hold) -> None:
        """A node has a place that an engine gave to this gateway."""

    def hold_gone(self, node: Node, hold: str) -> None:
        """A node has such a place no longer, and stops the job that has it."""
