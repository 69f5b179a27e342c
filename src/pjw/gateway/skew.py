"""Nodes of other versions: which ones a gateway takes, and what an older one does not know."""

import re
from typing import Final

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import JobStateError
from pjw.version import version

# The methods of a node that does not list them, as the first nodes did not.
_FIRST_METHODS: Final = frozenset(
    {"Get", "Wait", "Stop", "Logs", "Delete", "GetUsageHistory", "GetQuota", "WatchUsage"}
)
_MINOR: Final = re.compile(r"(\d+)\.(\d+)")


def require_no_newer(hello: pb.Hello, own: str | None = None) -> None:
    """Raise JobStateError for a node of a newer minor version, which may rely on what we do not know."""
    own = own or version()
    theirs, ours = _minor(hello.version), _minor(own)
    if theirs and ours and theirs > ours:
        raise JobStateError(
            f"node {hello.node} has version {hello.version}, and its gateway has {own}, which is older",
            hint="upgrade the gateway first, then its nodes",
        )


def _minor(text: str) -> tuple[int, int] | None:
    found = _MINOR.match(text)
    return (int(found[1]), int(found[2])) if found else None


def methods_of(hello: pb.Hello) -> frozenset[str]:
    """Return what a node lets its gateway call."""
    return frozenset(hello.methods) or _FIRST_METHODS


def require_method(name: str, hello: pb.Hello, method: str) -> None:
    """Raise JobStateError when a node is of a version that does not know a method of its gateway."""
    if method not in methods_of(hello):
        raise JobStateError(
            f"node {name} has version {hello.version}, which does not know {method} of a gateway",
            hint="the operator can upgrade that node; its jobs go on meanwhile",
        )
