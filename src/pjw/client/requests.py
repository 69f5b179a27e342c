"""What is asked of the service: a request, and what its answer means. Neither sends nor waits."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from pjw import errors
from pjw.client.failures import CALL_SECONDS
from pjw.model import KNOWN_STATES, ClientQuota, Job, JobSpec, JobState, UsageSample
from pjw.rpc.convert import (
    job_from_message,
    quota_from_message,
    sample_from_message,
    spec_to_message,
    timestamp,
)
from pjw.v1 import job_worker_pb2 as pb

T = TypeVar("T")
# A job's spec, or its command alone: text for the shell, or a program and its arguments.
Startable = JobSpec | str | Sequence[str]
# A number, or text, as in the JSON of a job.
JobId = int | str
PAGE_MAX: Final = 1000
# How far a call has got, and a next step: for when its connection is lost for good.
Reached = tuple[str, str | None]


class TimedOutput(NamedTuple):
    """Output, and when the job wrote it; None where that was not recorded."""

    time: datetime | None
    data: bytes


class Finished(NamedTuple):
    """A job that has ended, and all of its output; `stderr` is empty unless the job keeps it apart."""

    job: Job
    output: bytes
    stderr: bytes


class UsageHistory(NamedTuple):
    """A job, and what it used over its life."""

    job: Job
    samples: list[UsageSample]


class JobUsage(NamedTuple):
    """A running job, and what it has used until now."""

    job: Job
    sample: UsageSample


UsageSnapshot = list[JobUsage]


# not a dataclass, which takes half a millisecond to make: every `pjw get` would pay it
class Call(NamedTuple, Generic[T]):
    """One call with one answer."""

    method: str
    request: Message
    result: Callable[[Any], T]
    job_id: int = 0
    spec: JobSpec | None = None
    timeout: float | None = CALL_SECONDS
    # what it means that a call that was made twice finds no job: that the first one has done it
    gone_is_done: bool = False

    @property
    def outlasts_restart(self) -> bool:
        """Whether a client that was never answered waits for a server that restarts."""
        return self.method == "Start"

    @property
    def facts(self) -> Mapping[str, object]:
        """The facts that the caller knows of an error of this call."""
        if self.spec is not None:
            return {"program": self.spec.argv[0], "workdir": self.spec.workdir}
        return {"job_id": self.job_id} if self.job_id else {}

    @property
    def reached(self) -> Reached:
        """What is known when no answer comes."""
        if self.method == "Start":
            return " before the answer came", "the job may have started: see pjw list"
        if self.method in ("Wait", "Stop"):
            return (
                " before the answer came",
                f"see pjw get {self.job_id}",
            )
        return " before the answer came", None


def start(asked: Startable) -> Call[Job]:
    """Start a job. A request id makes the call repeatable: it is made up where none is given."""
    spec = JobSpec.of(asked)
    if not spec.request_id:
        # as many random bits as a UUID has, and then some, without the import of its module
        spec = replace(spec, request_id=os.urandom(16).hex())
    return Call("Start", spec_to_message(spec), _job_of_answer, spec=spec)


def with_input(asked: Startable, data: bytes | None) -> JobSpec:
    """The spec of a job that reads *data*, if there is any."""
    spec = JobSpec.of(asked)
    return spec if data is None else replace(spec, input=True)


def get(job_id: JobId, *, all_clients: bool) -> Call[Job]:
    """One job."""
    number = wire_id(job_id)
    return Call("Get", pb.GetRequest(id=number, all_clients=all_clients), _job_of_answer, number)


def wait(job_id: JobId, *, or_stuck: bool, all_clients: bool) -> Call[Job]:
    """One job when it has ended, however long that takes; with *or_stuck* also when it does not end."""
    number = wire_id(job_id)
    request = pb.WaitRequest(id=number, or_stuck=or_stuck, all_clients=all_clients)
    return Call("Wait", request, _job_of_answer, number, timeout=None)


def stop(job_id: JobId, grace: float | None, signal: int, *, all_clients: bool) -> Call[Job]:
    """Stop a job. Without a deadline: its grace period is the server's matter."""
    number = wire_id(job_id)
    request = pb.StopRequest(id=number, all_clients=all_clients, signal=signal)
    if grace is not None:
        request.grace.CopyFrom(_duration(grace, "the grace period"))
    return Call("Stop", request, _job_of_answer, number, timeout=None)


def delete(job_id: JobId, *, all_clients: bool) -> Call[None]:
    """Forget an ended job."""
    number = wire_id(job_id)
    request = pb.DeleteRequest(id=number, all_clients=all_clients)
    return Call("Delete", request, lambda _: None, number, gone_is_done=True)


def usage_history(job_id: JobId, *, all_clients: bool) -> Call[UsageHistory]:
    """What a job used over its life."""
    number = wire_id(job_id)
    request = pb.GetUsageHistoryRequest(id=number, all_clients=all_clients)
    return Call("GetUsageHistory", request, _history_of_answer, number)


def quota(client_name: str, *, all_clients: bool) -> Call[ClientQuota]:
    """The limits of a client, what its jobs use now, and its share of the machine."""
    request = pb.GetQuotaRequest(client_name=client_name, all_clients=all_clients)
    return Call("GetQuota", request, quota_from_message)


class Pages:
    """A list, page by page: `next` is the next call; its result is the jobs that go on it."""

    def __init__(
        self,
        states: Iterable[JobState | str],
        labels: Mapping[str, str] | None,
        name: str,
        limit: int | None,
        *,
        newest_first: bool,
        all_clients: bool,
    ) -> None:
        self._left = limit
        self._request: Final = pb.ListRequest(
            states=[pb.JobState.Value(f"JOB_STATE_{_state(state).name}") for state in _each(states)],
            labels=_checked_labels(labels),
            name=name,
            newest_first=newest_first,
            all_clients=all_clients,
        )
        self._more = limit is None or limit > 0

    @property
    def next(self) -> Call[list[Job]] | None:
        """The call for the next page; None when there is none."""
        if not self._more:
            return None
        if self._left is not None:
            self._request.page_size = min(self._left, PAGE_MAX)
        return Call("List", self._request, self._take)

    def _take(self, answer: pb.ListResponse) -> list[Job]:
        jobs = [_job(message) for message in answer.jobs[: self._left]]
        self._request.page_token = answer.next_page_token
        if self._left is not None:
            self._left -= len(jobs)
        self._more = bool(answer.next_page_token) and self._left != 0
        return jobs


class LogsPosition:
    """Where a reader of output is, and what it asks for to go on from there."""

    method: Final = "Logs"
    gone_is_done: Final = False

    def __init__(
        self,
        job_id: JobId,
        offset: int,
        tail: int | None,
        since: datetime | None,
        *,
        follow: bool,
        stderr: bool,
        all_clients: bool,
        timestamps: bool = False,
    ) -> None:
        if not -(2**63) <= offset < 2**63:
            raise errors.OffsetError(f"cannot read output from byte {offset}: no output is as long")
        self.job_id: Final = wire_id(job_id)
        self.facts: Final = {"job_id": self.job_id}
        self.seen = 0
        # the server's first answer says at which offset the last lines, or the time, begin
        self._placed = tail is None and since is None
        self.request: Final = pb.LogsRequest(
            id=self.job_id,
            offset=offset,
            all_clients=all_clients,
            stream=pb.OUTPUT_STREAM_STDERR if stderr else pb.OUTPUT_STREAM_UNSPECIFIED,
            no_follow=not follow,
            tail_lines=tail,
            timestamps=timestamps,
            since=None if since is None else timestamp(since.astimezone(UTC)),
        )

    def take(self, answer: pb.LogsResponse) -> bytes | None:
        """The bytes of an answer, if it has some; the next request begins behind them."""
        data = answer.data
        if not self._placed:
            if not answer.HasField("offset"):
                raise errors.ServerFailedError(
                    "this server is older than its client: it cannot begin with what was written at a time",
                    hint="begin at a byte (--offset), or with the last lines (--tail)",
                )
            self._placed = True
            self.request.offset = answer.offset
            self.request.ClearField("tail_lines")
            self.request.ClearField("since")
        self.seen += len(data)
        self.request.offset += len(data)
        return data or None

    def take_timed(self, answer: pb.LogsResponse) -> TimedOutput | None:
        """The same, with its time."""
        time = answer.time.ToDatetime(UTC) if answer.HasField("time") else None
        data = self.take(answer)
        return None if data is None else TimedOutput(time, data)

    @property
    def reached(self) -> Reached:
        """How far it has got, and what to do when it gets no further."""
        return (
            f" after {self.seen} bytes of output",
            f"job {self.job_id} goes on without it: pjw logs {self.job_id}",
        )


class UsageWatch:
    """The usage of running jobs, again and again."""

    method: Final = "WatchUsage"
    facts: Final[Mapping[str, object]] = {}
    gone_is_done: Final = False
    reached: Final[Reached] = ("", None)

    def __init__(self, interval: float | None, *, all_clients: bool) -> None:
        self.request: Final = pb.WatchUsageRequest(all_clients=all_clients)
        if interval is not None:
            self.request.interval.CopyFrom(_duration(interval, "the interval"))

    @staticmethod
    def take(answer: pb.WatchUsageResponse) -> UsageSnapshot:
        """The jobs of an answer."""
        return [JobUsage(_job(usage.job), sample_from_message(usage.sample)) for usage in answer.jobs]


Stream = LogsPosition | UsageWatch


def _job_of_answer(answer: Any) -> Job:  # noqa: ANN401  every answer with one job
    return _job(answer.job)


def _history_of_answer(answer: pb.GetUsageHistoryResponse) -> UsageHistory:
    return UsageHistory(_job(answer.job), [sample_from_message(sample) for sample in answer.samples])


def _job(message: pb.Job) -> Job:
    try:
        return job_from_message(message)
    except ValueError as error:
        raise errors.ServerFailedError(
            f"cannot understand the answer of the server: {error}",
            hint="is it newer than this client?",
        ) from error


def _each(states: Iterable[JobState | str]) -> Iterable[JobState | str]:
    # a single state is text: do not iterate over its letters
    return [states] if isinstance(states, str) else states


def _state(state: JobState | str) -> JobState:
    if state not in KNOWN_STATES:
        raise errors.InvalidJobError(
            f"no state of a job is called {state!r:.80}; there are {', '.join(KNOWN_STATES)}"
        )
    return JobState(state)


def _checked_labels(labels: Mapping[str, str] | None) -> Mapping[str, str] | None:
    if labels is not None and not isinstance(labels, Mapping):
        raise errors.InvalidJobError(f"labels are names with values (a dict), not {labels!r:.80}")
    return labels


def _duration(seconds: float, what: str) -> Duration:
    if not 0 <= seconds < 1e9:
        raise errors.InvalidJobError(f"{what} must be a number of seconds from 0 on, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def wire_id(job_id: JobId) -> int:
    """A job's id as a number for the message; the caller may give it as text, as the JSON of a job does.

    Raises JobNotFoundError for a number that no job can have, InvalidJobError for anything else.
    """
    if isinstance(job_id, str) and re.fullmatch(r"-?[0-9]{1,100}", job_id):
        job_id = int(job_id)
    if not isinstance(job_id, int) or isinstance(job_id, bool):
        raise errors.InvalidJobError(
            f"a job's id is a whole number, such as 7 or '7', not {job_id!r:.80}",
            hint="find(NAME) gives the job of that name, and job.id its id",
        )
    if not -(2**63) <= job_id < 2**63:
        raise errors.JobNotFoundError(job_id)
    return job_id
