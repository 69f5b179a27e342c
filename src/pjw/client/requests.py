"""The calls of the service: each request, and the meaning of its answer. This neither sends nor waits."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Generic, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from pjw import errors
from pjw.arrays import Element
from pjw.client.retry import CALL_SECONDS
from pjw.model import (
    KNOWN_STATES,
    PORT_MAX,
    SUBMITTED_MAX,
    After,
    Archive,
    ClientQuota,
    EndReason,
    Image,
    ImageConfig,
    Job,
    JobSpec,
    JobState,
    Session,
    TerminalSize,
    UsageSample,
    Workspace,
    check_image,
    check_workspace,
)
from pjw.rpc.convert import (
    archive_to_message,
    exec_to_message,
    image_config_to_message,
    image_from_message,
    job_from_message,
    queued_to_message,
    quota_from_message,
    sample_from_message,
    session_from_message,
    spec_to_message,
    terminal_to_message,
    timestamp,
    workspace_from_message,
)
from pjw.v1 import job_worker_pb2 as pb

T = TypeVar("T")
# A job's spec, or its command alone: text for the shell, or a program and its arguments.
Startable = JobSpec | str | Sequence[str]
# A number, or text as in the JSON of a job; for an element of an array "17_5", in calls about one job.
JobId = int | str
PAGE_MAX: Final = 1000
# of Linux, where jobs run
SIGKILL: Final = 9
# the calls that make jobs
_MAKING: Final = ("Start", "Submit")
# The progress of a call, and a next step: for when its connection is lost for good.
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


class FinishedSession(NamedTuple):
    """A session that has ended, and all of its output."""

    session: Session
    output: bytes
    stderr: bytes


class UsageHistory(NamedTuple):
    """A job, and its usage over its life."""

    job: Job
    samples: list[UsageSample]


class JobUsage(NamedTuple):
    """A running job, and its usage until now."""

    job: Job
    sample: UsageSample


class UsageSnapshot(list[JobUsage]):
    """The usage of begun jobs; `queued` counts those in the queue, `waiting` has the oldest of them."""

    def __init__(self, usages: Iterable[JobUsage] = (), queued: int = 0, waiting: Sequence[Job] = ()) -> None:
        super().__init__(usages)
        self.queued: Final = queued
        self.waiting: Final = waiting


Jobs = list[Job]
FinishedJobs = list[Finished]
# a class with a method `list` cannot name the type
Workspaces = list[Workspace]
Images = list[Image]


# not a dataclass, which takes half a millisecond to make: every `pjw get` would pay it
class Call(NamedTuple, Generic[T]):
    """One call with one answer."""

    method: str
    request: Message
    result: Callable[[Any], T]
    job_id: int = 0
    spec: JobSpec | None = None
    timeout: float | None = CALL_SECONDS
    # whether a repeated call that finds no job counts as done: the first one has done it
    gone_is_done: bool = False

    @property
    def outlasts_restart(self) -> bool:
        """Whether a client that was never answered waits for a server that restarts."""
        return self.method in _MAKING

    @property
    def facts(self) -> Mapping[str, object]:
        """The facts that the caller knows of an error of this call."""
        if self.spec is not None:
            asked: dict[str, object] = {
                "program": next(iter(self.spec.argv), ""),
                "workdir": self.spec.workdir,
            }
            return {**asked, "job_id": self.job_id} if self.job_id else asked
        return {"job_id": self.job_id} if self.job_id else {}

    @property
    def reached(self) -> Reached:
        """The possible progress of a call without an answer, and a next step."""
        if self.method == "Start":
            return " before the answer came", "the job may have started: see pjw list"
        if self.method == "Exec":
            return " before the answer came", "the command may have started; it is hung up after two minutes"
        if self.method == "Submit":
            return " before the answer came", "the jobs may be in the queue: see pjw queue"
        if self.method in ("Wait", "Stop"):
            return (
                " before the answer came",
                f"see pjw get {self.job_id}",
            )
        return " before the answer came", None


def start(asked: Startable) -> Call[Job]:
    """Start a job. A request id makes the call repeatable: it is made up where none is given."""
    spec = _repeatable(JobSpec.of(asked))
    if spec.queue is not None:
        request = pb.SubmitRequest(jobs=[queued_to_message(spec)])
        return Call("Submit", request, lambda answer: _job(answer.jobs[0]), spec=spec)
    return Call("Start", spec_to_message(spec), _job_of_answer, spec=spec)


def submit(asked: Iterable[Startable]) -> Call[Jobs]:
    """Put jobs into the queue, all or none; repeatable as `start`."""
    jobs = [queued_to_message(_repeatable(JobSpec.of(each))) for each in asked]
    return Call("Submit", pb.SubmitRequest(jobs=jobs), lambda answer: list(map(_job, answer.jobs)))


def submissions(asked: Iterable[Startable]) -> Iterator[Call[Jobs]]:
    """Yield as many calls as jobs take, each of them all or none."""
    rest = iter(asked)
    first = True
    while some := [JobSpec.of(each) for each in islice(rest, SUBMITTED_MAX)]:
        if any(spec.queue and spec.queue.array for spec in some):
            raise errors.InvalidJobError(
                "an array has no output of its own: run_many cannot return it",
                hint="submit() it, then wait()",
            )
        if not first and any(
            spec.queue and any(_is_placed(each) for each in spec.queue.after) for spec in some
        ):
            raise errors.InvalidJobError(
                f"jobs that wait for earlier ones by their place are at most {SUBMITTED_MAX}",
                hint="submit them in parts, and name jobs of another part by their ids",
            )
        yield submit(some)
        first = False


def _is_placed(after: After) -> bool:
    return after.earlier is not None


def _repeatable(spec: JobSpec) -> JobSpec:
    if spec.request_id:
        return spec
    # as many random bits as a UUID has, and then some, without the import of its module
    return replace(spec, request_id=os.urandom(16).hex())


def hold(job_id: JobId, *, all_clients: bool) -> Call[Job]:
    """Keep a job in the queue."""
    job = wire_ref(job_id)
    return Call("Hold", pb.HoldRequest(**job, all_clients=all_clients), _job_of_answer, job["id"])


def release(job_id: JobId, *, all_clients: bool) -> Call[Job]:
    """Let a held job be started."""
    job = wire_ref(job_id)
    return Call("Release", pb.ReleaseRequest(**job, all_clients=all_clients), _job_of_answer, job["id"])


def with_input(asked: Startable, data: bytes | None) -> JobSpec:
    """Return the spec of a job that reads *data*, if there is any."""
    spec = JobSpec.of(asked)
    return spec if data is None else replace(spec, input=True)


def execute(job_id: JobId, asked: Startable, *, detach: bool) -> Call[Session]:
    """Start another command in a job that runs; repeatable as a start is."""
    number = wire_id(job_id)
    spec = _repeatable(JobSpec.of(asked))
    return Call("Exec", exec_to_message(number, spec, detached=detach), _session_of_answer, number, spec)


def archive(job_id: JobId, archive: Archive) -> Call[Session]:
    """Pack or unpack files in a job that runs; repeatable as a start is."""
    number = wire_id(job_id)
    request = archive_to_message(number, archive, os.urandom(16).hex())
    return Call("Exec", request, _session_of_answer, number)


LeftOut = list[str]


# directories and files of this machine, each alone or with a path in the job's own directory
UploadSources = Iterable[str | tuple[str, str]]


class Uploaded(NamedTuple):
    """Files for a job to be started: the name for `JobSpec.upload`, and the files left out."""

    name: str
    bytes: int
    left_out: list[str]


class LoadedImage(NamedTuple):
    """An image of the client's own, and the parts of its source that were left out, in words."""

    image: Image
    left_out: list[str]


def upload_name() -> str:
    """Return a name that no other upload has."""
    return os.urandom(16).hex()


def copying(job_id: JobId, path: str) -> str:
    """Return the beginning of an error about a copy into or out of a job."""
    place = path if path.isprintable() else ascii(path)[1:-1]
    return f"cannot copy {place} of job {job_id}"


def listing(job_id: JobId) -> str:
    """Return the beginning of an error about a list of a job's artifacts."""
    return f"cannot list the artifacts of job {job_id}"


# The most that the program which packs and unpacks may write: more is the job's own doing.
SAID_BYTES_MAX: Final = 64 * 1024


def archive_failure(what: str, session: Session, why: str) -> errors.PjwError:
    """Return the error for an archive that was not made, or not made into files."""
    if session.reason is EndReason.OUTPUT_LIMIT:
        return errors.LimitReachedError(
            f"{what}: the archive is larger than the job's limit of output",
            hint="copy a part of it, or start the job with a higher --output",
        )
    if session.exit_status is not None and session.exit_status.signal == SIGKILL:
        return errors.CopyError(f"{what}: what does it was killed, by the job's end or its limit of memory")
    return errors.CopyError(f"{what}: {why}")


def wait_session(job_id: JobId, session: int) -> Call[Session]:
    """Build the call that waits without a time limit until a session ends."""
    number = wire_id(job_id)
    request = pb.WaitRequest(id=number, session=session)
    return Call("Wait", request, _session_of_answer, number, timeout=None)


def stop_session(job_id: JobId, session: int) -> Call[Session]:
    """End a session."""
    number = wire_id(job_id)
    request = pb.StopRequest(id=number, session=session)
    return Call("Stop", request, _session_of_answer, number, timeout=None)


def resize(job_id: JobId, size: TerminalSize, session: int) -> Call[None]:
    """Give a terminal another size."""
    number = wire_id(job_id)
    request = pb.ResizeRequest(id=number, session=session, terminal=terminal_to_message(size))
    return Call("Resize", request, lambda _: None, number)


def connection(job_id: JobId, port: int) -> pb.ForwardRequest:
    """Build the first request for a connection to a job's port. Raises InvalidJobError for a bad port."""
    if not 1 <= port <= PORT_MAX:
        raise errors.InvalidJobError(f"a port is a number from 1 to {PORT_MAX}, not {port}")
    return pb.ForwardRequest(id=wire_id(job_id), port=port)


def get(job_id: JobId, *, all_clients: bool) -> Call[Job]:
    """Build the call for one job."""
    job = wire_ref(job_id)
    return Call("Get", pb.GetRequest(**job, all_clients=all_clients), _job_of_answer, job["id"])


def wait(job_id: JobId, *, or_stuck: bool, all_clients: bool) -> Call[Job]:
    """Build the call that waits without a time limit for a job's end; with *or_stuck* also if it is stuck."""
    job = wire_ref(job_id)
    request = pb.WaitRequest(**job, or_stuck=or_stuck, all_clients=all_clients)
    return Call("Wait", request, _job_of_answer, job["id"], timeout=None)


def stop(job_id: JobId, grace: float | None, signal: int, *, all_clients: bool) -> Call[Job]:
    """Stop a job. Without a deadline: its grace period is the server's matter."""
    job = wire_ref(job_id)
    request = pb.StopRequest(**job, all_clients=all_clients, signal=signal)
    if grace is not None:
        request.grace.CopyFrom(_duration(grace, "the grace period"))
    return Call("Stop", request, _job_of_answer, job["id"], timeout=None)


def delete(job_id: JobId, *, all_clients: bool) -> Call[None]:
    """Forget an ended job."""
    job = wire_ref(job_id)
    request = pb.DeleteRequest(**job, all_clients=all_clients)
    return Call("Delete", request, lambda _: None, job["id"], gone_is_done=True)


def usage_history(job_id: JobId, *, all_clients: bool) -> Call[UsageHistory]:
    """Build the call for a job's usage over its life."""
    number = wire_id(job_id)
    request = pb.GetUsageHistoryRequest(id=number, all_clients=all_clients)
    return Call("GetUsageHistory", request, _history_of_answer, number)


def quota(client_name: str, *, all_clients: bool) -> Call[ClientQuota]:
    """Build the call for a client's limits, the present usage of its jobs, and its share of the machine."""
    request = pb.GetQuotaRequest(client_name=client_name, all_clients=all_clients)
    return Call("GetQuota", request, quota_from_message)


def remove_workspace(name: str) -> Call[None]:
    """Remove a workspace. Without a deadline: it may have millions of files. Raises InvalidJobError."""
    check_workspace(name)
    request = pb.RemoveWorkspaceRequest(name=name)
    return Call("RemoveWorkspace", request, lambda _: None, timeout=None, gone_is_done=True)


def images(*, all_clients: bool) -> Call[Images]:
    """Build the call for the images that our jobs can have, or those of every client."""
    request = pb.ListImagesRequest(all_clients=all_clients)
    return Call("ListImages", request, lambda answer: list(map(image_from_message, answer.images)))


def load_image(name: str, upload: str, config: ImageConfig, digest: str) -> Call[Image]:
    """Make an image of an upload. Without a deadline: a job unpacks it. Raises InvalidJobError."""
    check_image(name)
    request = pb.LoadImageRequest(
        name=name, upload=upload, config=image_config_to_message(config), digest=digest
    )
    return Call("LoadImage", request, lambda answer: image_from_message(answer.image), timeout=None)


def remove_image(name: str) -> Call[None]:
    """Take the name from an image. Raises InvalidJobError."""
    check_image(name)
    request = pb.RemoveImageRequest(name=name)
    return Call("RemoveImage", request, lambda _: None, gone_is_done=True)


class WorkspacePages:
    """Our workspaces, or those of every client, page by page: `next` is the next call, None without one."""

    def __init__(self, *, all_clients: bool) -> None:
        self._request: Final = pb.ListWorkspacesRequest(all_clients=all_clients)
        self.next: Call[Workspaces] | None = Call("ListWorkspaces", self._request, self._take)

    def _take(self, answer: pb.ListWorkspacesResponse) -> Workspaces:
        self._request.page_token = answer.next_page_token
        if not answer.next_page_token:
            self.next = None
        return list(map(workspace_from_message, answer.workspaces))


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
        array_id: JobId | None = None,
    ) -> None:
        self._left = limit
        self._request: Final = pb.ListRequest(
            states=wire_states(states),
            labels=checked_labels(labels),
            name=name,
            newest_first=newest_first,
            all_clients=all_clients,
            array_id=None if array_id is None else wire_id(array_id),
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
    """The position of a reader of output, and the request that goes on from there."""

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
        session: int = 0,
        artifacts: bool = False,
    ) -> None:
        if not -(2**63) <= offset < 2**63:
            raise errors.OffsetError(f"cannot read output from byte {offset}: no output is as long")
        job = wire_ref(job_id)
        self.job_id: Final = job["id"]
        self.facts: Final = {"job_id": self.job_id}
        self.seen = 0
        # the server's first answer says at which offset the last lines, or the time, begin
        self._placed = tail is None and since is None
        self.request: Final = pb.LogsRequest(
            **job,
            offset=offset,
            all_clients=all_clients,
            stream=pb.OUTPUT_STREAM_STDERR if stderr else pb.OUTPUT_STREAM_UNSPECIFIED,
            no_follow=not follow,
            tail_lines=tail,
            timestamps=timestamps,
            session=session,
            artifacts=artifacts,
            since=None if since is None else timestamp(since.astimezone(UTC)),
        )

    def take(self, answer: pb.LogsResponse) -> bytes | None:
        """Return the bytes of an answer, if it has some; the next request begins behind them."""
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
        """Return the bytes of an answer with their time, as `take` does."""
        time = answer.time.ToDatetime(UTC) if answer.HasField("time") else None
        data = self.take(answer)
        return None if data is None else TimedOutput(time, data)

    def lost(self) -> None:
        """Change nothing: the request already says where to go on."""

    @property
    def reached(self) -> Reached:
        """The progress of the stream, and the next step when it gets no further."""
        if self.request.artifacts:
            return f" after {self.seen} bytes of artifacts", "the server keeps them: try again"
        return (
            f" after {self.seen} bytes of output",
            f"job {self.job_id} goes on without it: pjw logs {self.job_id}",
        )


def artifacts(job_id: JobId, *, all_clients: bool) -> LogsPosition:
    """Build the position at the first byte of a job's artifacts."""
    return LogsPosition(
        job_id, 0, None, None, follow=False, stderr=False, all_clients=all_clients, artifacts=True
    )


class UsageWatch:
    """The usage of running jobs, again and again."""

    method: Final = "WatchUsage"
    facts: Final[Mapping[str, object]] = {}
    gone_is_done: Final = False
    reached: Final[Reached] = ("", None)

    def lost(self) -> None:
        """Change nothing: no part of the stream comes twice."""

    def __init__(self, interval: float | None, *, all_clients: bool) -> None:
        self.request: Final = pb.WatchUsageRequest(all_clients=all_clients)
        if interval is not None:
            self.request.interval.CopyFrom(_duration(interval, "the interval"))

    @staticmethod
    def take(answer: pb.WatchUsageResponse) -> UsageSnapshot:
        """Return the jobs of an answer."""
        usages = (JobUsage(_job(usage.job), sample_from_message(usage.sample)) for usage in answer.jobs)
        return UsageSnapshot(usages, answer.queued, list(map(_job, answer.waiting)))


class Stream(Protocol):
    """A call with a stream of answers, which is made again when its connection is lost."""

    @property
    def method(self) -> str:
        """The name of the call."""

    @property
    def request(self) -> Message:
        """The request that begins the stream, or goes on with it."""

    @property
    def facts(self) -> Mapping[str, object]:
        """See `retry.Asked`."""

    @property
    def gone_is_done(self) -> bool:
        """See `retry.Asked`."""

    @property
    def reached(self) -> Reached:
        """See `retry.Asked`."""

    def lost(self) -> None:
        """Note that the connection was lost."""


def _session_of_answer(answer: Any) -> Session:  # noqa: ANN401  every answer with one session
    try:
        return session_from_message(answer.session)
    except ValueError as error:
        raise not_understood(error) from error


def _job_of_answer(answer: Any) -> Job:  # noqa: ANN401  every answer with one job
    return _job(answer.job)


def _history_of_answer(answer: pb.GetUsageHistoryResponse) -> UsageHistory:
    return UsageHistory(_job(answer.job), [sample_from_message(sample) for sample in answer.samples])


def _job(message: pb.Job) -> Job:
    try:
        return job_from_message(message)
    except ValueError as error:
        raise not_understood(error) from error


def not_understood(error: ValueError) -> errors.ServerFailedError:
    """Return the error for an answer that only a newer server sends."""
    return errors.ServerFailedError(
        f"cannot understand the answer of the server: {error}", hint="is it newer than this client?"
    )


def wire_states(states: Iterable[JobState | str]) -> "list[pb.JobState.ValueType]":
    """Return states for a message; a single one may be given alone. Raises InvalidJobError."""
    return [pb.JobState.Value(f"JOB_STATE_{_state(state).name}") for state in _each(states)]


def _each(states: Iterable[JobState | str]) -> Iterable[JobState | str]:
    # a single state is text: do not iterate over its letters
    return [states] if isinstance(states, str) else states


def _state(state: JobState | str) -> JobState:
    if state not in KNOWN_STATES:
        raise errors.InvalidJobError(
            f"no state of a job is called {state!r:.80}; there are {', '.join(KNOWN_STATES)}"
        )
    return JobState(state)


def checked_labels(labels: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return labels for a message. Raises InvalidJobError."""
    if labels is not None and not isinstance(labels, Mapping):
        raise errors.InvalidJobError(f"labels are names with values (a dict), not {labels!r:.80}")
    return labels


def _duration(seconds: float, what: str) -> Duration:
    if not 0 <= seconds < 1e9:
        raise errors.InvalidJobError(f"{what} must be a number of seconds from 0 on, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


class WireRef(TypedDict):
    """The fields that name a job, or an element of an array, in a message."""

    id: int
    element: NotRequired[int]


def wire_ref(job_id: JobId) -> WireRef:
    """Return the fields that name a job, or an element of an array ("17_5"). Raises as `wire_id`."""
    element = Element.of(job_id) if isinstance(job_id, str) else None
    if element is None:
        return {"id": wire_id(job_id)}
    return {"id": element.array_id, "element": element.index}


def wire_id(job_id: JobId) -> int:
    """Return a job's id as a number for the message; the caller may give it as text, as in the job's JSON.

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
