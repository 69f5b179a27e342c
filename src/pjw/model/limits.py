"""Limits: of one job, of all jobs of a client, and of all jobs together. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Self

from pjw.errors import InvalidJobError, LimitRangeError
from pjw.model.offers import Mount

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
                    f"limit {name} must be a whole number from 0 to 2^62, not {said(value)}"
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
    """A client's part of the host: its weight against other clients with jobs, and its sums."""

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


def said(value: object) -> str:
    """Format a value that is refused, for an error."""
    # Python refuses to write out a number of more than 4,300 digits
    return (
        f"one of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )
