"""Jobs that wait for a node, by what they need: those of one kind fit together, or wait together.

So to look for the next job costs as much as there are kinds, and not as much as there are jobs.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Final, NamedTuple

from pjw.gateway.nodes import Shape


class Kind(NamedTuple):
    """What decides where and when a job may run."""

    client_name: str
    shape: Shape


class Waiting:
    """The jobs, in their order."""

    def __init__(self) -> None:
        # by kind: each job's place in the order of all. A dict is slow where the first goes again and again.
        self._kinds: Final[dict[Kind, OrderedDict[str, int]]] = {}
        self._kind_of: Final[dict[str, Kind]] = {}
        self._last: Final = count()
        self._first: Final = count(-1, -1)

    def __bool__(self) -> bool:
        return bool(self._kind_of)

    def of(self, uuid: str) -> Kind | None:
        """The kind of a job that waits; None of any other."""
        return self._kind_of.get(uuid)

    def add(self, uuid: str, kind: Kind) -> None:
        """A job waits, behind all others."""
        self.discard(uuid)
        self._kind_of[uuid] = kind
        self._kinds.setdefault(kind, OrderedDict())[uuid] = next(self._last)

    def put_back(self, jobs: Mapping[str, Kind]) -> None:
        """Jobs wait again, in their order, before all others."""
        for uuid, kind in reversed(list(jobs.items())):
            self.discard(uuid)
            self._kind_of[uuid] = kind
            there = self._kinds.setdefault(kind, OrderedDict())
            there[uuid] = next(self._first)
            there.move_to_end(uuid, last=False)

    def discard(self, uuid: str) -> None:
        """A job waits no more."""
        kind = self._kind_of.pop(uuid, None)
        if kind is None:
            return
        there = self._kinds[kind]
        del there[uuid]
        if not there:
            del self._kinds[kind]

    def heads(self) -> Sequence[tuple[int, Kind]]:
        """The kinds that wait, each behind the place of its first job."""
        return [(next(iter(there.values())), kind) for kind, there in self._kinds.items()]

    def first(self, kind: Kind) -> tuple[int, str] | None:
        """The first job of a kind behind its place; None when none waits."""
        there = self._kinds.get(kind)
        if there is None:
            return None
        uuid = next(iter(there))
        return there[uuid], uuid
