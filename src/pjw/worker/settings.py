"""The operator's settings for a worker."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pjw.errors import ConfigError, InvalidJobError
from pjw.model import (
    DEFAULT_SHARE,
    LIMIT_MAXIMUM,
    NO_GPUS,
    NO_SUMS,
    GpuOffer,
    Limits,
    MountSource,
    Share,
    Sums,
    check_image,
)
from pjw.worker.network import Network

UID_COUNT: Final = 65_536

# Enough for a client that starts one job after the other while the next is being made; each is a process of
# about 100 KiB, and as much again in the kernel.
WAITING_INITS: Final = 4

NO_CEILING: Final = Limits(**dict.fromkeys((name for name, _ in Limits().items()), 0))
# A floor so high that a client can ask for nothing but "no limit".
NO_LIMIT_ONLY: Final = LIMIT_MAXIMUM
# A read that is throttled, at any rate, holds locks of the page cache, which the whole host shares: any other
# process that wants that part of the file, root's too, waits for as long. So only the operator limits reads.
FLOOR: Final = replace(
    NO_CEILING,
    io_rbps_max=NO_LIMIT_ONLY,
    io_riops_max=NO_LIMIT_ONLY,
    io_wbps_max=1024**2,
    io_wiops_max=100,
)


@dataclass(frozen=True, slots=True)
class Retention:
    """The bounds on ended jobs that are kept, the newest first. 0 is "all" in every field."""

    age_seconds: int = 0
    jobs_per_client: int = 0
    bytes_per_client: int = 0
    jobs_total: int = 0
    bytes_total: int = 0
    # a workspace that no job has used for this time is removed
    workspace_age_seconds: int = 0
    # so is an image that a client has loaded
    image_age_seconds: int = 0
    # on a node of a gateway: an ended job stays until the gateway has written its end down
    keeps_untold: bool = False


@dataclass(frozen=True, slots=True)
class Quotas:
    """The most that clients may have at once; at it, a start is refused. 0 is "no limit" in every field.

    All but input and workspaces have a total for all clients. Stored bytes are the output of all jobs, ended
    or not, the workspaces, and the input and the scratch of those that have not ended; workspaces and scratch
    as last counted: once a minute. Input is not taken beyond them; output, scratch and workspaces are not
    held back. `input_bytes_max` is for one job, of which more input is not taken. Queued are jobs that wait
    in the queue, or are being started from there; the bytes are those of their commands and variables.
    """

    running_max: int = 0
    running_total_max: int = 0
    stored_bytes_max: int = 0
    stored_bytes_total_max: int = 0
    input_bytes_max: int = 0
    queued_max: int = 0
    queued_total_max: int = 0
    queued_bytes_max: int = 0
    queued_bytes_total_max: int = 0
    workspaces_max: int = 0
    workspace_bytes_max: int = 0
    images_max: int = 0


@dataclass(frozen=True, slots=True)
class QueueSlots:
    """The most that jobs out of the queue may have at once: their number, and the sums of their limits.

    The first three are for all clients, the others for each. 0 is "no limit", None the host's amount: all of
    its processors, and the sum of memory that jobs have. A job with a higher limit, or none, takes all of it.
    """

    running_max: int = 0
    cpu_max_millicores: int | None = None
    memory_max_bytes: int | None = None
    client_running_max: int = 0
    client_cpu_max_millicores: int = 0
    client_memory_max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Shares:
    """Each client's part of the host: its own by name, or that of all others."""

    default: Share = DEFAULT_SHARE
    by_name: Mapping[str, Share] = field(default_factory=dict)

    def of(self, client_name: str) -> Share:
        """Return the share of one client."""
        return self.by_name.get(client_name, self.default)


# Without marks of the operator's a twentieth of a file system is kept free, and at most this much.
_FREE_BYTES_MIN: Final = 1024**3
_FREE_INODES_MIN: Final = 100_000


@dataclass(frozen=True, slots=True)
class DiskMarks:
    """The space of each file system that jobs write to that stays free, or a job is ended: worker/disk.py.

    0 is "do not look", None a twentieth, at most 1 GiB and 100,000 inodes.
    """

    free_bytes_min: int | None = None
    free_inodes_min: int | None = None

    def bytes_of(self, total: int) -> int:
        """Return the mark of a file system of *total* bytes."""
        return min(total // 20, _FREE_BYTES_MIN) if self.free_bytes_min is None else self.free_bytes_min

    def free_and_mark(self, status: os.statvfs_result) -> tuple[int, int]:
        """Return the bytes that a file system has free, and the mark that they should not fall below."""
        return status.f_bavail * status.f_frsize, self.bytes_of(status.f_blocks * status.f_frsize)

    def inodes_of(self, total: int) -> int:
        """Return the mark of a file system of *total* inodes; 0 where they are not counted."""
        return min(total // 20, _FREE_INODES_MIN) if self.free_inodes_min is None else self.free_inodes_min


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Limits, users and manners. Raises ConfigError when they contradict each other."""

    default_limits: Limits = field(default_factory=Limits)
    ceiling: Limits = NO_CEILING
    # the least that a job may ask for; a lower default limit or ceiling replaces it
    floor: Limits = FLOOR
    # the most that all jobs may use together
    sums: Sums = NO_SUMS
    shares: Shares = Shares()
    # The memory limits of running jobs together are at most this many times the sum of memory, or the host's
    # memory where there is none; 0 is any number of times.
    memory_overcommit: float = 0
    # the user ids that clients are given; 0: a range of the state directory's own (launcher/job_users.py)
    uid_first: int = 0
    uid_count: int = UID_COUNT
    hidden_paths: tuple[str, ...] = ()
    visible_paths: tuple[str, ...] = ()
    # where jobs have their scratch directories; empty: in the state directory
    scratch_dir: str = ""
    # the most that a job may have there, where the file system has project quotas; 0 is no limit
    scratch_bytes_max: int = 0
    scratch_inodes_max: int = 0
    stop_grace_seconds: float = 10
    # the number of inits that the launcher keeps ready for the next jobs
    waiting_inits: int = WAITING_INITS
    retention: Retention = Retention()
    quotas: Quotas = Quotas()
    disk: DiskMarks = DiskMarks()
    queue: QueueSlots = QueueSlots()
    # the image of a job that names none; empty: it has the host's files
    default_image: str = ""
    # directories of the host that jobs may ask for
    mounts: tuple[MountSource, ...] = ()
    network: Network = field(default_factory=Network)
    # whose jobs may have the host's GPUs
    gpus: GpuOffer = NO_GPUS

    def __post_init__(self) -> None:
        if above := self.default_limits.first_above(self.ceiling):
            raise ConfigError(
                f"the default limit {above} is {getattr(self.default_limits, above)},"
                f" above its ceiling of {getattr(self.ceiling, above)} (0 is no limit)"
            )
        if self.default_image:
            try:
                check_image(self.default_image)
            except InvalidJobError as error:
                raise ConfigError(f"default_image: {error}") from None
        # frozen; a client may always ask for a default limit, and for a ceiling
        object.__setattr__(self, "floor", self.floor.lowered_to(self.default_limits).lowered_to(self.ceiling))
