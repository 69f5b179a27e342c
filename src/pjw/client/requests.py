"""What is asked of the service: a request, and what its answer means. Neither sends nor waits."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from pjw import errors
from pjw.client.failures import CALL_SECONDS
from pjw.model import Job, JobSpec, JobState, UsageSample
from pjw.rpc.convert import job_from_message, sample_from_message, spec_to_message
from pjw.v1 import job_worker_pb2 as pb

T = TypeVar("T")
PAGE_MAX: Final = 1000
# How far a call has got, and a next step: for when its connection is lost for good.
Reached = tuple[str, str | None]


class TimedOutput(NamedTuple):
    """Output, and when the job wrote it; None where that was not recorded."""

    time: datetime | None
    data: bytes


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
    program: str = ""
    timeout: float | None = CALL_SECONDS
    # what it means that a call that was made twice finds no job: that the first one has done it
    gone_is_done: bool = False

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


def start(spec: JobSpec) -> Call[Job]:
    """Start a job. A request id makes the call repeatable: it is made up where none is given."""
    if not spec.request_id:
        # as many random bits as a UUID has, and then some, without the import of its module
        spec = replace(spec, request_id=os.urandom(16).hex())
    return Call("Start", spec_to_message(spec), _job_of_answer, program=spec.argv[0])


def get(job_id: int, *, all_clients: bool) -> Call[Job]:
    """One job."""
    return Call("Get", pb.GetRequest(id=wire_id(job_id), all_clients=all_clients), _job_of_answer, job_id)


def wait(job_id: int, *, all_clients: bool) -> Call[Job]:
    """One job when it has ended, however long that takes."""
    request = pb.WaitRequest(id=wire_id(job_id), all_clients=all_clients)
    return Call("Wait", request, _job_of_answer, job_id, timeout=None)


def stop(job_id: int, grace: float | None, signal: int, *, all_clients: bool) -> Call[Job]:
    """Stop a job. Without a deadline: its grace period is the server's matter."""
    request = pb.StopRequest(id=wire_id(job_id), all_clients=all_clients, signal=signal)
    if grace is not None:
        request.grace.CopyFrom(_duration(grace, "the grace period"))
    return Call("Stop", request, _job_of_answer, job_id, timeout=None)


def delete(job_id: int, *, all_clients: bool) -> Call[None]:
    """Forget an ended job."""
    request = pb.DeleteRequest(id=wire_id(job_id), all_clients=all_clients)
    return Call("Delete", request, lambda _: None, job_id, gone_is_done=True)


def usage_history(job_id: int, *, all_clients: bool) -> Call[UsageHistory]:
    """What a job used over its life."""
    request = pb.GetUsageHistoryRequest(id=wire_id(job_id), all_clients=all_clients)
    return Call("GetUsageHistory", request, _history_of_answer, job_id)


class Pages:
    """A list, page by page: `next` is the next call; its result is the jobs that go on it."""

    def __init__(
        self,
        states: Iterable[JobState],
        labels: Mapping[str, str] | None,
        name: str,
        limit: int | None,
        *,
        newest_first: bool,
        all_clients: bool,
    ) -> None:
        self._left = limit
        self._request: Final = pb.ListRequest(
            states=[pb.JobState.Value(f"JOB_STATE_{state.name}") for state in states],
            labels=labels,
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
    program: Final = ""
    gone_is_done: Final = False

    def __init__(
        self,
        job_id: int,
        offset: int,
        tail: int | None,
        *,
        follow: bool,
        stderr: bool,
        all_clients: bool,
        timestamps: bool = False,
    ) -> None:
        if not -(2**63) <= offset < 2**63:
            raise errors.OffsetError(f"cannot read output from byte {offset}: no output is as long")
        self.job_id: Final = job_id
        self.seen = 0
        # where the last lines begin is the server's to say, in its first answer
        self._placed = tail is None
        self.request: Final = pb.LogsRequest(
            id=wire_id(job_id),
            offset=offset,
            all_clients=all_clients,
            stream=pb.OUTPUT_STREAM_STDERR if stderr else pb.OUTPUT_STREAM_UNSPECIFIED,
            no_follow=not follow,
            tail_lines=tail,
            timestamps=timestamps,
        )

    def take(self, answer: pb.LogsResponse) -> bytes | None:
        """The bytes of an answer, if it has some; the next request begins behind them."""
        data = answer.data
        if not self._placed:
            self._placed = True
            self.request.offset = answer.offset
            self.request.ClearField("tail_lines")
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
    job_id: Final = 0
    program: Final = ""
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
            f"cannot understand the answer of the server: {error}", hint="is it newer than this client?"
        ) from error


def _duration(seconds: float, what: str) -> Duration:
    if not 0 <= seconds < 1e9:
        raise errors.InvalidJobError(f"{what} must be a number of seconds from 0 on, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def wire_id(job_id: int) -> int:
    """An id that fits into the message. Raises JobNotFoundError: one that does not is nobody's."""
    if not -(2**63) <= job_id < 2**63:
        raise errors.JobNotFoundError(job_id)
    return job_id
