"""Messages and model say the same: each field goes both ways, and none can be forgotten in one of them."""

from dataclasses import fields
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjw.errors import InvalidJobError
from pjw.model import EndReason, ExitStatus, Job, JobSpec, JobState, Limits, Usage
from pjw.rpc.convert import (
    job_from_message,
    job_to_message,
    logs_response_bytes,
    logs_response_head,
    spec_from_message,
    spec_to_message,
)
from pjw.v1 import job_worker_pb2 as pb

NUMBER = st.integers(0, 2**62)
LIMIT = st.integers(2**21, 2**62)
TIME = st.integers(0, 2**37).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
STATUS = st.builds(ExitStatus, st.integers(0, 255)) | st.builds(ExitStatus, st.none(), st.integers(1, 64))
JOB = st.builds(
    Job,
    id=st.integers(1, 2**63 - 1),
    client_name=TEXT,
    command=TEXT,
    state=st.sampled_from(JobState),
    limits=st.builds(Limits, **{field.name: LIMIT for field in fields(Limits)}),
    start=TIME,
    end=st.none() | TIME,
    exit_status=st.none() | STATUS,
    reason=st.none() | st.sampled_from(EndReason),
    usage=st.none() | st.builds(Usage, **{field.name: NUMBER for field in fields(Usage)}),
)


@given(JOB)
def test_a_job_comes_back_as_it_was(job: Job) -> None:
    """Every field of every job survives the wire."""
    data = job_to_message(job).SerializeToString()
    assert job_from_message(pb.Job.FromString(data)) == job


@given(
    TEXT | st.lists(TEXT, min_size=1, max_size=5).map(tuple),
    st.dictionaries(st.sampled_from(fields(Limits)), NUMBER),
)
def test_a_spec_comes_back_as_it_was(command: str | tuple[str, ...], limits: dict[object, int]) -> None:
    """A shell command stays one, an argv stays one, and only the limits that were set are set."""
    named = {getattr(field, "name"): value for field, value in limits.items()}  # noqa: B009
    try:
        spec = JobSpec(command, named)
    except InvalidJobError:
        return  # blank
    back = spec_from_message(pb.StartRequest.FromString(spec_to_message(spec).SerializeToString()))
    assert back == spec


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_each_limit_alone_is_told_from_unset(name: str) -> None:
    """0 is "no limit", which is not the same as "the server's default"."""
    for value in (0, 2**40):
        back = spec_from_message(spec_to_message(JobSpec("x", {name: value})))
        assert back.limits == {name: value}
    assert spec_from_message(spec_to_message(JobSpec("x"))).limits == {}


@pytest.mark.parametrize(("message", "model"), [(pb.Limits, Limits), (pb.Usage, Usage)])
def test_message_and_model_have_the_same_fields(
    message: type[pb.Limits | pb.Usage], model: type[Limits | Usage]
) -> None:
    """A limit or account that is added on one side must be added on the other."""
    assert [field.name for field in message.DESCRIPTOR.fields] == [field.name for field in fields(model)]


def test_a_client_says_what_to_run_and_no_more() -> None:
    """No environment, user, path or namespace comes from a client: root would have to read it."""
    assert {field.name for field in pb.StartRequest.DESCRIPTOR.fields} == {"command", "argv", "limits"}
    assert {field.name for field in fields(JobSpec)} == {"command", "limits"}


def test_every_state_and_reason_has_its_number() -> None:
    """Names on the wire are those of the model, and 0 stays "unspecified"."""
    assert pb.JobState.keys() == ["JOB_STATE_UNSPECIFIED", *(f"JOB_STATE_{state.name}" for state in JobState)]
    assert pb.EndReason.keys() == [
        "END_REASON_UNSPECIFIED",
        *(f"END_REASON_{reason.name}" for reason in EndReason),
    ]


def test_a_running_job_has_no_end_and_no_code_on_the_wire() -> None:
    """Absent, not zero: 0 is an exit code, and 1970 a time."""
    message = job_to_message(Job(1, "a", "x", JobState.RUNNING, Limits(), datetime.now(UTC)))
    assert not any(message.HasField(name) for name in ("end", "exit_code", "signal", "usage"))
    ended = Job(1, "a", "x", JobState.EXITED, Limits(), datetime.now(UTC), datetime.now(UTC), ExitStatus(0))
    assert job_to_message(ended).HasField("exit_code")


@pytest.mark.parametrize(
    "request_", [pb.StartRequest(), pb.StartRequest(limits=pb.Limits(pids_max=5))], ids=["empty", "limits"]
)
def test_a_request_for_nothing_is_refused(request_: pb.StartRequest) -> None:
    """Neither a command nor an argv."""
    with pytest.raises(InvalidJobError, match="the command is empty"):
        spec_from_message(request_)


def test_a_state_of_a_newer_server_is_an_error() -> None:
    """A state that this client does not know is not shown as another."""
    with pytest.raises(ValueError, match="unknown state 99 of job 5"):
        job_from_message(pb.Job(id=5, state=99))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 16_383, 16_384, 65_536, 262_144, 2**21 - 1, 2**21])
def test_a_head_and_its_bytes_are_what_protobuf_serializes(count: int) -> None:
    """To the byte, where the length takes one digit more too; and how many there are is seen from outside."""
    message = logs_response_head(count) + b"x" * count
    assert message == pb.LogsResponse(data=b"x" * count).SerializeToString()
    assert logs_response_bytes(message) == count
