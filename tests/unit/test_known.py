"""Requests with fields that this version does not know are refused, wherever the field is."""

import pytest

from pjw.errors import InvalidJobError
from pjw.rpc.status import require_known
from pjw.v1 import job_worker_pb2 as pb

NEWER = b"\x98\x3f\x01"  # field 1011, a varint


def newer(message: pb.StartRequest) -> pb.StartRequest:
    """The same message with a field that no version has."""
    return pb.StartRequest.FromString(message.SerializeToString() + NEWER)


START = pb.StartRequest(
    argv=pb.Argv(arguments=["true"]), limits=pb.Limits(pids_max=3), env={"A": "b"}, labels={"": ""}
)
LIMITS = pb.Limits.FromString(NEWER)


@pytest.mark.parametrize(
    ("request_", "of"),
    [
        (newer(START), "StartRequest"),
        (pb.StartRequest(command="true", limits=LIMITS), "Limits"),
        (
            pb.SubmitRequest(jobs=[pb.QueuedJob(start=START), pb.QueuedJob(start=newer(START))]),
            "StartRequest",
        ),
        (pb.ExecRequest(archive=pb.Archive.FromString(NEWER)), "Archive"),
    ],
)
def test_a_newer_field_is_refused(request_: pb.StartRequest, of: str) -> None:
    """At the top, in a message, in one of a list, in a choice."""
    with pytest.raises(InvalidJobError, match=f"^this server does not know field 1011 of {of}$") as caught:
        require_known(request_)
    assert caught.value.hint


def test_what_is_known_is_let_through() -> None:
    """Also an empty request, and maps, which are messages too."""
    for request in (pb.StartRequest(), START, pb.SubmitRequest(jobs=[pb.QueuedJob(start=START)])):
        require_known(request)
