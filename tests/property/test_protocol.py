"""The messages between worker and launcher: decode undoes encode, and garbage raises only ProtocolError."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjw.errors import ProtocolError
from pjw.launcher import protocol
from pjw.launcher.protocol import (
    MAX_JOB_IDS,
    MAX_MEASURED,
    REPLIES,
    REQUESTS,
    Measurement,
    decode_reply,
    decode_request,
    encode,
)
from pjw.model import (
    LIMIT_MAXIMUM,
    LIMIT_MINIMUM,
    SUM_MINIMUM,
    WEIGHT_MAXIMUM,
    GpuOffer,
    GroupUse,
    Limits,
    MountSource,
    Share,
    Sums,
    Usage,
)

numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
limits = st.builds(
    Limits,
    **{f.name: st.just(0) | st.integers(LIMIT_MINIMUM.get(f.name, 1), LIMIT_MAXIMUM) for f in fields(Limits)},
)
measurements = st.builds(Measurement, **{f.name: numbers for f in fields(Measurement)})
usages = st.builds(Usage, **{f.name: numbers for f in fields(Usage)})
sums = st.builds(
    Sums, **{name: st.just(0) | st.integers(least, LIMIT_MAXIMUM) for name, least in SUM_MINIMUM.items()}
)
BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: numbers,
    str: texts,
    bool: st.booleans(),
    tuple[int, ...]: st.lists(numbers, max_size=50).map(tuple),
    tuple[str, ...]: st.lists(texts, max_size=10).map(tuple),
    tuple[MountSource, ...]: st.lists(
        st.builds(
            MountSource,
            st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,62}", fullmatch=True),
            st.from_regex(r"(/[^/.\0]{1,20}){1,5}", fullmatch=True),
            st.booleans(),
            st.lists(st.sampled_from(["*", "alice", "team-*"]), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    GpuOffer: st.builds(
        GpuOffer,
        st.sampled_from(["", "nvidia.com/gpu", "a.example/b-c"]),
        st.lists(st.from_regex(r"(/[^/.\0]{1,20}){1,5}", fullmatch=True), max_size=3).map(tuple),
        st.lists(st.sampled_from(["*", "alice", "team-*"]), max_size=3).map(tuple),
    ),
    tuple[Measurement, ...]: st.lists(measurements, max_size=MAX_MEASURED).map(tuple),
    Limits: limits,
    Usage: usages,
    Sums: sums,
    Share: st.builds(Share, weight=st.integers(1, WEIGHT_MAXIMUM), sums=sums),
    GroupUse: st.builds(GroupUse, **{f.name: numbers for f in fields(GroupUse)}),
}


def messages(classes: dict[str, type[Any]]) -> st.SearchStrategy[Any]:
    """Any message of these classes."""
    return st.one_of(
        *(st.builds(cls, **{f.name: BY_TYPE[f.type] for f in fields(cls)}) for cls in classes.values())
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
DECODERS = (decode_request, decode_reply)


@given(seq=numbers, request=messages(REQUESTS))
def test_requests_come_back(seq: int, request: protocol.Request) -> None:
    """Every request that can be made is read as what it was."""
    assert decode_request(encode(seq, request)) == (seq, request)


@given(seq=numbers, reply=messages(REPLIES))
def test_replies_come_back(seq: int, reply: protocol.Reply) -> None:
    """Every reply that can be made is read as what it was."""
    assert decode_reply(encode(seq, reply)) == (seq, reply)


@given(request=messages(REQUESTS), reply=messages(REPLIES))
def test_a_request_is_no_reply(request: protocol.Request, reply: protocol.Reply) -> None:
    """The two directions share no message."""
    with pytest.raises(ProtocolError):
        decode_reply(encode(1, request))
    with pytest.raises(ProtocolError):
        decode_request(encode(1, reply))


def rejected_or_read(decode: Callable[[bytes], tuple[int, Any]], data: bytes) -> None:
    """Nothing but ProtocolError comes out of it; what is read is what its bytes say, member by member."""
    try:
        seq, message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(seq, message)) == (seq, message)


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    """Any bytes."""
    for decode in DECODERS:
        rejected_or_read(decode, data)


@given(json_values)
def test_any_json(value: object) -> None:
    """Any JSON."""
    for decode in DECODERS:
        rejected_or_read(decode, json.dumps(value).encode())


@given(
    message=messages(REQUESTS | REPLIES),
    name=st.sampled_from(["op", "seq", "job_id", "limits", "uid", "after", "job_ids", "usage", "x"]),
    value=json_values,
)
def test_one_member_changed(message: Any, name: str, value: object) -> None:
    """A message with one member replaced or added by anything."""
    members = json.loads(encode(1, message))
    members[name] = value
    for decode in DECODERS:
        rejected_or_read(decode, json.dumps(members).encode())


@given(message=messages(REQUESTS | REPLIES), data=st.data())
def test_cut_short(message: Any, data: st.DataObject) -> None:
    """No beginning of a message is a message."""
    whole = encode(1, message)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for decode in DECODERS:
        with pytest.raises(ProtocolError):
            decode(part)


@given(message=messages(REQUESTS | REPLIES), data=st.data())
def test_one_byte_changed(message: Any, data: st.DataObject) -> None:
    """Any byte replaced by any other."""
    whole = bytearray(encode(1, message))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for decode in DECODERS:
        rejected_or_read(decode, bytes(whole))


@given(message=messages(REQUESTS | REPLIES), data=st.data())
def test_a_member_missing(message: Any, data: st.DataObject) -> None:
    """Every member is needed."""
    members = json.loads(encode(1, message))
    del members[data.draw(st.sampled_from(sorted(members)))]
    for decode in DECODERS:
        with pytest.raises(ProtocolError):
            decode(json.dumps(members).encode())


def test_the_longest_page_fits() -> None:
    """As many ids as a page may have, or measurements, each as long as it can be, are one datagram."""
    measured = protocol.Measured((Measurement(*(2**63 - 1,) * 7),) * MAX_MEASURED)
    assert decode_reply(encode(2**63 - 1, measured)) == (2**63 - 1, measured)
    page = protocol.JobIdPage((2**63 - 1,) * MAX_JOB_IDS)
    assert decode_reply(encode(2**63 - 1, page)) == (2**63 - 1, page)


def test_what_does_not_fit() -> None:
    """A message that is too large is refused where it is made, and where it is read."""
    with pytest.raises(ProtocolError, match="too large"):
        encode(1, protocol.Refused("kernel", "x" * protocol.MAX_DATAGRAM_BYTES, "", 0, ""))
    with pytest.raises(ProtocolError, match="too large"):
        decode_request(encode(1, protocol.Adopt(1)).ljust(protocol.MAX_DATAGRAM_BYTES + 1))
