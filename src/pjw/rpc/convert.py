"""Messages to model and back. Nothing here asks or decides."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from pjw.errors import InvalidJobError
from pjw.model import (
    KNOWN_STATES,
    ClientQuota,
    EndReason,
    ExitStatus,
    GroupUse,
    Job,
    JobSpec,
    JobState,
    Limits,
    Sums,
    Usage,
    UsageSample,
    limit_numbers,
)
from pjw.v1 import job_worker_pb2 as pb

_STATES: Final = {state: pb.JobState.Value(f"JOB_STATE_{state.name}") for state in KNOWN_STATES}
_STATES_BACK: Final = {number: state for state, number in _STATES.items()}
_REASONS: Final = {reason: pb.EndReason.Value(f"END_REASON_{reason.name}") for reason in EndReason}
_REASONS_BACK: Final = {number: reason for reason, number in _REASONS.items()}
# the field, and that a length and so many bytes follow
_LOGS_RESPONSE_TAG: Final = bytes([pb.LogsResponse.DATA_FIELD_NUMBER << 3 | 2])


def job_to_message(job: Job) -> pb.Job:
    """A job as it is sent."""
    status = job.exit_status
    return pb.Job(
        id=job.id,
        client_name=job.client_name,
        command=job.command,
        start=timestamp(job.start),
        end=timestamp(job.end) if job.end else None,
        exit_code=status.code if status else None,
        state=_STATES[job.state],
        reason=_REASONS[job.reason] if job.reason else pb.END_REASON_UNSPECIFIED,
        signal=status.signal if status else None,
        limits=_limits_message(job.limits),
        usage=_usage_to_message(job.usage) if job.usage else None,
        output_bytes=job.output_bytes,
        name=job.name,
        labels=job.labels,
        split_stderr=job.split_stderr,
        input=job.input,
        detail=job.detail,
        workdir=job.workdir,
        usage_now=sample_to_message(job.usage_now) if job.usage_now else None,
    )


def job_from_message(message: pb.Job) -> Job:
    """A job as it was sent. A state that only a newer server knows is UNKNOWN, such a reason None.

    Raises ValueError for a message that no server sends.
    """
    code = message.exit_code if message.HasField("exit_code") else None
    signal = message.signal if message.HasField("signal") else None
    return Job(
        id=message.id,
        client_name=message.client_name,
        command=message.command,
        state=_STATES_BACK.get(message.state, JobState.UNKNOWN),
        limits=Limits(**limits_from_message(message.limits)),
        start=message.start.ToDatetime(UTC),
        end=message.end.ToDatetime(UTC) if message.HasField("end") else None,
        exit_status=ExitStatus.of(code, signal),
        reason=_REASONS_BACK.get(message.reason),
        usage=_usage_from_message(message.usage) if message.HasField("usage") else None,
        output_bytes=message.output_bytes if message.HasField("output_bytes") else None,
        name=message.name,
        labels=dict(message.labels),
        split_stderr=message.split_stderr,
        input=message.input,
        detail=message.detail,
        workdir=message.workdir,
        usage_now=sample_from_message(message.usage_now) if message.HasField("usage_now") else None,
    )


def spec_to_message(spec: JobSpec) -> pb.StartRequest:
    """A request to start a job. Raises InvalidJobError for limits that no message has room for."""
    request = pb.StartRequest(
        limits=_limits_to_message(spec.limits) if spec.limits else None,
        name=spec.name,
        labels=spec.labels,
        env=spec.env,
        workdir=spec.workdir,
        split_stderr=spec.split_stderr,
        input=spec.input,
        request_id=spec.request_id,
    )
    if isinstance(spec.command, str):
        request.command = spec.command
    else:
        request.argv.arguments.extend(spec.command)
    return request


def spec_from_message(message: pb.StartRequest) -> JobSpec:
    """What is asked for. Raises InvalidJobError."""
    program = message.WhichOneof("program")
    if program is None:
        raise InvalidJobError("the command is empty")
    return JobSpec(
        message.command if program == "command" else tuple(message.argv.arguments),
        limits_from_message(message.limits),
        name=message.name,
        labels=dict(message.labels),
        env=dict(message.env),
        workdir=message.workdir,
        split_stderr=message.split_stderr,
        input=message.input,
        request_id=message.request_id,
    )


def states_from_message(numbers: "Iterable[pb.JobState.ValueType]") -> frozenset[JobState]:
    """States that are asked for. Raises InvalidJobError for one that this version does not know."""
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


# Most jobs have the default limits, or those of another job. Who gets a message copies it into another.
@lru_cache(maxsize=64)
def _limits_message(limits: Limits) -> pb.Limits:
    return pb.Limits(**dict(limits.items()))


def limits_from_message(message: pb.Limits) -> dict[str, int]:
    """The limits that are set, by name."""
    return {field.name: value for field, value in message.ListFields()}


def timed_logs_response(data: bytes, time: datetime | None) -> pb.LogsResponse:
    """Output, and when it was written."""
    return pb.LogsResponse(data=data, time=None if time is None else timestamp(time))


def logs_response_head(count: int) -> bytes:
    """What *count* bytes of output need in front of them to be a serialized LogsResponse."""
    head = bytearray(_LOGS_RESPONSE_TAG)
    while count > 0x7F:
        head.append(count & 0x7F | 0x80)
        count >>= 7
    head.append(count)
    return bytes(head)


def logs_response_bytes(message: bytes) -> int:
    """How many bytes of output there are in what begins with such a head."""
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
    """What a job had used at one moment, as it is sent."""
    return pb.UsageSample(
        time=timestamp(sample.time),
        cpu_usage_usec=sample.cpu_usage_usec,
        memory_bytes=sample.memory_bytes,
        io_read_bytes=sample.io_read_bytes,
        io_write_bytes=sample.io_write_bytes,
        pids=sample.pids,
    )


def sample_from_message(message: pb.UsageSample) -> UsageSample:
    """What a job had used at one moment, as it was sent."""
    return UsageSample(
        time=message.time.ToDatetime(UTC),
        cpu_usage_usec=message.cpu_usage_usec,
        memory_bytes=message.memory_bytes,
        io_read_bytes=message.io_read_bytes,
        io_write_bytes=message.io_write_bytes,
        pids=message.pids,
    )


# what is the same in both, by name
_QUOTA_NUMBERS: Final = (
    "weight",
    "total_weight",
    "running",
    "running_max",
    "memory_promised_bytes",
    "memory_promised_max_bytes",
    "stored_bytes",
    "stored_bytes_max",
)


def quota_to_message(quota: ClientQuota) -> pb.GetQuotaResponse:
    """What a client may have and has, as it is sent."""
    use = quota.use
    return pb.GetQuotaResponse(
        client_name=quota.client_name,
        defaults=_limits_message(quota.defaults),
        ceilings=_limits_message(quota.ceilings),
        sums=pb.Sums(**dict(quota.sums.items())),
        use=pb.GroupUse(memory_bytes=use.memory_bytes, pids=use.pids, cpu_usage_usec=use.cpu_usage_usec),
        **{name: getattr(quota, name) for name in _QUOTA_NUMBERS},
    )


def quota_from_message(message: pb.GetQuotaResponse) -> ClientQuota:
    """What a client may have and has, as it was sent."""
    sums, use = message.sums, message.use
    return ClientQuota(
        client_name=message.client_name,
        defaults=Limits(**limits_from_message(message.defaults)),
        ceilings=Limits(**limits_from_message(message.ceilings)),
        sums=Sums(sums.memory_max_bytes, sums.pids_max, sums.cpu_max_millicores),
        use=GroupUse(use.memory_bytes, use.pids, use.cpu_usage_usec),
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
    """From when on output is asked for, in nanoseconds since 1970. Raises InvalidJobError."""
    if not request.HasField("since"):
        return None
    try:
        return request.since.ToNanoseconds()
    except ValueError as error:
        raise InvalidJobError(f"the time to begin at is none: {error}") from None


def timestamp(time: datetime) -> Timestamp:
    """A time in UTC as a message of protobuf."""
    message = Timestamp()
    message.FromDatetime(time)
    return message
