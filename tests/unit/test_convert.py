"""Messages and model say the same: each field goes both ways, and none can be forgotten in one of them."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from pjw.errors import InvalidJobError
from pjw.model import (
    KNOWN_STATES,
    After,
    Artifacts,
    ArtifactsState,
    Condition,
    EndReason,
    ExitStatus,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Retry,
    Session,
    TerminalSize,
    Usage,
    UsageSample,
    Workspace,
)
from pjw.rpc.convert import (
    exec_from_message,
    exec_to_message,
    job_from_message,
    job_to_message,
    logs_response_bytes,
    logs_response_head,
    queued_from_message,
    queued_to_message,
    sample_from_message,
    sample_to_message,
    session_from_message,
    session_to_message,
    since_from_message,
    spec_from_message,
    spec_to_message,
    workspace_from_message,
    workspace_to_message,
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
    queued=st.none() | TIME,
    priority=st.integers(-1000, 1000),
    not_before=st.none() | TIME,
    held=st.booleans(),
    after=st.lists(st.builds(After, st.integers(1, 2**63 - 1), st.sampled_from(Condition))).map(tuple),
    unmet=st.integers(0, 100),
    attempt=st.integers(0, 100),
    retried_as=st.none() | st.integers(1, 2**63 - 1),
    workspace=TEXT,
    exclusive=st.booleans(),
    image=TEXT,
    read_only=st.booleans(),
    mounts=st.lists(TEXT).map(tuple),
    gpus=st.integers(0, 64),
    usage_now=st.none()
    | st.builds(
        UsageSample,
        time=TIME,
        **{field.name: NUMBER for field in fields(UsageSample) if field.name != "time"},
    ),
    artifacts=st.none()
    | st.builds(
        Artifacts,
        st.sampled_from([state for state in ArtifactsState if state is not ArtifactsState.UNKNOWN]),
        st.integers(0, 2**63 - 1),
        TEXT,
        st.booleans(),
    ),
).map(lambda job: job if job.was_started or job.queued is None else replace(job, start=job.queued))


@given(JOB)
def test_a_job_comes_back_as_it_was(job: Job) -> None:
    """Every field of every job survives the wire."""
    data = job_to_message(job).SerializeToString()
    assert job_from_message(pb.Job.FromString(data)) == job


NAME = st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,20}\Z")
SLURM_NAME = st.from_regex(r"[A-Za-z0-9_.-]{1,60}", fullmatch=True)
SIZE = st.builds(TerminalSize, st.integers(1, 65_535), st.integers(1, 65_535))


@given(st.builds(Workspace, TEXT, TIME, TIME, NUMBER, NUMBER, NUMBER, TEXT))
def test_a_workspace_comes_back_as_it_was(workspace: Workspace) -> None:
    """Every field of every workspace survives the wire."""
    data = workspace_to_message(workspace).SerializeToString()
    assert workspace_from_message(pb.Workspace.FromString(data)) == workspace


@given(
    st.builds(
        Session,
        job_id=st.integers(1, 2**63 - 1),
        number=st.integers(1, 2**63 - 1),
        command=TEXT,
        state=st.sampled_from(KNOWN_STATES),
        start=TIME,
        end=st.none() | TIME,
        exit_status=st.none() | STATUS,
        reason=st.none() | st.sampled_from(EndReason),
        input=st.booleans(),
        detached=st.booleans(),
        terminal=st.booleans(),
    )
)
def test_a_session_comes_back_as_it_was(session: Session) -> None:
    """Every field of every session survives the wire."""
    data = session_to_message(session).SerializeToString()
    assert session_from_message(pb.Session.FromString(data)) == session


@given(TEXT | st.lists(TEXT, min_size=1, max_size=5).map(tuple), st.booleans(), st.none() | SIZE)
def test_another_command_comes_back_as_it_was(
    command: str | tuple[str, ...], flag: bool, size: TerminalSize | None
) -> None:
    """All that counts of it; the rest of a spec is a job's."""
    try:
        spec = JobSpec(command, env={"A": "b"}, workdir="/tmp", input=flag, request_id="r", terminal=size)
    except InvalidJobError:
        return  # blank
    message = exec_to_message(7, spec, detached=flag)
    back = pb.ExecRequest.FromString(message.SerializeToString())
    assert (exec_from_message(back), back.id, back.detach) == (spec, 7, flag)


@given(
    command=TEXT | st.lists(TEXT, max_size=5).map(tuple),
    limits=st.dictionaries(st.sampled_from([field.name for field in fields(Limits)]), NUMBER),
    name=st.just("") | NAME,
    labels=st.dictionaries(NAME, NAME, max_size=3),
    env=st.dictionaries(st.from_regex(r"\A[A-Z_][A-Z0-9_]*\Z"), TEXT, max_size=3),
    workdir=st.sampled_from(["", "/", "/tmp"]),
    split_stderr=st.booleans(),
    input=st.booleans(),
    request_id=st.uuids().map(str),
    terminal=st.none() | SIZE,
    secrets=st.dictionaries(st.from_regex(r"\Aa[a-z]*\Z"), TEXT, max_size=3),
    upload=st.just("") | st.from_regex(r"\A[0-9a-z_-]{1,64}\Z"),
    workspace=st.just("") | NAME,
    exclusive=st.booleans(),
    outputs=st.sampled_from([(), ("dist/**",), ("a b", "*.[ch]", "ü")]),
    output_required=st.booleans(),
    image=st.just("") | NAME,
    read_only=st.booleans(),
    gpus=st.integers(0, 64),
    mounts=st.sampled_from([(), ("data",), ("data:/opt", "a-b:/mnt/ü x")]),
    allow=st.sampled_from([(), ("pypi.org",), ("*.example.org:8443", "[2001:db8::1]:22")]),
    link=st.just("") | NAME,
    node=st.just("") | NAME,
    partition=st.just("") | SLURM_NAME,
    constraint=st.just("") | SLURM_NAME,
)
def test_a_spec_comes_back_as_it_was(**members: Any) -> None:
    """A shell command stays one, an argv stays one, and only the limits that were set are set."""
    assert {*members, "queue"} == {field.name for field in fields(JobSpec)}
    try:
        spec = JobSpec(**members)
    except InvalidJobError:
        return  # blank, or alone in no workspace
    back = spec_from_message(pb.StartRequest.FromString(spec_to_message(spec).SerializeToString()))
    assert back == spec


AFTER = st.lists(st.integers(1, 2**63 - 1), unique=True).map(
    lambda ids: tuple(After(job_id, list(Condition)[job_id % 3]) for job_id in ids)
)


RETRY = st.builds(
    Retry,
    st.integers(1, 100),
    st.frozensets(st.integers(1, 255)),
    oom=st.booleans(),
    timeout=st.booleans(),
    backoff_seconds=st.integers(0, 7200).map(lambda halves: halves / 2),
    if_lost=st.booleans(),
)


@given(
    st.builds(QueueSpec, st.integers(-1000, 1000), st.none() | TIME, st.booleans(), AFTER, st.none() | RETRY)
)
def test_a_place_in_the_queue_comes_back_as_it_was(queue: QueueSpec) -> None:
    """With the job that waits."""
    spec = JobSpec(("echo", "x"), {"pids_max": 7}, name="n", queue=queue)
    assert queued_from_message(pb.QueuedJob.FromString(queued_to_message(spec).SerializeToString())) == spec


def test_what_is_no_place_in_the_queue() -> None:
    """A priority out of its range, and a time that is none, are refused in words."""
    start = pb.StartRequest(command="x")
    with pytest.raises(
        InvalidJobError, match="a priority must be a whole number from -1000 to 1000, not 1001"
    ):
        queued_from_message(pb.QueuedJob(start=start, priority=1001))
    with pytest.raises(InvalidJobError, match="the time before which the job is not started is none"):
        queued_from_message(pb.QueuedJob(start=start, not_before=Timestamp(seconds=2**62)))
    for after, words in (
        ([pb.Dependency()], "a job waits for another by its id, a whole number, not 0"),
        ([pb.Dependency(id=1, condition=77)], "no condition of an end has the number 77"),  # type: ignore[arg-type]
        ([pb.Dependency(id=1)] * 2, "by one condition, not by several"),
        ([pb.Dependency(id=number) for number in range(1, 102)], "at most 100 others, not 101"),
    ):
        with pytest.raises(InvalidJobError, match=words):
            queued_from_message(pb.QueuedJob(start=start, after=after))
    assert queued_from_message(pb.QueuedJob(start=start, retry=pb.Retry(times=2))).queue == QueueSpec(
        retry=Retry(2, backoff_seconds=5)
    )
    for retry, words in (
        (pb.Retry(), "a job that is tried again needs a number of times"),
        (pb.Retry(times=101), "from 0 to 100 times, not 101"),
        (pb.Retry(times=1, exit_codes=[0]), "exit codes of failures are from 1 to 255"),
    ):
        with pytest.raises(InvalidJobError, match=words):
            queued_from_message(pb.QueuedJob(start=start, retry=retry))
    with pytest.raises(InvalidJobError, match="the command is empty"):
        queued_from_message(pb.QueuedJob())


def test_a_job_that_was_not_started_has_no_start() -> None:
    """On the wire; a client of this version takes the time at which it was put into the queue instead."""
    when = datetime(2026, 1, 1, tzinfo=UTC)
    for state, reason in ((JobState.QUEUED, None), (JobState.EXITED, EndReason.CANCELLED)):
        message = job_to_message(Job(1, "a", "x", state, Limits(), when, reason=reason, queued=when))
        assert not message.HasField("start")
        assert job_from_message(message).start == when


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
    """No user, device or namespace is a client's; root reads words, and where mounts are to be in the job.

    Of an image it reads what the server makes of the name.
    """
    session = {"command", "env", "workdir", "input", "request_id", "terminal"}
    said = {*session, "limits", "name", "labels", "split_stderr", "secrets", "upload"}
    said |= {"workspace", "exclusive", "outputs", "output_required", "image", "read_only"}
    said |= {"mounts", "allow", "link", "gpus", "node", "partition", "constraint"}
    assert {field.name for field in fields(JobSpec)} == {"queue", *said}
    assert {field.name for field in pb.StartRequest.DESCRIPTOR.fields} == {"argv", *said}
    assert {field.name for field in pb.ExecRequest.DESCRIPTOR.fields} == {
        "archive",
        "argv",
        "id",
        "detach",
        *session,
    }


def test_every_state_and_reason_has_its_number() -> None:
    """Names on the wire are those of the model, and 0 stays "unspecified"."""
    names = [f"JOB_STATE_{state.name}" for state in KNOWN_STATES]
    assert pb.JobState.keys() == ["JOB_STATE_UNSPECIFIED", *names]
    assert pb.EndReason.keys() == [
        "END_REASON_UNSPECIFIED",
        *(f"END_REASON_{reason.name}" for reason in EndReason),
    ]


def test_artifacts_of_a_newer_server() -> None:
    """A state that is not known is that; there is nothing to fetch."""
    message = job_to_message(Job(1, "a", "x", JobState.RUNNING, Limits(), datetime.now(UTC)))
    message.artifacts.state = 99  # type: ignore[assignment]
    assert job_from_message(message).artifacts == Artifacts(ArtifactsState.UNKNOWN)


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
