"""The values that describe a job, frozen, each checking itself. No I/O."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Final, Self

from pjw.errors import InvalidJobError, LimitRangeError, MountNotFoundError

# execve(2): one argument holds at most MAX_ARG_STRLEN bytes, its NUL included. The bound
# on all of them is ours: far below ARG_MAX, far above any command that a person types.
ARGUMENT_MAX_BYTES: Final = 131_071
ARGUMENTS_MAX_BYTES: Final = 524_288

# init and the command are two processes; below 10 millicores the quota is under the
# kernel's minimum of 1 ms in a period of 100 ms; below 2 MiB exec itself runs out of memory;
# cgroup v2 refuses an io limit of 1.
LIMIT_MINIMUM: Final[Mapping[str, int]] = {
    "cpu_max_millicores": 10,
    "memory_max_bytes": 2 * 1024 * 1024,
    "pids_max": 2,
    "io_rbps_max": 2,
    "io_wbps_max": 2,
    "io_riops_max": 2,
    "io_wiops_max": 2,
}
LIMIT_MAXIMUM: Final = 2**62
# Each limit in words: its label in a table, and its meaning.
LIMIT_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "cpu_max_millicores": ("processors", "thousandths of a processor"),
    "memory_max_bytes": ("memory", "memory, its file systems in memory included; swap is off"),
    "pids_max": ("processes", "processes and threads"),
    "io_rbps_max": ("read/s", "bytes a second that are read from disk"),
    "io_wbps_max": ("written/s", "bytes a second that are written to disk"),
    "io_riops_max": ("reads/s", "reads a second from disk"),
    "io_wiops_max": ("writes/s", "writes a second to disk"),
    "output_max_bytes": ("output", "bytes of output; then the job is killed"),
    "time_max_seconds": ("time", "the longest that a job may run; then it is killed"),
}
LABELS_MAX: Final = 32
LABEL_VALUE_MAX_CHARACTERS: Final = 255
PATH_MAX_BYTES: Final = 4095
# the default working directory, as the job sees it: its scratch directory
JOB_DIRECTORY: Final = "/run/job"
# where a job has its workspace, as it sees it; the directory that outlives it
WORKSPACE_DIRECTORY: Final = "/run/workspace"
# where a job has a mount of the operator's unless it asks for another place, by the mount's name
MOUNT_DIRECTORY: Final = "/mnt"
# of one job, and of one operator: each is a descriptor of a launch, and part of the launcher's first message
MOUNTS_MAX: Final = 8
OFFERED_MAX: Final = 64
MOUNT_PATH_MAX_BYTES: Final = 255
# of one job: as many as one machine has, and far more
GPUS_MAX: Final = 64
# the directories of CDI files, and the patterns of clients that may have GPUs
CDI_DIRS_MAX: Final = 8
# Counted, as bytes and as inodes, for a tree with more levels than a process may have descriptors: no program
# makes such a tree by chance.
TOO_DEEP: Final = 2**60
# Sums, of one client's jobs or of all jobs, have higher minimums than one job. With less processor time
# the quota would be under the kernel's minimum of 1 ms in the shorter period that sums have.
SUM_MINIMUM: Final[Mapping[str, int]] = {
    "memory_max_bytes": 16 * 1024 * 1024,
    "pids_max": 16,
    "cpu_max_millicores": 100,
}
# as cpu.weight and io.weight of cgroup v2 have it
WEIGHT_DEFAULT: Final = 100
WEIGHT_MAXIMUM: Final = 10_000
PRIORITY_MAXIMUM: Final = 1000
AFTER_MAX: Final = 100
RETRIES_MAX: Final = 100
BACKOFF_SECONDS_MAX: Final = 3600
# for a job that is lost again and again: it may itself be the cause
LOST_RETRIES_MAX: Final = 3

# as struct winsize of the kernel has it
TERMINAL_MAXIMUM: Final = 65_535
# of TCP
PORT_MAX: Final = 65_535
# The number of jobs that one call puts into the queue. The table stores them in one transaction, and no other
# call can use the table for 45 ms.
SUBMITTED_MAX: Final = 500

# shown as the command of a job that uses its image's command, until it begins
IMAGES_OWN_COMMAND: Final = "(of the image)"
OUTPUTS_MAX: Final = 32
OUTPUT_MAX_BYTES: Final = 1024

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_IMAGE_CONFIG_CHARACTERS_MAX: Final = 64 * 1024
_IMAGE_KEY: Final = re.compile(r"@[0-9a-f]{16}")
_IMAGE_DIGEST: Final = re.compile(r"sha256-[0-9a-f]{64}")
_LABEL_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9._/-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# of a partition of Slurm's, and of a feature of its nodes: one, and no expression
_SLURM_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,60}")
# no '.', which divides the keys of a configuration
_MOUNT_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
# a client's name (certs/profile.py), or a pattern of some
_CLIENTS: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._@+*-]{0,63}")
# a kind of devices, as CDI has it: vendor.example/class
_KIND: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]{0,61}[A-Za-z0-9]")
# the keys of a job's spec that are text
_TEXTS: Final = (
    *("name", "workdir", "request_id", "upload", "workspace", "image", "link", "node"),
    *("partition", "constraint"),
)
# where a job may have no mount, but in its own directory and its workspace
_SYSTEM: Final = ("/dev", "/proc", "/run", "/sys")
_UPLOAD: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,64}")


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
class Limits:
    """The most that a job may use, as cgroups(7) count it. 0 is "no limit" in every field.

    A name ends with its unit: `cpu_max_millicores` in thousandths of a processor, `io_rbps_max` in bytes and
    `io_riops_max` in reads a second: docs/limits.md. Raises InvalidJobError, and LimitRangeError for a limit
    that is too low for any job.

    Reads from disk have none by default: a read that is held back holds up every process that reads the same
    file.
    """

    cpu_max_millicores: int = 1000
    memory_max_bytes: int = 512 * 1024**2
    pids_max: int = 512
    io_rbps_max: int = 0
    io_wbps_max: int = 256 * 1024**2
    io_riops_max: int = 0
    io_wiops_max: int = 10_000
    output_max_bytes: int = 10 * 1024**3
    time_max_seconds: int = 0

    def __post_init__(self) -> None:
        for name, value in self.items():
            # bool is an int in Python, but no number of anything
            if type(value) is not int or not 0 <= value <= LIMIT_MAXIMUM:
                raise InvalidJobError(
                    f"limit {name} must be a whole number from 0 to 2^62, not {_said(value)}"
                )
            least = LIMIT_MINIMUM.get(name, 0)
            if 0 < value < least:
                raise LimitRangeError(
                    f"limit {name} must be at least {least}, not {value}",
                    limit=name,
                    value=value,
                    least=least,
                )

    def items(self) -> list[tuple[str, int]]:
        """Return every limit as (name, value), in the order of the fields."""
        return [(name, getattr(self, name)) for name in _LIMIT_NAMES]

    def first_above(self, ceiling: "Limits") -> str | None:
        """Name the first limit that *ceiling* does not allow; "no limit" is above any number."""
        for name, value in self.items():
            highest = getattr(ceiling, name)
            if highest and (value == 0 or value > highest):
                return name
        return None

    def first_below(self, floor: "Limits") -> str | None:
        """Name the first limit that is below *floor*; "no limit" is not, and a floor of 0 is no floor."""
        for name, value in self.items():
            if 0 < value < getattr(floor, name):
                return name
        return None

    def lowered_to(self, other: "Limits") -> Self:
        """Return these floors, each lowered to that limit of *other*; "no limit" lowers none."""
        lower = {name: min(getattr(self, name), value) for name, value in other.items() if value}
        return replace(self, **lower)

    def with_overrides(self, overrides: Mapping[str, int | str]) -> Self:
        """Return these limits with some replaced.

        Raises InvalidJobError for an unknown name or a wrong value, and LimitRangeError as the class does.
        """
        if not overrides:
            return self
        unknown = set(overrides) - set(_LIMIT_NAMES)
        if unknown:
            raise InvalidJobError(
                f"no limit is called {min(unknown, key=str)!r}", hint=f"there are: {', '.join(_LIMIT_NAMES)}"
            )
        return replace(self, **limit_numbers(overrides))


# looked up once: each start looks at every limit several times
_LIMIT_NAMES: Final = tuple(f.name for f in fields(Limits))


def limit_numbers(limits: Mapping[str, int | str]) -> dict[str, int]:
    """Return the same limits as numbers: a size may be text (`64M`), and so may the time (`1h30m`).

    Raises InvalidJobError. `Limits` refuses values that are neither text nor a valid number.
    """
    return {name: _limit_number(name, value) for name, value in limits.items()}


def _limit_number(name: str, value: int | str) -> int:
    if not isinstance(value, str):
        return value
    # imported here, so that the launcher, which is root, does not load it
    from pjw import amounts

    try:
        if name.endswith(("bytes", "bps_max")):
            return amounts.size(value)
        if name.endswith("seconds"):
            return amounts.whole_seconds(value)
    except ValueError as error:
        raise InvalidJobError(f"limit {name}: {error}") from None
    raise InvalidJobError(f"limit {name} must be a whole number, not {value[:80]!r}")


@dataclass(frozen=True, slots=True)
class Sums:
    """The most that jobs may use together: a client's, or all. 0 is "no limit" in every field."""

    memory_max_bytes: int = 0
    pids_max: int = 0
    cpu_max_millicores: int = 0

    def __post_init__(self) -> None:
        for name, value in self.items():
            if type(value) is not int or not 0 <= value <= LIMIT_MAXIMUM:
                raise InvalidJobError(f"the sum {name} must be a whole number from 0 to 2^62")
            if 0 < value < SUM_MINIMUM[name]:
                raise InvalidJobError(f"the sum {name} must be at least {SUM_MINIMUM[name]}, not {value}")

    def items(self) -> list[tuple[str, int]]:
        """Return every sum as (name, value), in the order of the fields."""
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    def within(self, other: "Sums") -> "Sums":
        """Return of each sum the lower one of both; "no limit" is above any number."""
        mine, its = dict(self.items()), dict(other.items())
        return Sums(**{name: min(filter(None, (mine[name], its[name])), default=0) for name in mine})


NO_SUMS: Final = Sums()


@dataclass(frozen=True, slots=True)
class Share:
    """A client's part of the host: its weight beside other clients with jobs, and its sums."""

    weight: int = WEIGHT_DEFAULT
    sums: Sums = NO_SUMS

    def __post_init__(self) -> None:
        if type(self.weight) is not int or not 1 <= self.weight <= WEIGHT_MAXIMUM:
            raise InvalidJobError(f"a weight must be a whole number from 1 to {WEIGHT_MAXIMUM}")


DEFAULT_SHARE: Final = Share()


@dataclass(frozen=True, slots=True)
class GroupUse:
    """The usage of one client's jobs together at one moment; processor time since its first job began."""

    memory_bytes: int = 0
    pids: int = 0
    cpu_usage_usec: int = 0


@dataclass(frozen=True, slots=True)
class ClientQuota:
    """The limits of one client, its present usage, and its share of the machine; 0 is "no limit".

    Sizes in bytes. `total_weight` is the sum of the weights of all clients with jobs, `weight` this client's.
    `memory_promised_bytes` is the sum of the memory limits of its running jobs. `stored_bytes` is the output
    of all its jobs, and the input and scratch of those that have not ended.
    """

    client_name: str
    # the limits of a job that asks for none, and the most that a job may ask for
    defaults: Limits
    ceilings: Limits
    # of all its jobs together
    sums: Sums
    weight: int
    total_weight: int
    running: int
    running_max: int
    memory_promised_bytes: int
    memory_promised_max_bytes: int
    stored_bytes: int
    stored_bytes_max: int
    use: GroupUse
    # jobs in the queue
    queued: int = 0
    queued_max: int = 0
    # the operator's directories that its jobs may have
    mounts: Sequence["Mount"] = ()
    # the number of GPUs of the machine for jobs of the client, free or not
    gpus: int = 0
    # whether the operator has drained the machine: it starts no job now
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory that the operator lends to jobs of a client, by its name."""

    name: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class MountSource:
    """The operator's side of a mount: its directory, and the clients whose jobs may have it.

    `clients` are names of clients, in which `*` stands for any characters. Raises InvalidJobError.
    """

    name: str
    path: str
    read_only: bool = True
    clients: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not _MOUNT_NAME.fullmatch(self.name):
            raise InvalidJobError(
                f"{self.name[:80]!r} is no name for a mount: up to 63 letters, digits, '_' and '-', the first"
                " a letter"
            )
        if not is_plain_path(self.path) or len(self.path.encode()) > PATH_MAX_BYTES:
            raise InvalidJobError(
                f"the path of the mount {self.name}, {self.path[:80]!r}, is not an absolute path without"
                " '.', '..' and '/' at its end"
            )
        for each in self.clients:
            if not _CLIENTS.fullmatch(each):
                raise InvalidJobError(f"the mount {self.name} is for {each[:80]!r}, which is no client")

    def is_for(self, client_name: str) -> bool:
        """Return whether jobs of this client may have it."""
        return are_for(self.clients, client_name)

    @property
    def shown(self) -> Mount:
        """The part of the mount that a client may see."""
        return Mount(self.name, self.read_only)


@dataclass(frozen=True, slots=True)
class GpuOffer:
    """The clients whose jobs may have GPUs, and the GPUs: the devices of a kind in CDI files.

    Without a kind there are none. `clients` is as in MountSource. Raises InvalidJobError.
    """

    kind: str = ""
    cdi_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    clients: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.kind and not _KIND.fullmatch(self.kind):
            raise InvalidJobError(f"{self.kind[:80]!r} is no kind of devices, such as nvidia.com/gpu")
        for each in self.cdi_dirs:
            if not is_plain_path(each) or len(each.encode()) > PATH_MAX_BYTES:
                raise InvalidJobError(f"{each[:80]!r} is not an absolute path without '.' and '..'")
        if len(self.cdi_dirs) > CDI_DIRS_MAX:
            raise InvalidJobError(f"there may be {CDI_DIRS_MAX} directories of CDI files")
        for each in self.clients:
            if not _CLIENTS.fullmatch(each):
                raise InvalidJobError(f"GPUs are for {each[:80]!r}, which is no client")

    def is_for(self, client_name: str) -> bool:
        """Return whether jobs of this client may have them."""
        return bool(self.kind) and are_for(self.clients, client_name)


def are_for(clients: Iterable[str], client_name: str) -> bool:
    """Whether a client is among *clients*: names, in which `*` stands for any characters."""
    return any(re.fullmatch(".*".join(map(re.escape, each.split("*"))), client_name) for each in clients)


def check_gpus(count: int) -> None:
    """Check a number of GPUs. Raises InvalidJobError."""
    # True is 1 to Python
    given: object = count
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= GPUS_MAX:
        raise InvalidJobError(f"a job has from 0 to {GPUS_MAX} GPUs, not {count!r:.80}")


def check_slurm_name(what: str, name: str) -> None:
    """Check the name of a partition or a feature; the empty name means none. Raises InvalidJobError."""
    if name and not _SLURM_NAME.fullmatch(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no {what}: up to 60 letters, digits, '.', '_' and '-'",
            hint=f"a job has one {what}; the lists and expressions of Slurm's are not taken",
        )


def split_mount(mount: str) -> tuple[str, str]:
    """Return the name of a requested mount and its path in the job, from `NAME` or `NAME:PATH`."""
    name, _, path = mount.partition(":")
    return name, path or f"{MOUNT_DIRECTORY}/{name}"


def offered(sources: Iterable[MountSource], client_name: str, mounts: Iterable[str]) -> list[MountSource]:
    """Return the mounts a client asks for, in order. Raises MountNotFoundError for one not offered."""
    there = {source.name: source for source in sources if source.is_for(client_name)}
    found = []
    for name, _ in map(split_mount, mounts):
        if name not in there:
            raise MountNotFoundError(name)
        found.append(there[name])
    return found


def check_mounts(mounts: Sequence[str]) -> tuple[str, ...]:
    """Return a job's mounts, each as `NAME:PATH`. Raises InvalidJobError."""
    if len(mounts) > MOUNTS_MAX:
        raise InvalidJobError(f"a job has at most {MOUNTS_MAX} mounts, not {len(mounts)}")
    checked: dict[str, str] = {}
    for mount in mounts:
        name, path = split_mount(mount)
        if not _MOUNT_NAME.fullmatch(name):
            raise InvalidJobError(
                f"{name[:80]!r} is no name of a mount", hint="a mount is NAME or NAME:PATH; see `pjw quota`"
            )
        if not is_plain_path(path) or _checked_size(path, "the path of a mount") > MOUNT_PATH_MAX_BYTES:
            raise InvalidJobError(
                f"cannot mount {name} at {path[:80]!r}: that is not an absolute path without '.', '..' and"
                f" '/' at its end, of at most {MOUNT_PATH_MAX_BYTES} bytes"
            )
        if _is_the_jobs_own(path):
            raise InvalidJobError(
                f"cannot mount {name} at {path}: each job has its own there",
                hint=f"leave the path out, which is {MOUNT_DIRECTORY}/{name} then",
            )
        for other in checked:
            if lies_in(path, other) or lies_in(other, path):
                raise InvalidJobError(f"cannot mount {name} at {path}: another one is mounted at {other}")
        checked[path] = name
    return tuple(f"{name}:{path}" for path, name in checked.items())


def is_plain_path(path: str) -> bool:
    """Return whether it is absolute, not the root, and no part of it has another meaning than its name."""
    parts = path.split("/")[1:]
    return path.startswith("/") and all(part not in ("", ".", "..") and "\0" not in part for part in parts)


def lies_in(path: str, directory: str) -> bool:
    """Return whether it is the directory, or lies in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _is_the_jobs_own(path: str) -> bool:
    """Return whether a mount would cover a job's own files, or lie in a directory no job may change."""
    if any(lies_in(own, path) for own in (*_SYSTEM, "/tmp", "/var/tmp")):  # noqa: S108  a job's
        return True
    inside = (JOB_DIRECTORY, WORKSPACE_DIRECTORY)
    return any(lies_in(path, each) for each in _SYSTEM) and not any(
        lies_in(path, each) and path != each for each in inside
    )


NO_GPUS: Final = GpuOffer()


def _said(value: object) -> str:
    # Python refuses to write out a number of more than 4,300 digits
    return (
        f"one of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )


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
class Retry:
    """Further attempts of a job that fails: so many `times` at most. Raises InvalidJobError.

    With `codes` only after one of these exit codes, with `oom` and `timeout` after these ends; without any of
    the three after every failure of the command. The first attempt waits `backoff_seconds`, each further one
    twice as long, up to an hour. `if_lost` is for a job that is lost: it may have done anything until then.
    A job that was stopped is not tried again.
    """

    times: int = 0
    codes: frozenset[int] = frozenset()
    oom: bool = False
    timeout: bool = False
    backoff_seconds: float = 5
    if_lost: bool = False

    def __post_init__(self) -> None:
        if type(self.times) is not int or not 0 <= self.times <= RETRIES_MAX:
            raise InvalidJobError(
                f"a job is tried again from 0 to {RETRIES_MAX} times, not {self.times!r:.80}"
            )
        if not self.times and not self.if_lost:
            raise InvalidJobError("a job that is tried again needs a number of times")
        # frozen; equal however it was given
        object.__setattr__(self, "codes", frozenset(self.codes))
        if not all(type(code) is int and 1 <= code <= 255 for code in self.codes):
            raise InvalidJobError(f"exit codes of failures are from 1 to 255, not {sorted(self.codes)!r:.80}")
        if not 0 <= self.backoff_seconds <= BACKOFF_SECONDS_MAX:
            raise InvalidJobError(
                f"a pause before an attempt is from 0 to {BACKOFF_SECONDS_MAX} seconds,"
                f" not {self.backoff_seconds!r:.80}"
            )

    def pause_after(self, job: "Job") -> float | None:
        """Return the seconds from the end of this attempt to the next one; None: there is none."""
        if job.state is JobState.LOST:
            return 0.0 if self.if_lost and job.attempt <= max(self.times, LOST_RETRIES_MAX) else None
        if job.attempt > self.times or not self._fits(job):
            return None
        return min(self.backoff_seconds * 2.0 ** (job.attempt - 1), float(BACKOFF_SECONDS_MAX))

    def _fits(self, job: "Job") -> bool:
        status = job.exit_status
        if status is None or job.succeeded or job.reason in (EndReason.STOPPED, EndReason.DISK_LIMIT):
            return False
        if not (self.codes or self.oom or self.timeout):
            return True
        if job.reason in (EndReason.OOM_KILLED, EndReason.TIMED_OUT):
            return self.oom if job.reason is EndReason.OOM_KILLED else self.timeout
        return job.reason is EndReason.COMPLETED and status.code in self.codes


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """The conditions of a job in the queue (docs/queue.md). Raises InvalidJobError.

    Of one client's jobs those with a higher `priority` go first (-1000 to 1000), among equals the older one.
    `not_before` is a time, local without a time zone. A job that is `held` waits until it is released.
    `after` are jobs of the same client whose ends it waits for; when one ends otherwise, it is cancelled.
    With `array` it is started once for each of these indices: `1-100`, `1,3,7`, `0-20:5`; of `1-100%8` at
    most 8 run at once.
    """

    priority: int = 0
    not_before: datetime | None = None
    held: bool = False
    after: Sequence[After] = ()
    retry: Retry | None = None
    array: str = ""

    def __post_init__(self) -> None:
        if type(self.array) is not str:
            raise InvalidJobError(f"the indices of an array are text, not {self.array!r:.80}")
        if self.array:
            # imported here, so that the launcher, which is root, does not load it
            from pjw.arrays import Array

            object.__setattr__(self, "array", str(Array.of(self.array)))
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise InvalidJobError(f"retry is a Retry, not {self.retry!r:.80}")
        if type(self.priority) is not int or not -PRIORITY_MAXIMUM <= self.priority <= PRIORITY_MAXIMUM:
            raise InvalidJobError(
                f"a priority must be a whole number from -{PRIORITY_MAXIMUM} to {PRIORITY_MAXIMUM},"
                f" not {_said(self.priority)[:80]}"
            )
        if self.not_before is not None and not isinstance(self.not_before, datetime):
            raise InvalidJobError(f"not_before is a time (a datetime), not {self.not_before!r:.80}")
        if not all(isinstance(each, After) for each in self.after):
            raise InvalidJobError(f"after names jobs by After(id), not {self.after!r:.80}")
        if len(self.after) > AFTER_MAX:
            raise InvalidJobError(f"a job waits for at most {AFTER_MAX} others, not {len(self.after)}")
        if len({(each.job_id, each.earlier, each.element) for each in self.after}) < len(self.after):
            raise InvalidJobError("a job waits for another one by one condition, not by several")
        # frozen; equal however it was given
        object.__setattr__(self, "after", tuple(self.after))


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """The size of a terminal in rows and columns of characters (docs/terminal.md). Raises InvalidJobError."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for value in (self.rows, self.columns):
            if type(value) is not int or not 1 <= value <= TERMINAL_MAXIMUM:
                raise InvalidJobError(
                    f"a terminal has from 1 to {TERMINAL_MAXIMUM} rows and columns, not {_said(value)}"
                )


def check_outputs(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of files to keep, normalized. Raises InvalidJobError."""
    if len(patterns) > OUTPUTS_MAX:
        raise InvalidJobError(
            f"a job has at most {OUTPUTS_MAX} patterns of files to keep, not {len(patterns)}"
        )
    checked = []
    for pattern in patterns:
        if _checked_size(pattern, "a pattern of files to keep") > OUTPUT_MAX_BYTES:
            raise InvalidJobError(f"a pattern of files to keep is longer than {OUTPUT_MAX_BYTES} bytes")
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if not pattern or pattern.startswith("/") or ".." in parts:
            raise InvalidJobError(
                f"cannot keep {pattern[:80]!r}: it is not in the job's workspace or own directory",
                hint="give a pattern such as 'dist/**', which begins there",
            )
        checked.append("/".join(parts) or "**")
    return tuple(checked)


def check_port(port: int) -> None:
    """Raise InvalidJobError for a number that is no port."""
    if not 1 <= port <= PORT_MAX:
        raise InvalidJobError(f"a port is a number from 1 to {PORT_MAX}, not {port}")


def check_upload(name: str) -> None:
    """Check the name of an upload. Raises InvalidJobError."""
    if not _UPLOAD.fullmatch(name):
        raise InvalidJobError("the name of an upload is 1 to 64 letters, digits, _ and -")


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar archive of a file or a directory in a job, or one that is unpacked there. Raises InvalidJobError.

    A `path` that is not absolute begins in the job's workspace, or else in its own directory. In the archive
    of `a/b` every name begins with `b`. With `unpack` an archive is made into files: in the directory `path`,
    which is made where it is missing; with a `name`, which every name in the archive has to begin with, as
    `path/name`, or as `path` itself where that is no directory.
    """

    path: str
    unpack: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for value, what in ((self.path, "a path in a job"), (self.name, "a name in an archive")):
            if not isinstance(value, str):
                raise InvalidJobError(f"{what} is text, not {value!r:.80}")
            if _checked_size(value, what) > PATH_MAX_BYTES:
                raise InvalidJobError(f"{what} is longer than {PATH_MAX_BYTES} bytes")
        if not self.path:
            raise InvalidJobError("a path in a job is empty", hint="its own directory is .")
        if self.name and not self.unpack:
            raise InvalidJobError("only what is unpacked has a name")
        if "/" in self.name or self.name in (".", ".."):
            raise InvalidJobError(f"{self.name[:80]!r} is no name of a file")

    @property
    def argv(self) -> tuple[str, ...]:
        """The command of the program that does it."""
        if self.unpack:
            return ("pjw-archive", "unpack", self.name, self.path)
        return ("pjw-archive", "pack", self.path)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """The request for a job: a shell command (one string) or an argv (a sequence), and its settings.

    A string is run by `/bin/sh -c`; a sequence is executed as it is. `limits` replaces single defaults,
    within the operator's ceilings; sizes and times are numbers of bytes and seconds, or text: "64M", "1h30m".
    `env` is added to the job's environment, and so are `secrets`, which no other call tells and which are
    stored only while the job waits in the queue, or may be tried again. `workdir` is the command's first
    directory, as the job sees it. With `input` the command reads the bytes that are streamed to the job. With
    a `terminal` its stdin, stdout and stderr are one terminal of that size, and the streamed bytes are typed
    into it. `workspace` names a directory of the client's own, made when it is first named: it outlives jobs,
    and the command begins there. An `exclusive` job has it alone. Two starts of one client with the same
    `request_id` are one. With `queue` the job waits for its turn in the queue, instead of being started or
    refused at once. `upload` names files that were sent before (`Client.upload`); they are unpacked in the
    job's workspace, or else its own directory, before the command starts. `allow` has the names on the
    network that the job may reach, as far as the operator offers them: `pypi.org`, `*.example.org`,
    `db.example.org:5432`. Jobs of one client with the same `link` share a network. `outputs` are patterns of
    files in that directory that are kept when the command has ended (`Job.artifacts`): `*`, `?` and `[...]`
    within a name, `**` for any directories; a directory that matches is kept whole. With `output_required` a
    job that ends without such files has not succeeded. `image` is the name of an image, whose files the job
    sees instead of the host's; files that the job writes there go with it, and if it is `read_only` it writes
    nothing there. Then the command may be empty: the image's own command runs. `mounts` are directories that
    the operator offers, each as `NAME` (at /mnt/NAME) or `NAME:PATH`. `gpus` is the number of GPUs that the
    job has for itself. `node` is the only machine of a cluster that may have the job; the operator says which
    clients may choose one. `partition` and `constraint` go to Slurm, which gives the job a place in that
    partition, on a node with that feature; the operator says which ones jobs may name.

    docs/limits.md, docs/queue.md, docs/workspaces.md, docs/images.md, docs/mounts.md, docs/network.md and
    docs/gpus.md describe these settings. Raises InvalidJobError.
    """

    command: str | Sequence[str]
    limits: Mapping[str, int | str] = field(default_factory=dict)
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    split_stderr: bool = False
    input: bool = False
    request_id: str = ""
    terminal: TerminalSize | None = None
    queue: QueueSpec | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    upload: str = ""
    workspace: str = ""
    exclusive: bool = False
    outputs: Sequence[str] = ()
    output_required: bool = False
    image: str = ""
    read_only: bool = False
    mounts: Sequence[str] = ()
    allow: Sequence[str] = ()
    link: str = ""
    gpus: int = 0
    node: str = ""
    partition: str = ""
    constraint: str = ""

    @classmethod
    def of(cls, spec: "Self | str | Sequence[str]") -> "JobSpec":
        """Return the spec itself, or a spec of a command alone. Raises InvalidJobError."""
        return spec if isinstance(spec, JobSpec) else cls(spec)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_command()
        check_name(self.name)
        check_labels(self.labels)
        if self.image:
            check_image(self.image)
        elif self.read_only:
            raise InvalidJobError("a job without an image writes nothing outside its own directory anyway")
        if self.workspace:
            # a job that loads an image has the image's directory as its workspace (worker/images.py)
            if not is_image_key(self.workspace):
                check_workspace(self.workspace)
        elif self.exclusive:
            raise InvalidJobError("an exclusive job is alone in its workspace, and this one has none")
        self._check_env()
        if self.workdir and not self.workdir.startswith("/"):
            raise InvalidJobError(f"the working directory {self.workdir!r} is not an absolute path")
        if _checked_size(self.workdir, "the working directory") > PATH_MAX_BYTES:
            raise InvalidJobError(f"the working directory is longer than {PATH_MAX_BYTES} bytes")
        if self.terminal is not None and self.split_stderr:
            raise InvalidJobError("a terminal has one output: stderr cannot be kept apart from it")
        if self.request_id and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidJobError("a request id is 1 to 64 printable characters of ASCII without spaces")
        if self.upload:
            check_upload(self.upload)
        if self.outputs:
            object.__setattr__(self, "outputs", check_outputs(self.outputs))
        elif self.output_required:
            raise InvalidJobError("no output is required: say which, as in 'dist/**'")
        if self.mounts:
            object.__setattr__(self, "mounts", check_mounts(self.mounts))
        if self.allow:
            # imported here, as most jobs have no network
            from pjw.network import check_allow

            object.__setattr__(self, "allow", check_allow(self.allow))
        if self.link:
            check_link(self.link)
        check_gpus(self.gpus)
        check_slurm_name("partition", self.partition)
        check_slurm_name("constraint", self.constraint)

    def _check_types(self) -> None:
        """Refuse wrong types with a message, for programs that no type checker has seen."""
        for name in ("limits", "labels", "env"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InvalidJobError(
                    f"the {name} of a job are names with values (a dict), not {value!r:.80}"
                )
            for key, each in value.items():
                if not isinstance(key, str) or (name != "limits" and not isinstance(each, str)):
                    raise InvalidJobError(f"the {name} of a job are text, not {key!r:.80}: {each!r:.80}")
        # without a value in the words
        secrets: object = self.secrets
        if not isinstance(secrets, Mapping) or not all(
            isinstance(text, str) for each in secrets.items() for text in each
        ):
            raise InvalidJobError("the secrets of a job are names with values (a dict), both of them text")
        for name in _TEXTS:
            if not isinstance(value := getattr(self, name), str):
                raise InvalidJobError(f"the {name} of a job is text, not {value!r:.80}")
        for name in ("outputs", "mounts", "allow"):
            listed: object = getattr(self, name)
            if (
                isinstance(listed, str)
                or not isinstance(listed, Sequence)
                or not all(isinstance(each, str) for each in listed)
            ):
                raise InvalidJobError(f"the {name} of a job are a list of text, not {listed!r:.80}")
        command: object = self.command
        if not isinstance(command, Sequence) or not all(isinstance(word, str) for word in command):
            raise InvalidJobError(
                f"a command is text, or a list of a program and its arguments, not {command!r:.80}"
            )
        if self.queue is not None and not isinstance(self.queue, QueueSpec):
            raise InvalidJobError(f"the queue of a job is a QueueSpec, not {self.queue!r:.80}")
        if self.input and self.queue is not None and self.queue.retry is not None:
            raise InvalidJobError("a job that is tried again has no input: an attempt would have used it up")
        if self.input and self.queue is not None and self.queue.array:
            raise InvalidJobError("an array has no input: its first element would have used it up")

    def _check_env(self) -> None:
        total = 0
        if both := sorted(self.env.keys() & self.secrets.keys()):
            raise InvalidJobError(f"{both[0]} is given both as a variable and as a secret")
        for name, value in (*self.env.items(), *self.secrets.items()):
            if not is_variable(name):
                raise InvalidJobError(
                    f"{name[:80]!r} is no name of an environment variable: letters, digits and _"
                )
            total += len(name) + _checked_size(value, f"the environment variable {name[:80]}") + 2
        if total > ARGUMENTS_MAX_BYTES:
            raise InvalidJobError(
                f"the environment is {total} bytes long; at most {ARGUMENTS_MAX_BYTES} are allowed"
            )

    def _check_command(self) -> None:
        if isinstance(self.command, str):
            if not self.command.strip():
                raise InvalidJobError("the command is empty")
        elif self.image and not self.command:
            return
        elif not self.command or not self.command[0]:
            raise InvalidJobError("the command is empty")
        total = 0
        for argument in self.argv:
            size = _checked_size(argument, "the command")
            total += size + 1
        if total > ARGUMENTS_MAX_BYTES:
            raise InvalidJobError(
                f"the command is {total} bytes long with all its arguments;"
                f" at most {ARGUMENTS_MAX_BYTES} are allowed"
            )

    @property
    def argv(self) -> tuple[str, ...]:
        """The program to execute, with its arguments."""
        if isinstance(self.command, str):
            return ("/bin/sh", "-c", self.command)
        return tuple(self.command)

    @property
    def directory(self) -> str:
        """The command's first directory, as the job sees it."""
        return self.workdir or base_of(self.workspace)

    @property
    def display(self) -> str:
        """The command on one line, as it could be typed into a shell."""
        if not self.command:
            return IMAGES_OWN_COMMAND
        # of the client only `start` needs it
        import shlex

        return self.command if isinstance(self.command, str) else shlex.join(self.command)


def base_of(workspace: str) -> str:
    """Return the base of a job's relative paths, as the job sees it: its workspace, if it has one."""
    return WORKSPACE_DIRECTORY if workspace else JOB_DIRECTORY


def is_name(text: str) -> bool:
    """Return whether a job can have this name."""
    return _NAME.fullmatch(text) is not None


def is_variable(text: str) -> bool:
    """Return whether an environment variable can have this name."""
    return _VARIABLE.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Check the name of a job; the empty name means none, and is allowed. Raises InvalidJobError."""
    if name and not is_name(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for a job: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def is_workspace(text: str) -> bool:
    """Return whether a workspace can have this name: a job's name, and also a directory's."""
    return is_name(text)


def check_workspace(name: str) -> None:
    """Check the name of a workspace. Raises InvalidJobError."""
    if not is_workspace(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for a workspace: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def check_image(name: str) -> None:
    """Check the name of an image. Raises InvalidJobError."""
    if not is_name(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for an image: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def check_link(link: str) -> None:
    """Check the name of a shared network; the rule is that of jobs' names. Raises InvalidJobError."""
    if not is_name(link):
        raise InvalidJobError(
            f"{link[:80]!r} is no name for a link: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def is_image_key(text: str) -> bool:
    """Return whether this is pjwd's own name of the directory of an image that a client has loaded."""
    return _IMAGE_KEY.fullmatch(text) is not None


def is_image_digest(text: str) -> bool:
    """Return whether this is the digest of an image of the operator's."""
    return _IMAGE_DIGEST.fullmatch(text) is not None


def check_labels(labels: Mapping[str, str]) -> None:
    """Check the labels of a job. Raises InvalidJobError."""
    if len(labels) > LABELS_MAX:
        raise InvalidJobError(f"a job has at most {LABELS_MAX} labels, not {len(labels)}")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidJobError(
                f"{key[:80]!r} is no key of a label: up to 63 letters, digits, '.', '_', '/' and '-',"
                " the first a letter"
            )
        if len(value) > LABEL_VALUE_MAX_CHARACTERS or not value.isprintable():
            raise InvalidJobError(
                f"the label {key} must have a printable value of at most {LABEL_VALUE_MAX_CHARACTERS}"
                " characters"
            )


def _checked_size(text: str, what: str) -> int:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidJobError(f"{what} is not valid UTF-8") from None
    if "\0" in text:
        raise InvalidJobError(f"{what} has a NUL in it, which no argument of a program can hold")
    if size > ARGUMENT_MAX_BYTES:
        raise InvalidJobError(
            f"an argument of {what} is {size} bytes long; the kernel takes at most {ARGUMENT_MAX_BYTES}",
            hint="put a long script into a file and run that",
        )
    return size


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
class ImageConfig:
    """The start of jobs in an image: additions to their environment, directory, and command.

    Raises InvalidJobError for a value that no job could have.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        # as it would be in a job's own spec
        JobSpec([*self.entrypoint, *self.command] or "true", env=self.env, workdir=self.workdir)
        # all of it is in every list of images
        words = (*self.env, *self.env.values(), *self.entrypoint, *self.command)
        if sum(map(len, words)) > _IMAGE_CONFIG_CHARACTERS_MAX:
            raise InvalidJobError(
                "the variables and the command of an image have more than"
                f" {_IMAGE_CONFIG_CHARACTERS_MAX} characters"
            )

    def applied_to(self, spec: JobSpec) -> JobSpec:
        """Return the spec to execute for a spec in an image with this config. Raises InvalidJobError."""
        argv = (*self.entrypoint, *(spec.argv if spec.command else self.command))
        if not argv:
            raise InvalidJobError(f"the image {spec.image} has no command of its own", hint="give one")
        given = {*spec.env, *spec.secrets}
        env = {**{name: value for name, value in self.env.items() if name not in given}, **spec.env}
        # files that are sent or kept are in the job's own directory, and so the command is to begin there
        elsewhere = spec.workdir or spec.workspace or spec.upload or spec.outputs
        return replace(
            spec,
            # a shell's command stays one, as it is shown to people
            command=spec.command if argv == spec.argv and spec.command else argv,
            env=env,
            workdir=spec.workdir if elsewhere else self.workdir,
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image that jobs can have, at one moment. Times are in UTC.

    It is the operator's, for every client, unless it has a `client_name`. `digest` covers the whole image, as
    its maker states it. `used` is when a job was last started with it; for one of the operator's it is when
    it was made.
    """

    name: str
    digest: str
    made: datetime
    used: datetime
    bytes: int = 0
    inodes: int = 0
    jobs: int = 0
    client_name: str = ""
    config: ImageConfig = field(default_factory=ImageConfig)


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
