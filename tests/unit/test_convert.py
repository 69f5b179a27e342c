"""Messages and model say the same: each field goes both ways, and none can be forgotten in one of them."""

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from pjw.errors import InvalidJobError
from pjw.model import KNOWN_STATES, EndReason, ExitStatus, Job, JobSpec, JobState, Limits, Usage, UsageSample
from pjw.rpc.convert import (
    job_from_message,
    job_to_message,
    logs_response_bytes,
    logs_response_head,
    sample_from_message,
    sample_to_message,
    since_from_message,
    spec_from_message,
    spec_to_message,
)
from pjw.v1 import job_worker_pb2 as pb

NUMBER = st.integers(0, 2**62)
LIMIT = st.integers(2**21, 2**62)
TIME = st.integers(0, 2**37).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
STATUS = st.builds(ExitStatus, st.integers(0, 255)) | st.builds(ExitStatus, signal=st.integers(1, 64))
JOB = st.builds(
    Job,
    id=st.integers(1, 2**63 - 1),
    client_name=TEXT,
    command=TEXT,
    state=st.sampled_from(KNOWN_STATES),
    limits=st.builds(Limits, **{field.name: LIMIT for field in fields(Limits)}),
    start=TIME,
    end=st.none() | TIME,
    exit_status=st.none() | STATUS,
    reason=st.none() | st.sampled_from(EndReason),
    usage=st.none() | st.builds(Usage, **{field.name: NUMBER for field in fields(Usage)}),
    name=TEXT,
    labels=st.dictionaries(TEXT, TEXT),
    split_stderr=st.booleans(),
    input=st.booleans(),
    workdir=TEXT,
    usage_now=st.none()
    | st.builds(
        UsageSample,
        time=TIME,
        **{field.name: NUMBER for field in fields(UsageSample) if field.name != "time"},
    ),
)


@given(JOB)
def test_a_job_comes_back_as_it_was(job: Job) -> None:
    """Every field of every job survives the wire."""
    data = job_to_message(job).SerializeToString()
    assert job_from_message(pb.Job.FromString(data)) == job


NAME = st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,20}\Z")


@given(
    command=TEXT | st.lists(TEXT, min_size=1, max_size=5).map(tuple),
    limits=st.dictionaries(st.sampled_from([field.name for field in fields(Limits)]), NUMBER),
    name=st.just("") | NAME,
    labels=st.dictionaries(NAME, NAME, max_size=3),
    env=st.dictionaries(st.from_regex(r"\A[A-Z_][A-Z0-9_]*\Z"), TEXT, max_size=3),
    workdir=st.sampled_from(["", "/", "/tmp"]),
    split_stderr=st.booleans(),
    input=st.booleans(),
    request_id=st.uuids().map(str),
)
def test_a_spec_comes_back_as_it_was(**members: Any) -> None:
    """A shell command stays one, an argv stays one, and only the limits that were set are set."""
    assert members.keys() == {field.name for field in fields(JobSpec)}
    try:
        spec = JobSpec(**members)
    except InvalidJobError:
        return  # blank
    back = spec_from_message(pb.StartRequest.FromString(spec_to_message(spec).SerializeToString()))
    assert back == spec


@given(st.builds(UsageSample, TIME, *[NUMBER] * 5))
def test_a_sample_comes_back_as_it_was(sample: UsageSample) -> None:
    """Every field of every sample survives the wire."""
    assert (
        sample_from_message(pb.UsageSample.FromString(sample_to_message(sample).SerializeToString()))
        == sample
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_each_limit_alone_is_told_from_unset(name: str) -> None:
    """0 is "no limit", which is not the same as "the server's default"."""
    for value in (0, 2**40):
        back = spec_from_message(spec_to_message(JobSpec("x", {name: value})))
        assert back.limits == {name: value}
    assert spec_from_message(spec_to_message(JobSpec("x"))).limits == {}


@pytest.mark.parametrize(
    ("message", "model"), [(pb.Limits, Limits), (pb.Usage, Usage), (pb.UsageSample, UsageSample)]
)
def test_message_and_model_have_the_same_fields(
    message: type[pb.Limits | pb.Usage | pb.UsageSample], model: type[Limits | Usage | UsageSample]
) -> None:
    """A limit or account that is added on one side must be added on the other."""
    assert [field.name for field in message.DESCRIPTOR.fields] == [field.name for field in fields(model)]


def test_a_client_says_what_to_run_and_no_more() -> None:
    """No user, device or namespace comes from a client; what else it says, root never reads."""
    said = {"command", "limits", "name", "labels", "env", "workdir", "split_stderr", "input", "request_id"}
    assert {field.name for field in fields(JobSpec)} == said
    assert {field.name for field in pb.StartRequest.DESCRIPTOR.fields} == {"argv", *said}


def test_every_state_and_reason_has_its_number() -> None:
    """Names on the wire are those of the model, and 0 stays "unspecified"."""
    names = [f"JOB_STATE_{state.name}" for state in KNOWN_STATES]
    assert pb.JobState.keys() == ["JOB_STATE_UNSPECIFIED", *names]
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


def test_a_killed_job_has_a_code_on_the_wire() -> None:
    """128 + the signal, so that every client sees it; an older server sends the signal alone."""
    now = datetime.now(UTC)
    killed = Job(1, "a", "x", JobState.EXITED, Limits(), now, now, ExitStatus(signal=9))
    message = job_to_message(killed)
    assert (message.exit_code, message.signal) == (137, 9)
    message.ClearField("exit_code")
    assert job_from_message(message) == killed


@pytest.mark.parametrize(
    "request_", [pb.StartRequest(), pb.StartRequest(limits=pb.Limits(pids_max=5))], ids=["empty", "limits"]
)
def test_a_request_for_nothing_is_refused(request_: pb.StartRequest) -> None:
    """Neither a command nor an argv."""
    with pytest.raises(InvalidJobError, match="the command is empty"):
        spec_from_message(request_)


def test_what_only_a_newer_server_knows_is_unknown() -> None:
    """Its jobs can be listed; a state or a reason that this client does not know is not shown as another."""
    job = job_from_message(pb.Job(id=5, state=99, reason=99))  # type: ignore[arg-type]
    assert (job.state, job.state.final, job.reason) == (JobState.UNKNOWN, False, None)
    newer = pb.Job(id=5, state=pb.JOB_STATE_RUNNING).SerializeToString() + b"\xf8\x3f\x01"
    assert job_from_message(pb.Job.FromString(newer)).state is JobState.RUNNING


@pytest.mark.parametrize("bad", [{"seconds": 2**60}, {"seconds": -(2**60)}, {"nanos": -5}])
def test_a_time_that_is_none_is_refused(bad: dict[str, int]) -> None:
    """It is the caller's fault, and no bug of the server."""
    assert since_from_message(pb.LogsRequest()) is None
    assert since_from_message(pb.LogsRequest(since=Timestamp(seconds=1, nanos=5))) == 1_000_000_005
    with pytest.raises(InvalidJobError, match="the time to begin at is none"):
        since_from_message(pb.LogsRequest(since=Timestamp(**bad)))


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 16_383, 16_384, 65_536, 262_144, 2**21 - 1, 2**21])
def test_a_head_and_its_bytes_are_what_protobuf_serializes(count: int) -> None:
    """To the byte, where the length takes one digit more too; and how many there are is seen from outside."""
    message = logs_response_head(count) + b"x" * count
    assert message == pb.LogsResponse(data=b"x" * count).SerializeToString()
    assert logs_response_bytes(message) == count
