"""Finds the first node, by its name, that has room for a job, without a look at each node for each job."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from pjw.gateway.nodes import Node, Nodes, Shape

# We forget all shapes when there are more: each has to be looked at when a node has more room.
_SHAPES_MAX: Final = 256


class Room:
    """Remembers for each shape before which node there is no room.

    That holds until a node has more room (`more`), or may get jobs again (`forget`).
    """

    def __init__(self, nodes: Nodes, gets_jobs: Callable[[Node], bool]) -> None:
        self._nodes: Final = nodes
        self._gets_jobs: Final = gets_jobs
        self._names: list[str] = []
        self._first: Final[dict[Shape, int]] = {}

    def forget(self) -> None:
        """Nodes may have come, or get jobs again."""
        self._names = sorted(self._nodes.known)
        self._first.clear()

    def fits(self, node: Node, shape: Shape) -> bool:
        """Whether a node may get a job of this shape now."""
        return self._gets_jobs(node) and node.has_room(shape)

    def find(self, shape: Shape) -> Node | None:
        """The first node that may get such a job now."""
        if shape.node:
            node = self._nodes.known.get(shape.node)
            return node if node is not None and self.fits(node, shape) else None
        if len(self._names) != len(self._nodes.known):
            self.forget()
        place = self._first.get(shape, 0)
        found = None
        while place < len(self._names):
            node = self._nodes.known.get(self._names[place])
            if node is not None and self.fits(node, shape):
                found = node
                break
            place += 1
        if len(self._first) >= _SHAPES_MAX:
            self._first.clear()
        self._first[shape] = place
        return found

    def more(self, node: Node) -> None:
        """A node has more room than before."""
        place = bisect_left(self._names, node.row.name)
        for shape, first in self._first.items():
            if place < first and self.fits(node, shape):
                self._first[shape] = place
