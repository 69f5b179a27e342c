"""What the operator decides for a worker."""

from dataclasses import dataclass, field
from typing import Final

from pjw.errors import ConfigError
from pjw.model import Limits

# Above every range that systemd, useradd and container tools hand out
# (systemd.io/UIDS-GIDS), so that no account of the host has one of these.
UID_FIRST: Final = 1_900_000_000
UID_COUNT: Final = 65_536

# Enough for a client that starts one job after the other while the next is being made; each is a process of
# about 100 KiB, and as much again in the kernel.
WAITING_INITS: Final = 4

NO_CEILING: Final = Limits(**dict.fromkeys((name for name, _ in Limits().items()), 0))


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of ended jobs is kept, the newest first. 0 is "all" in every field."""

    age_seconds: int = 0
    jobs_per_client: int = 0
    bytes_per_client: int = 0
    jobs_total: int = 0
    bytes_total: int = 0


@dataclass(frozen=True, slots=True)
class Quotas:
    """What clients may have at once; at it, a start is refused. 0 is "no limit" in every field.

    Each but the last has a total for all clients. Stored bytes are the output of all jobs, ended or not, and
    the input of those that have not. Input is not taken beyond them; output is not held back.
    `input_bytes_max` is for one job, of which more input is not taken.
    """

    running_max: int = 0
    running_total_max: int = 0
    stored_bytes_max: int = 0
    stored_bytes_total_max: int = 0
    input_bytes_max: int = 0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Limits, users and manners. Raises ConfigError when they contradict each other."""

    default_limits: Limits = field(default_factory=Limits)
    ceiling: Limits = NO_CEILING
    uid_first: int = UID_FIRST
    uid_count: int = UID_COUNT
    hidden_paths: tuple[str, ...] = ()
    stop_grace_seconds: float = 10
    # how many inits the launcher keeps ready for the next jobs
    waiting_inits: int = WAITING_INITS
    retention: Retention = Retention()
    quotas: Quotas = Quotas()

    def __post_init__(self) -> None:
        if above := self.default_limits.first_above(self.ceiling):
            raise ConfigError(
                f"the default limit {above} is {getattr(self.default_limits, above)},"
                f" above its ceiling of {getattr(self.ceiling, above)} (0 is no limit)"
            )
