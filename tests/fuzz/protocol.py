"""The messages between worker and launcher: any datagram is a message, to the letter, or a ProtocolError."""

from dataclasses import fields
from typing import Any

from pjw.errors import ProtocolError
from pjw.launcher import protocol
from pjw.launcher.dispatch import ROUTES
from pjw.model import GpuOffer, GroupUse, Limits, MountSource, Share, Sums, Usage

_EXAMPLES: dict[Any, Any] = {
    int: 1,
    str: "/a",
    bool: True,
    tuple[int, ...]: (1, 2),
    tuple[str, ...]: ("/a", "/b"),
    tuple[MountSource, ...]: (MountSource("data", "/a/b", clients=("alice", "team-*")),),
    GpuOffer: GpuOffer("a.example/gpu", ("/a",), ("alice",)),
    tuple[protocol.Measurement, ...]: (protocol.Measurement(1, 2, 3, 4, 5, 6, 7),),
    Limits: Limits(),
    Usage: Usage(),
    Share: Share(200, Sums(2**30, 100, 1000)),
    Sums: Sums(2**30, 100, 1000),
    GroupUse: GroupUse(1, 2, 3),
}


def seeds() -> list[bytes]:
    """One of each message."""
    classes = (protocol.REQUESTS | protocol.REPLIES).values()
    return [protocol.encode(1, cls(**{f.name: _EXAMPLES[f.type] for f in fields(cls)})) for cls in classes]


def one_input(data: bytes) -> None:
    """Read it in both directions; what can be read comes back from what is written for it."""
    for decode in (protocol.decode_request, protocol.decode_reply):
        try:
            seq, message = decode(data)
        except ProtocolError:
            continue
        again = protocol.encode(seq, message)
        assert decode(again) == (seq, message)
        assert (message.op in ROUTES) == (decode is protocol.decode_request)
