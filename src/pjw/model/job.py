"""Jobs, sessions and workspaces as the service describes them, frozen. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from pjw.errors import InvalidJobError
from pjw.model.limits import Limits

# Counted, as bytes and as inodes, for a tree with more levels than a process may have descriptors: no program
# makes such a tree by chance.
TOO_DEEP: Final = 2**60


class JobState(StrEnum):
    """The state of a job in its life. EXITED and LOST are final. A QUEUED job waits to be started.

    UNKNOWN stands at a client for a state that only a newer server knows; such a job has not ended.
    """

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    LOST = "lost"
    QUEUED = "queued"
    UNKNOWN = "unknown"

    @property
    def final(self) -> bool:
        """Whether nothing can happen to the job any more."""
        return self in (JobState.EXITED, JobState.LOST)


# the states that this version knows, in the order of the contract
KNOWN_STATES: Final[tuple[JobState, ...]] = tuple(
    state for state in JobState if state is not JobState.UNKNOWN
)


class EndReason(StrEnum):
    """The reason for the end of a job.

    LOST, HOST_RESTARTED and LAUNCH_INTERRUPTED belong to jobs in the state LOST. DISK_LIMIT: a file system
    that jobs write to was about to be full, and this job was the largest of the client with most.
    OUTPUT_FAILED: the output can never be written. CANCELLED: the job left the queue without a start.
    START_FAILED: its turn came, and its command could not be executed. `Job.detail` gives the cause of these
    two. ARTIFACTS_MISSING: the command ended by itself with exit code 0, and files that had to be kept are
    not there. NODE_LOST: the node of a cluster that ran the job was not heard of for too long; the job is
    LOST. REVOKED: the engine of a cluster took the job's place on its node back, and the node stopped it.
    """

    COMPLETED = "completed"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"
    OUTPUT_LIMIT = "output_limit"
    OOM_KILLED = "oom_killed"
    LOST = "lost"
    HOST_RESTARTED = "host_restarted"
    LAUNCH_INTERRUPTED = "launch_interrupted"
    DISK_LIMIT = "disk_limit"
    OUTPUT_FAILED = "output_failed"
    CANCELLED = "cancelled"
    START_FAILED = "start_failed"
    ARTIFACTS_MISSING = "artifacts_missing"
    NODE_LOST = "node_lost"
    REVOKED = "revoked"


# the ends of jobs out of the queue whose commands were never executed
WITHOUT_START: Final = frozenset({EndReason.CANCELLED, EndReason.START_FAILED})
# a shell adds this to the number of the signal that ended a program
SIGNALLED: Final = 128


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """The end of a command: with a code, or by a signal, whose code is 128 + its number, as in a shell.

    A command may end with such a code by itself: only `signal` tells the two apart.
    """

    code: int = -1
    signal: int | None = None

    def __post_init__(self) -> None:
        if (self.code < 0) == (self.signal is None):
            raise ValueError("an exit status is made of a code or a signal")
        if self.signal is not None:
            object.__setattr__(self, "code", SIGNALLED + self.signal)

    @classmethod
    def of(cls, code: int | None, signal: int | None) -> "ExitStatus | None":
        """Return the status of a code, or of a signal (with or without its code); None for neither."""
        if signal is not None:
            return cls(signal=signal)
        return None if code is None else cls(code)


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of a job, read from its cgroup before that was removed.

    Times in microseconds, sizes in bytes. `oom_kills` is the cgroup's own counter.
    """

    cpu_usage_usec: int = 0
    memory_peak_bytes: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class UsageSample:
    """The usage of a running job at one moment: its processes and memory then, the rest until then.

    Times in microseconds, sizes in bytes; `pids` are processes and threads, init included.
    """

    time: datetime
    cpu_usage_usec: int
    memory_bytes: int
    io_read_bytes: int
    io_write_bytes: int
    pids: int


class Condition(StrEnum):
    """The end that a waiting job requires of another: by itself with exit code 0; otherwise; or either."""

    OK = "ok"
    FAILED = "failed"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class After:
    """A job that another one waits for, and how it has to end. Raises InvalidJobError.

    It is named by its id; or, in a submission of several jobs, `earlier` is its place among them, from 0 on.
    Of an array, `element` is the index of the one element that is waited for.
    """

    job_id: int = 0
    condition: Condition = Condition.OK
    earlier: int | None = None
    element: int | None = None

    def __post_init__(self) -> None:
        if self.earlier is None:
            if type(self.job_id) is not int or not 0 < self.job_id < 2**63:
                raise InvalidJobError(
                    f"a job waits for another by its id, a whole number, not {self.job_id!r:.80}"
                )
        elif type(self.earlier) is not int or not 0 <= self.earlier < 2**31 or self.job_id:
            raise InvalidJobError(
                f"a job waits for another by its id, or by its place from 0 on, not {self.earlier!r:.80}"
            )
        if self.element is not None and (type(self.element) is not int or not 0 <= self.element < 2**63):
            raise InvalidJobError(f"an element of an array has an index from 0 on, not {self.element!r:.80}")
        if self.condition not in list(Condition):
            raise InvalidJobError(
                f"a job waits for an end that is {', '.join(Condition)}, not {self.condition!r:.80}"
            )

    def __str__(self) -> str:
        return f"{self.job_id}:{self.condition}"


@dataclass(frozen=True, slots=True)
class ArrayCounts:
    """The progress of the `count` elements of an array; `indices` as in QueueSpec.

    `succeeded` counts the elements that ended by themselves with exit code 0, `failed` all others whose start
    had begun, `cancelled` those that ended without a start.
    """

    indices: str
    count: int
    waiting: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def running(self) -> int:
        """The number of elements that have been started, and have not ended."""
        return self.count - self.waiting - self.succeeded - self.failed - self.cancelled


class ArtifactsState(StrEnum):
    """The state of the files to keep. PENDING: the job has not ended.

    EMPTY: no file matched. FAILED: they could not be kept, or not all of them. UNKNOWN stands at a client for
    a state that only a newer server knows.
    """

    PENDING = "pending"
    KEPT = "kept"
    EMPTY = "empty"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Artifacts:
    """Files of a job that are kept after its end: `bytes` as an archive.

    `detail` is for a person: why there are none, or which were left out.
    """

    state: ArtifactsState = ArtifactsState.PENDING
    bytes: int = 0
    detail: str = ""
    # whether the job succeeds only with them
    required: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One job at one moment: a snapshot that does not change. Times are in UTC.

    `output_bytes`, stderr included, is known when the job has ended. `detail` is for a person: why a job that
    was killed does not end, or that its output waits for the disk, for as long as that is so. `workdir` is
    the command's first directory; empty for a job that an older pjw started. `usage_now` is the usage of a
    running job, in the answer of `get`; None elsewhere, and when it could not be measured.

    `queued` is when the job was put into the queue, None for one that was started at once. A job that has not
    been started has `queued` as its `start`, too: see `was_started`. `detail` of a QUEUED job says why it
    waits, and of a job that ended without a start why it did. `not_before` is None when that time has come.
    `after` has the jobs that it was to wait for, `unmet` counts those it still waits for. Each attempt of a
    job that is tried again is a job of its own; `wait` and `stop` of an earlier one go on with the newest.

    An array has `array`. It is QUEUED while an element waits, then RUNNING until all have ended; its exit
    code is the highest one of its elements. An element has the id of its array, and an `id` of its own from
    its turn on; until then that is 0.
    """

    id: int
    client_name: str
    command: str
    state: JobState
    limits: Limits
    start: datetime
    end: datetime | None = None
    exit_status: ExitStatus | None = None
    reason: EndReason | None = None
    usage: Usage | None = None
    output_bytes: int | None = None
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    split_stderr: bool = False
    input: bool = False
    detail: str = ""
    workdir: str = ""
    usage_now: UsageSample | None = None
    queued: datetime | None = None
    priority: int = 0
    not_before: datetime | None = None
    held: bool = False
    after: Sequence[After] = ()
    unmet: int = 0
    # the number of this attempt, from 1 on, of a job that may be tried again; 0 for all others
    attempt: int = 0
    # the job that is the next attempt
    retried_as: int | None = None
    array: ArrayCounts | None = None
    # of an element
    array_id: int | None = None
    array_index: int | None = None
    # the directory that outlives it, by its name; empty: none
    workspace: str = ""
    # whether it is alone there
    exclusive: bool = False
    # None of a job that keeps no files
    artifacts: Artifacts | None = None
    # of a cluster, the node that runs it, or ran it; and the only one that may, if its client chose one
    node: str = ""
    chosen_node: str = ""
    # whose files are its root, by its name; empty: the host's are
    image: str = ""
    # whether it can write nothing there
    read_only: bool = False
    # the operator's directories that it has, each as NAME:PATH
    mounts: Sequence[str] = ()
    # the names on the network that it may reach
    allow: Sequence[str] = ()
    # the network that it shares with other jobs of its client, by its name; empty: it has its own
    link: str = ""
    # the number of GPUs that it has for itself
    gpus: int = 0
    # the partition of Slurm's and the feature of its node that its client asked for
    partition: str = ""
    constraint: str = ""

    @property
    def ref(self) -> str:
        """The job's name for a person: an element as `17_5`, any other by its id."""
        return str(self.id) if self.array_id is None else f"{self.array_id}_{self.array_index}"

    @property
    def was_started(self) -> bool:
        """Whether the job's start has begun, and was not taken back."""
        return self.state is not JobState.QUEUED and self.reason not in WITHOUT_START

    @property
    def asked(self) -> datetime:
        """The time of the request: for the queue, or for a start at once."""
        return self.queued or self.start

    @property
    def succeeded(self) -> bool:
        """Whether the command ended by itself, with exit code 0."""
        return self.reason is EndReason.COMPLETED and self.exit_status == ExitStatus(0)

    def meets(self, condition: Condition) -> bool:
        """Return whether the end of this job, which has ended, is one that another job waits for."""
        return condition is Condition.ANY or (condition is Condition.OK) is self.succeeded


@dataclass(frozen=True, slots=True)
class Workspace:
    """A directory of a client that outlives jobs, at one moment. Times are in UTC.

    `used` is when a job was last started in it or ended there. `bytes` and `inodes` are as last counted:
    after each end of a job there, and once a minute while jobs use it. `jobs` are those that have not ended.
    """

    name: str
    made: datetime
    used: datetime
    bytes: int = 0
    inodes: int = 0
    jobs: int = 0
    client_name: str = ""


@dataclass(frozen=True, slots=True)
class JobChange:
    """A change of a job's state: the job as it was then, with 256 characters of its command at most.

    `sequence` is the number to resume behind; it and `time` are None for a job in the state of the
    beginning. A job that was `removed` has the state in which it ended.
    """

    job: Job
    sequence: int | None = None
    time: datetime | None = None
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    """Another command in a job that runs, at one moment: a snapshot that does not change. Times are in UTC.

    `number` counts the sessions of the job from 1 on. `exit_status` is missing while it runs, and in a
    session that is LOST: its end was never recorded. A session that its job's end killed has ended by signal
    9. `detached`: it stays when its client goes. `terminal`: its stdin, stdout and stderr are one.
    """

    job_id: int
    number: int
    command: str
    state: JobState
    start: datetime
    end: datetime | None = None
    exit_status: ExitStatus | None = None
    reason: EndReason | None = None
    input: bool = False
    detached: bool = False
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a caller: the client's name, and the serial number of its certificate."""

    client_name: str
    serial: int
