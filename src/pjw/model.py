"""What a job is, as frozen values that check themselves. No I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from typing import Final, Self

from pjw.errors import InvalidJobError, LimitRangeError

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
LABELS_MAX: Final = 32
LABEL_VALUE_MAX_CHARACTERS: Final = 255
PATH_MAX_BYTES: Final = 4095
# the default working directory, as the job sees it: its scratch directory
JOB_DIRECTORY: Final = "/run/job"
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

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_LABEL_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9._/-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,64}")


class JobState(StrEnum):
    """Where in its life a job is. EXITED and LOST are final.

    UNKNOWN stands at a client for a state that only a newer server knows; such a job has not ended.
    """

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    LOST = "lost"
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
    """Why a job ended.

    LOST, HOST_RESTARTED and LAUNCH_INTERRUPTED are what is known of one that is LOST. DISK_LIMIT: a file
    system that jobs write to was about to be full, and this job was the largest of the client with most.
    OUTPUT_FAILED: the output can never be written.
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


# a shell adds this to the number of the signal that ended a program
SIGNALLED: Final = 128


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How the command ended: with a code, or by a signal, whose code is 128 + its number, as in a shell.

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
        """The status of a code, or of a signal (with or without its code); None when there is neither."""
        if signal is not None:
            return cls(signal=signal)
        return None if code is None else cls(code)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may use. 0 is "no limit" in every field.

    Reads from disk have none by default: a read that is held back holds up everybody who reads the same file.
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
        """Every limit as (name, value), in the order of the fields."""
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
        """These floors, each lowered to that limit of *other*; "no limit" lowers none."""
        lower = {name: min(getattr(self, name), value) for name, value in other.items() if value}
        return replace(self, **lower)

    def with_overrides(self, overrides: Mapping[str, int | str]) -> Self:
        """These limits with some replaced; an unknown name is an InvalidJobError."""
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
    """The same limits as numbers: a size may be text (`64M`), and so may the time (`1h30m`).

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
    """What jobs may use together: those of a client, or all of them. 0 is "no limit" in every field."""

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
        """Every sum as (name, value), in the order of the fields."""
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    def within(self, other: "Sums") -> "Sums":
        """Of each sum the lower one of both; "no limit" is above any number."""
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
    """What the jobs of one client use together at one moment; processor time since its first job began."""

    memory_bytes: int = 0
    pids: int = 0
    cpu_usage_usec: int = 0


@dataclass(frozen=True, slots=True)
class ClientQuota:
    """The limits of one client, what its jobs use now, and its share of the machine; 0 is "no limit".

    Sizes in bytes. `total_weight` is the sum of the weights of all clients with jobs, `weight` this client's.
    `memory_promised_bytes` is the sum of the memory limits of its running jobs. `stored_bytes` is the output
    of all its jobs, and the input and scratch of those that have not ended.
    """

    client_name: str
    # what a job gets that asks for nothing, and the most that it may ask for
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


def _said(value: object) -> str:
    # Python refuses to write out what has more than 4,300 digits
    return (
        f"one of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job has used, read from its cgroup before that was removed.

    Times in microseconds, sizes in bytes. `oom_kills` is the cgroup's own counter.
    """

    cpu_usage_usec: int = 0
    memory_peak_bytes: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class UsageSample:
    """What a running job had used at one moment: its processes and memory then, the rest until then.

    Times in microseconds, sizes in bytes; `pids` are processes and threads, init included.
    """

    time: datetime
    cpu_usage_usec: int
    memory_bytes: int
    io_read_bytes: int
    io_write_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What is asked for: a shell command (one string) or an argv (a sequence), and how to run it.

    A string is run by `/bin/sh -c`; a sequence is executed as it is. `limits` replaces single defaults,
    within the operator's ceilings; sizes and times are numbers of bytes and seconds, or text: "64M", "1h30m".
    `env` is added to the job's environment; `workdir` is where the command begins, as the job sees it. With
    `input` the command reads what is streamed to the job. Two starts of one client with the same `request_id`
    are one. Raises InvalidJobError.
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

    @classmethod
    def of(cls, spec: "Self | str | Sequence[str]") -> "JobSpec":
        """The spec itself, or a spec of a command alone. Raises InvalidJobError."""
        return spec if isinstance(spec, JobSpec) else cls(spec)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_command()
        check_name(self.name)
        check_labels(self.labels)
        self._check_env()
        if self.workdir and not self.workdir.startswith("/"):
            raise InvalidJobError(f"the working directory {self.workdir!r} is not an absolute path")
        if _checked_size(self.workdir, "the working directory") > PATH_MAX_BYTES:
            raise InvalidJobError(f"the working directory is longer than {PATH_MAX_BYTES} bytes")
        if self.request_id and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidJobError("a request id is 1 to 64 printable characters of ASCII without spaces")

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
        for name in ("name", "workdir", "request_id"):
            if not isinstance(value := getattr(self, name), str):
                raise InvalidJobError(f"the {name} of a job is text, not {value!r:.80}")
        command: object = self.command
        if not isinstance(command, Sequence) or not all(isinstance(word, str) for word in command):
            raise InvalidJobError(
                f"a command is text, or a list of a program and its arguments, not {command!r:.80}"
            )

    def _check_env(self) -> None:
        total = 0
        for name, value in self.env.items():
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
        """What is executed."""
        if isinstance(self.command, str):
            return ("/bin/sh", "-c", self.command)
        return tuple(self.command)

    @property
    def display(self) -> str:
        """The command on one line, as it could be typed into a shell."""
        # of the client only `start` needs it
        import shlex

        return self.command if isinstance(self.command, str) else shlex.join(self.command)


def is_name(text: str) -> bool:
    """Whether a job can have this name."""
    return _NAME.fullmatch(text) is not None


def is_variable(text: str) -> bool:
    """Whether an environment variable can have this name."""
    return _VARIABLE.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raises InvalidJobError for what is no name of a job; empty is none, and allowed."""
    if name and not is_name(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for a job: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises InvalidJobError for what are no labels of a job."""
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
class Job:
    """One job at one moment: a snapshot that does not change. Times are in UTC.

    `output_bytes`, stderr included, is known when the job has ended. `detail` is for a person: why a job that
    was killed does not end, or that its output waits for the disk, for as long as that is so. `workdir` is
    where the command began; empty for a job that an older pjw started. `usage_now` is what a running job
    uses, in the answer of `get`; None elsewhere, and when it could not be measured.
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


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is speaking: the client's name, and the serial number of the certificate that says so."""

    client_name: str
    serial: int
