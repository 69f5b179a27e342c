"""Messages to model and back. Nothing here asks or decides."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from pjw.errors import InvalidJobError
from pjw.model import (
    KNOWN_STATES,
    After,
    Archive,
    ArrayCounts,
    Artifacts,
    ArtifactsState,
    ClientQuota,
    Condition,
    EndReason,
    ExitStatus,
    GroupUse,
    Image,
    ImageConfig,
    Job,
    JobChange,
    JobSpec,
    JobState,
    Limits,
    Mount,
    QueueSpec,
    Retry,
    Session,
    Sums,
    TerminalSize,
    Usage,
    UsageSample,
    Workspace,
    check_workspace,
    limit_numbers,
)
from pjw.v1 import job_worker_pb2 as pb

_STATES: Final = {state: pb.JobState.Value(f"JOB_STATE_{state.name}") for state in KNOWN_STATES}
_STATES_BACK: Final = {number: state for state, number in _STATES.items()}
_REASONS: Final = {reason: pb.EndReason.Value(f"END_REASON_{reason.name}") for reason in EndReason}
_REASONS_BACK: Final = {number: reason for reason, number in _REASONS.items()}
_ARTIFACTS: "Final[dict[ArtifactsState, pb.ArtifactsState.ValueType]]" = {
    state: pb.ArtifactsState.Value(f"ARTIFACTS_STATE_{state.name}")
    for state in ArtifactsState
    if state is not ArtifactsState.UNKNOWN
}
_ARTIFACTS_BACK: Final = {number: state for state, number in _ARTIFACTS.items()}
_CONDITIONS: Final = {
    condition: pb.DependencyCondition.Value(f"DEPENDENCY_CONDITION_{condition.name}")
    for condition in Condition
}
_CONDITIONS_BACK: Final = {
    pb.DEPENDENCY_CONDITION_UNSPECIFIED: Condition.OK,
    **{number: condition for condition, number in _CONDITIONS.items()},
}
# the fields that both have under the same name
_ARRAY: Final = ("indices", "count", "waiting", "succeeded", "failed", "cancelled")
# the field, and that a length and so many bytes follow
_LOGS_RESPONSE_TAG: Final = bytes([pb.LogsResponse.DATA_FIELD_NUMBER << 3 | 2])


def job_to_message(job: Job) -> pb.Job:
    """Make the message of a job."""
    status = job.exit_status
    return pb.Job(
        id=job.id,
        client_name=job.client_name,
        command=job.command,
        start=timestamp(job.start) if job.was_started or job.queued is None else None,
        end=timestamp(job.end) if job.end else None,
        exit_code=status.code if status else None,
        state=_STATES[job.state],
        reason=_REASONS[job.reason] if job.reason else pb.END_REASON_UNSPECIFIED,
        signal=status.signal if status else None,
        limits=_limits_message(job.limits),
        usage=_usage_to_message(job.usage) if job.usage else None,
        output_bytes=job.output_bytes,
        artifacts=_artifacts_to_message(job.artifacts) if job.artifacts else None,
        name=job.name,
        labels=job.labels,
        split_stderr=job.split_stderr,
        input=job.input,
        detail=job.detail,
        workdir=job.workdir,
        usage_now=sample_to_message(job.usage_now) if job.usage_now else None,
        queued=timestamp(job.queued) if job.queued else None,
        priority=job.priority,
        not_before=timestamp(job.not_before) if job.not_before else None,
        held=job.held,
        after=map(_after_to_message, job.after),
        unmet=job.unmet,
        attempt=job.attempt,
        retried_as=job.retried_as,
        array=pb.Array(**{name: getattr(job.array, name) for name in _ARRAY}) if job.array else None,
        array_id=job.array_id,
        array_index=job.array_index,
        workspace=job.workspace,
        exclusive=job.exclusive,
        node=job.node,
        chosen_node=job.chosen_node,
        partition=job.partition,
        constraint=job.constraint,
        image=job.image,
        read_only=job.read_only,
        mounts=job.mounts,
        allow=job.allow,
        link=job.link,
        gpus=job.gpus,
    )


def _artifacts_to_message(artifacts: Artifacts) -> pb.Artifacts:
    return pb.Artifacts(
        state=_ARTIFACTS[artifacts.state],
        bytes=artifacts.bytes,
        detail=artifacts.detail,
        required=artifacts.required,
    )


def _artifacts_from_message(message: pb.Artifacts) -> Artifacts:
    state = _ARTIFACTS_BACK.get(message.state, ArtifactsState.UNKNOWN)
    return Artifacts(state, message.bytes, message.detail, message.required)


def _exit_status_of(message: pb.Job | pb.Session) -> ExitStatus | None:
    code = message.exit_code if message.HasField("exit_code") else None
    signal = message.signal if message.HasField("signal") else None
    return ExitStatus.of(code, signal)


def job_from_message(message: pb.Job) -> Job:
    """Make a job from its message. A state that only a newer server knows is UNKNOWN, such a reason None.

    Raises ValueError for a message that no server sends.
    """
    queued = message.queued.ToDatetime(UTC) if message.HasField("queued") else None
    start = message.start.ToDatetime(UTC)
    return Job(
        id=message.id,
        client_name=message.client_name,
        command=message.command,
        state=_STATES_BACK.get(message.state, JobState.UNKNOWN),
        limits=Limits(**limits_from_message(message.limits)),
        start=start if queued is None or message.HasField("start") else queued,
        end=message.end.ToDatetime(UTC) if message.HasField("end") else None,
        exit_status=_exit_status_of(message),
        reason=_REASONS_BACK.get(message.reason),
        usage=_usage_from_message(message.usage) if message.HasField("usage") else None,
        output_bytes=message.output_bytes if message.HasField("output_bytes") else None,
        artifacts=_artifacts_from_message(message.artifacts) if message.HasField("artifacts") else None,
        name=message.name,
        labels=dict(message.labels),
        split_stderr=message.split_stderr,
        input=message.input,
        detail=message.detail,
        workdir=message.workdir,
        usage_now=sample_from_message(message.usage_now) if message.HasField("usage_now") else None,
        queued=queued,
        priority=message.priority,
        not_before=message.not_before.ToDatetime(UTC) if message.HasField("not_before") else None,
        held=message.held,
        after=tuple(map(_after_from_message, message.after)),
        unmet=message.unmet,
        attempt=message.attempt,
        retried_as=message.retried_as if message.HasField("retried_as") else None,
        array=ArrayCounts(**{name: getattr(message.array, name) for name in _ARRAY})
        if message.HasField("array")
        else None,
        array_id=message.array_id if message.HasField("array_id") else None,
        array_index=message.array_index if message.HasField("array_id") else None,
        workspace=message.workspace,
        exclusive=message.exclusive,
        node=message.node,
        chosen_node=message.chosen_node,
        partition=message.partition,
        constraint=message.constraint,
        image=message.image,
        read_only=message.read_only,
        mounts=tuple(message.mounts),
        allow=tuple(message.allow),
        link=message.link,
        gpus=message.gpus,
    )


def change_to_message(change: JobChange) -> pb.JobChange:
    """Make the message of a change of a job's state."""
    return pb.JobChange(
        sequence=change.sequence,
        time=timestamp(change.time) if change.time else None,
        job=job_to_message(change.job),
        removed=change.removed,
    )


def change_from_message(message: pb.JobChange) -> JobChange:
    """Make a change of a job's state from its message. Raises ValueError, as `job_from_message`."""
    return JobChange(
        job_from_message(message.job),
        message.sequence if message.HasField("sequence") else None,
        message.time.ToDatetime(UTC) if message.HasField("time") else None,
        message.removed,
    )


def workspace_to_message(workspace: Workspace) -> pb.Workspace:
    """Make the message of a workspace."""
    return pb.Workspace(
        name=workspace.name,
        made=timestamp(workspace.made),
        used=timestamp(workspace.used),
        bytes=workspace.bytes,
        inodes=workspace.inodes,
        jobs=workspace.jobs,
        client_name=workspace.client_name,
    )


def workspace_from_message(message: pb.Workspace) -> Workspace:
    """Make a workspace from its message."""
    return Workspace(
        message.name,
        message.made.ToDatetime(UTC),
        message.used.ToDatetime(UTC),
        message.bytes,
        message.inodes,
        message.jobs,
        message.client_name,
    )


def image_to_message(image: Image) -> pb.Image:
    """Make the message of an image."""
    return pb.Image(
        name=image.name,
        digest=image.digest,
        made=timestamp(image.made),
        used=timestamp(image.used),
        bytes=image.bytes,
        inodes=image.inodes,
        jobs=image.jobs,
        client_name=image.client_name,
        config=image_config_to_message(image.config),
    )


def image_from_message(message: pb.Image) -> Image:
    """Make an image from its message."""
    return Image(
        message.name,
        message.digest,
        message.made.ToDatetime(UTC),
        message.used.ToDatetime(UTC),
        message.bytes,
        message.inodes,
        message.jobs,
        message.client_name,
        image_config_from_message(message.config),
    )


def image_config_to_message(config: ImageConfig) -> pb.ImageConfig:
    """Make the message of an image's config."""
    return pb.ImageConfig(
        env=config.env, workdir=config.workdir, entrypoint=config.entrypoint, command=config.command
    )


def image_config_from_message(message: pb.ImageConfig) -> ImageConfig:
    """Make an image's config from its message. Raises InvalidJobError."""
    return ImageConfig(dict(message.env), message.workdir, tuple(message.entrypoint), tuple(message.command))


def spec_to_message(spec: JobSpec) -> pb.StartRequest:
    """Make a request to start a job. Raises InvalidJobError for limits too large for the message."""
    request = pb.StartRequest(
        limits=_limits_to_message(spec.limits) if spec.limits else None,
        name=spec.name,
        labels=spec.labels,
        env=spec.env,
        workdir=spec.workdir,
        split_stderr=spec.split_stderr,
        outputs=spec.outputs,
        output_required=spec.output_required,
        input=spec.input,
        request_id=spec.request_id,
        terminal=terminal_to_message(spec.terminal),
        secrets=spec.secrets,
        upload=spec.upload,
        workspace=spec.workspace,
        exclusive=spec.exclusive,
        image=spec.image,
        read_only=spec.read_only,
        mounts=spec.mounts,
        allow=spec.allow,
        link=spec.link,
        gpus=spec.gpus,
        node=spec.node,
        partition=spec.partition,
        constraint=spec.constraint,
    )
    _set_command(request, spec)
    return request


def _set_command(request: pb.StartRequest | pb.ExecRequest, spec: JobSpec) -> None:
    if isinstance(spec.command, str):
        request.command = spec.command
    elif spec.command:
        request.argv.arguments.extend(spec.command)


def _command_of(message: pb.StartRequest | pb.ExecRequest) -> str | tuple[str, ...]:
    program = message.WhichOneof("program")
    if program is None and isinstance(message, pb.StartRequest) and message.image:
        return ()
    if program is None:
        raise InvalidJobError("the command is empty")
    return message.command if program == "command" else tuple(message.argv.arguments)


def terminal_to_message(size: TerminalSize | None) -> pb.Terminal | None:
    """Make the message of the size of a terminal."""
    return None if size is None else pb.Terminal(rows=size.rows, columns=size.columns)


def terminal_from_message(message: pb.Terminal) -> TerminalSize:
    """Make the size of a terminal from its message. Raises InvalidJobError."""
    return TerminalSize(message.rows, message.columns)


def spec_from_message(message: pb.StartRequest) -> JobSpec:
    """Make the spec of a request to start a job. Raises InvalidJobError."""
    if message.workspace:
        check_workspace(message.workspace)
    return JobSpec(
        _command_of(message),
        limits_from_message(message.limits),
        name=message.name,
        labels=dict(message.labels),
        env=dict(message.env),
        workdir=message.workdir,
        split_stderr=message.split_stderr,
        outputs=tuple(message.outputs),
        output_required=message.output_required,
        input=message.input,
        request_id=message.request_id,
        terminal=terminal_from_message(message.terminal) if message.HasField("terminal") else None,
        secrets=dict(message.secrets),
        upload=message.upload,
        workspace=message.workspace,
        exclusive=message.exclusive,
        image=message.image,
        read_only=message.read_only,
        mounts=tuple(message.mounts),
        allow=tuple(message.allow),
        link=message.link,
        gpus=message.gpus,
        node=message.node,
        partition=message.partition,
        constraint=message.constraint,
    )


def exec_to_message(job_id: int, spec: JobSpec, *, detached: bool) -> pb.ExecRequest:
    """Make a request to start another command in a job."""
    request = pb.ExecRequest(
        id=job_id,
        env=spec.env,
        workdir=spec.workdir,
        input=spec.input,
        detach=detached,
        request_id=spec.request_id,
        terminal=terminal_to_message(spec.terminal),
    )
    _set_command(request, spec)
    return request


def archive_to_message(job_id: int, archive: Archive, request_id: str) -> pb.ExecRequest:
    """Make a request to pack or unpack files in a job."""
    message = pb.Archive(path=archive.path, unpack=archive.unpack, name=archive.name)
    return pb.ExecRequest(id=job_id, archive=message, request_id=request_id)


def archive_from_message(message: pb.Archive) -> Archive:
    """Make the description of an archive to pack or unpack. Raises InvalidJobError."""
    return Archive(message.path, message.unpack, message.name)


def exec_from_message(message: pb.ExecRequest) -> JobSpec:
    """Make the spec of a request for another command in a job. Raises InvalidJobError."""
    return JobSpec(
        _command_of(message),
        env=dict(message.env),
        workdir=message.workdir,
        input=message.input,
        request_id=message.request_id,
        terminal=terminal_from_message(message.terminal) if message.HasField("terminal") else None,
    )


def session_to_message(session: Session) -> pb.Session:
    """Make the message of a session."""
    status = session.exit_status
    return pb.Session(
        job_id=session.job_id,
        number=session.number,
        command=session.command,
        start=timestamp(session.start),
        end=timestamp(session.end) if session.end else None,
        exit_code=status.code if status else None,
        state=_STATES[session.state],
        reason=_REASONS[session.reason] if session.reason else pb.END_REASON_UNSPECIFIED,
        signal=status.signal if status else None,
        input=session.input,
        detached=session.detached,
        terminal=session.terminal,
    )


def session_from_message(message: pb.Session) -> Session:
    """Make a session from its message. Raises ValueError for a message that no server sends."""
    return Session(
        job_id=message.job_id,
        number=message.number,
        command=message.command,
        state=_STATES_BACK.get(message.state, JobState.UNKNOWN),
        start=message.start.ToDatetime(UTC),
        end=message.end.ToDatetime(UTC) if message.HasField("end") else None,
        exit_status=_exit_status_of(message),
        reason=_REASONS_BACK.get(message.reason),
        input=message.input,
        detached=message.detached,
        terminal=message.terminal,
    )


def queued_to_message(spec: JobSpec) -> pb.QueuedJob:
    """Make a request to put a job into the queue. Raises InvalidJobError, as `spec_to_message`."""
    queue = spec.queue or QueueSpec()
    not_before = None if queue.not_before is None else timestamp(queue.not_before.astimezone(UTC))
    return pb.QueuedJob(
        start=spec_to_message(spec),
        priority=queue.priority,
        not_before=not_before,
        held=queue.held,
        after=map(_after_to_message, queue.after),
        retry=_retry_to_message(queue.retry) if queue.retry is not None else None,
        array=queue.array,
    )


def queued_from_message(message: pb.QueuedJob) -> JobSpec:
    """Make the spec of a request for the queue, with its conditions. Raises InvalidJobError."""
    try:
        not_before = message.not_before.ToDatetime(UTC) if message.HasField("not_before") else None
    except (ValueError, OverflowError) as error:
        raise InvalidJobError(f"the time before which the job is not started is none: {error}") from None
    after = tuple(map(_after_from_message, message.after))
    retry = _retry_from_message(message.retry) if message.HasField("retry") else None
    queue = QueueSpec(message.priority, not_before, message.held, after, retry, message.array)
    return replace(spec_from_message(message.start), queue=queue)


def _retry_to_message(retry: Retry) -> pb.Retry:
    message = pb.Retry(
        times=retry.times,
        exit_codes=sorted(retry.codes),
        oom=retry.oom,
        timeout=retry.timeout,
        if_lost=retry.if_lost,
    )
    message.backoff.FromNanoseconds(round(retry.backoff_seconds * 1e9))
    return message


def _retry_from_message(message: pb.Retry) -> Retry:
    backoff = {}
    if message.HasField("backoff"):
        backoff["backoff_seconds"] = message.backoff.seconds + message.backoff.nanos / 1e9
    return Retry(
        message.times,
        frozenset(message.exit_codes),
        oom=message.oom,
        timeout=message.timeout,
        if_lost=message.if_lost,
        **backoff,
    )


def _after_to_message(after: After) -> pb.Dependency:
    return pb.Dependency(
        id=after.job_id, condition=_CONDITIONS[after.condition], earlier=after.earlier, element=after.element
    )


def _after_from_message(message: pb.Dependency) -> After:
    try:
        earlier = message.earlier if message.HasField("earlier") else None
        element = message.element if message.HasField("element") else None
        return After(message.id, _CONDITIONS_BACK[message.condition], earlier, element)
    except KeyError:
        raise InvalidJobError(f"no condition of an end has the number {message.condition}") from None


def states_from_message(numbers: "Iterable[pb.JobState.ValueType]") -> frozenset[JobState]:
    """Make states from a request. Raises InvalidJobError for one that this version does not know."""
    try:
        return frozenset(_STATES_BACK[number] for number in numbers)
    except KeyError as unknown:
        raise InvalidJobError(f"no state of a job has the number {unknown}") from None


def _limits_to_message(limits: Mapping[str, int | str]) -> pb.Limits:
    numbers = limit_numbers(limits)
    try:
        return pb.Limits(**numbers)
    except (TypeError, ValueError) as error:
        # says which, in our words; a server may admit more than this client knows of, so not before
        Limits().with_overrides(limits)
        raise InvalidJobError(f"cannot ask for these limits: {error}") from error


# Most jobs have the default limits, or those of another job. Each caller copies the message into another.
@lru_cache(maxsize=64)
def _limits_message(limits: Limits) -> pb.Limits:
    return pb.Limits(**dict(limits.items()))


def limits_from_message(message: pb.Limits) -> dict[str, int]:
    """Return the limits that are set, by name."""
    return {field.name: value for field, value in message.ListFields()}


def timed_logs_response(data: bytes, time: datetime | None) -> pb.LogsResponse:
    """Make the message of output with its time."""
    return pb.LogsResponse(data=data, time=None if time is None else timestamp(time))


def logs_response_head(count: int) -> bytes:
    """Return the head that makes *count* bytes of output behind it a serialized LogsResponse."""
    head = bytearray(_LOGS_RESPONSE_TAG)
    while count > 0x7F:
        head.append(count & 0x7F | 0x80)
        count >>= 7
    head.append(count)
    return bytes(head)


def logs_response_bytes(message: bytes) -> int:
    """Return the number of bytes of output in a message that begins with such a head."""
    digits = 1
    while len(message) - 1 - digits >= 1 << 7 * digits:
        digits += 1
    return len(message) - 1 - digits


def _usage_to_message(usage: Usage) -> pb.Usage:
    return pb.Usage(
        cpu_usage_usec=usage.cpu_usage_usec,
        memory_peak_bytes=usage.memory_peak_bytes,
        io_read_bytes=usage.io_read_bytes,
        io_write_bytes=usage.io_write_bytes,
        oom_kills=usage.oom_kills,
    )


def sample_to_message(sample: UsageSample) -> pb.UsageSample:
    """Make the message of a usage sample."""
    return pb.UsageSample(
        time=timestamp(sample.time),
        cpu_usage_usec=sample.cpu_usage_usec,
        memory_bytes=sample.memory_bytes,
        io_read_bytes=sample.io_read_bytes,
        io_write_bytes=sample.io_write_bytes,
        pids=sample.pids,
    )


def sample_from_message(message: pb.UsageSample) -> UsageSample:
    """Make a usage sample from its message."""
    return UsageSample(
        time=message.time.ToDatetime(UTC),
        cpu_usage_usec=message.cpu_usage_usec,
        memory_bytes=message.memory_bytes,
        io_read_bytes=message.io_read_bytes,
        io_write_bytes=message.io_write_bytes,
        pids=message.pids,
    )


# the fields that both have under the same name
_QUOTA_NUMBERS: Final = (
    "weight",
    "total_weight",
    "running",
    "running_max",
    "memory_promised_bytes",
    "memory_promised_max_bytes",
    "stored_bytes",
    "stored_bytes_max",
    "queued",
    "queued_max",
)


def quota_to_message(quota: ClientQuota) -> pb.GetQuotaResponse:
    """Make the message of a client's limits and usage."""
    use = quota.use
    return pb.GetQuotaResponse(
        client_name=quota.client_name,
        defaults=_limits_message(quota.defaults),
        ceilings=_limits_message(quota.ceilings),
        sums=pb.Sums(**dict(quota.sums.items())),
        use=pb.GroupUse(memory_bytes=use.memory_bytes, pids=use.pids, cpu_usage_usec=use.cpu_usage_usec),
        mounts=[pb.Mount(name=mount.name, read_only=mount.read_only) for mount in quota.mounts],
        gpus=quota.gpus,
        drained=quota.drained,
        **{name: getattr(quota, name) for name in _QUOTA_NUMBERS},
    )


def quota_from_message(message: pb.GetQuotaResponse) -> ClientQuota:
    """Make a client's limits and usage from its message."""
    sums, use = message.sums, message.use
    return ClientQuota(
        client_name=message.client_name,
        defaults=Limits(**limits_from_message(message.defaults)),
        ceilings=Limits(**limits_from_message(message.ceilings)),
        sums=Sums(sums.memory_max_bytes, sums.pids_max, sums.cpu_max_millicores),
        use=GroupUse(use.memory_bytes, use.pids, use.cpu_usage_usec),
        mounts=tuple(Mount(mount.name, mount.read_only) for mount in message.mounts),
        gpus=message.gpus,
        drained=message.drained,
        **{name: getattr(message, name) for name in _QUOTA_NUMBERS},
    )


def _usage_from_message(message: pb.Usage) -> Usage:
    return Usage(
        cpu_usage_usec=message.cpu_usage_usec,
        memory_peak_bytes=message.memory_peak_bytes,
        io_read_bytes=message.io_read_bytes,
        io_write_bytes=message.io_write_bytes,
        oom_kills=message.oom_kills,
    )


def since_from_message(request: pb.LogsRequest) -> int | None:
    """Return the time from which output is wanted, in ns since 1970. Raises InvalidJobError."""
    if not request.HasField("since"):
        return None
    try:
        return request.since.ToNanoseconds()
    except ValueError as error:
        raise InvalidJobError(f"the time to begin at is none: {error}") from None


def timestamp(time: datetime) -> Timestamp:
    """Return a time in UTC as a message of protobuf."""
    message = Timestamp()
    message.FromDatetime(time)
    return message
