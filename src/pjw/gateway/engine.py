"""What decides which node may claim a job. It knows the uuid and the shape of the job, and its client."""

from typing import Protocol

from pjw.gateway.nodes import Node, Shape


class Engine(Protocol):
    """Where jobs wait for a node. Whatever it does, a job is claimed once: rows.claim decides that."""

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """A job wants a node. It may be submitted again, when a node could not have it."""

    def cancel(self, uuid: str) -> None:
        """A job wants no node any more, or has none any more."""

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape) -> None:
        """A node has claimed a job: also in a life of the gateway before this one."""

    def may_claim(self, uuid: str, node: Node) -> bool:
        """Whether a node may claim a job."""

    def started(self, node: Node) -> None:
        """A node has started a job."""

    def refused(self, uuid: str, node: Node) -> None:
        """A node could not start a job, for a reason of its own."""

    def why(self, uuid: str) -> str:
        """Why a job waits, in words."""

    def look(self) -> None:
        """A node has come, or has room: see who is next."""

    def session_over(self, node: Node) -> None:
        """A node has gone, and claims nothing that was assigned to it."""
