"""The cgroups of jobs: create, limit, enter, account, kill, remove. One interface, v1 and v2.

There are three levels: `pjw/INSTANCE` holds the sum of all jobs, `client-UID` that of one client with its
weight against others, `job-ID` one job. The directories are the registry of jobs: `job-ID` exists = the job
exists. They outlive the launcher, so finding them there at a start is normal.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from pjw.errors import ConfigError
from pjw.launcher.cgroup import interface_files, v1, v2
from pjw.launcher.cgroup.devices import disks_under
from pjw.model import DEFAULT_SHARE, GroupUse, Limits, Share, Sums, Usage, UsageSample

__all__ = ["Cgroup", "Hierarchy", "HostDescription", "describe_host", "disks_under", "open_hierarchy"]


class Cgroup(Protocol):
    """One job's cgroup."""

    def init_arguments(self) -> AbstractContextManager[list[str | int]]:
        """Give the options with which pjw-init enters this cgroup.

        A number among them is a descriptor, which is open only within the context: spawn init there.
        """

    def session_arguments(self) -> AbstractContextManager[list[str | int]]:
        """Give the same for a session, which enters while the job runs."""

    def make_equal(self) -> None:
        """Give it the weight of processor time that each job of a client has; `create` gave it far more.

        While init makes the job's namespaces and mounts, it holds locks of the kernel that every other launch
        waits for. Beside a hundred busy jobs of its client it would hold them for seconds.

        Raises KernelError.
        """

    def pids(self) -> list[int]:
        """Return the live processes, by their pids here, sorted."""

    def lift_throttles(self) -> None:
        """Lift its limits of disk IO, so that processes waiting in one can end. Goes with every kill.

        Raises KernelError; the kill goes on.
        """

    def kill(self) -> None:
        """Send SIGKILL to every process, and do not wait: the last resort, when init does not do it."""

    def usage(self) -> Usage:
        """Return the job's usage until now; a counter that this kernel lacks is 0."""

    def measure(self) -> UsageSample:
        """Measure the job's usage at this moment. KernelError (ENOENT, ENODEV) when it has ended."""

    def try_remove(self) -> bool:
        """Remove it, unless a process is in it, or still about to leave it: then false.

        It need not exist any more.
        """


class Hierarchy(Protocol):
    """The cgroups of all jobs of one instance."""

    @property
    def version(self) -> int:
        """1 or 2."""

    @property
    def shown(self) -> Sequence[str]:
        """The directory that all cgroups lie in, where each job is shown its own; else nothing."""

    def create(self, job_id: int, limits: Limits, uid: int, share: Share = DEFAULT_SHARE) -> Cgroup:
        """Make a cgroup with every limit set, in that of its client with this share, or leave nothing behind.

        JobStateError when it exists; ConfigError for io limits without a disk; KernelError
        naming the file for all that the kernel refuses.
        """

    def find(self, job_id: int) -> Cgroup | None:
        """Return the cgroup of a job, also one that was left half made or half removed."""

    def job_ids(self) -> list[int]:
        """Return every job that has a cgroup, sorted; half-made ones too."""

    def set_sums(self, sums: Sums) -> list[str]:
        """Bound the usage of all jobs together; return in words the unset bounds. Raises KernelError."""

    def set_share(self, uid: int, share: Share) -> list[str]:
        """Bound a client that has jobs in the same way; do nothing for another. Raises KernelError."""

    def share_of(self, uid: int) -> Share | None:
        """Return the share this launcher gave to a client; None for one without jobs since."""

    def use_of(self, uid: int) -> GroupUse:
        """Return the joint usage of a client's jobs: nothing if it has none. Raises KernelError."""

    def release(self) -> None:
        """Remove those parents that are empty, at the launcher's end; a living job's stay."""


@dataclass(frozen=True, slots=True)
class HostDescription:
    """The abilities of this host. `version` is the one that jobs would get, missing parts or not."""

    version: int
    location: str
    present: tuple[str, ...]
    missing: tuple[str, ...]
    hint: str | None


def open_hierarchy(
    instance: str, *, io_devices: Sequence[str] = (), supervisor_pids: Sequence[int] = ()
) -> Hierarchy:
    """Choose v1 or v2 and prepare the parents of the jobs' cgroups.

    *io_devices* (see disks_under) are the disks that io limits are set on; with none, the io
    controller may be missing and no io limit can be set. *supervisor_pids*, the launcher's own
    and its server's, are moved into a leaf where v2 wants that. Raises ConfigError naming a
    controller that is missing, KernelError for a refusal of the kernel.
    """
    mounts = interface_files.read_mounts()
    host = _describe(mounts)
    optional = () if io_devices else (v1.IO_CONTROLLER, v2.IO_CONTROLLER)
    if missing := [name for name in host.missing if name not in optional]:
        raise ConfigError(f"cannot limit jobs: no cgroup controller {', '.join(missing)}", hint=host.hint)
    if host.version == v2.V2Hierarchy.version:
        return v2.open_hierarchy(instance, host.location, host.present, io_devices, supervisor_pids)
    points = v1.mounted_controllers(mounts)
    return v1.open_hierarchy(instance, points, io_devices)


def describe_host() -> HostDescription:
    """Describe this host for `pjwd check`. Changes nothing."""
    return _describe(interface_files.read_mounts())


def _describe(mounts: Sequence[interface_files.CgroupMount]) -> HostDescription:
    # The one that lacks least: a controller is with either v1 or v2, never with both.
    return min((_describe_v2(mounts), _describe_v1(mounts)), key=lambda host: len(host.missing))


def _describe_v2(mounts: Sequence[interface_files.CgroupMount]) -> HostDescription:
    # A mount from outside of our cgroup namespace has a root of `/..`; the last one mounted
    # hides others at its place.
    visible = [mount for mount in mounts if mount.fs_type == "cgroup2" and not mount.root.startswith("/..")]
    wanted = (*v2.CONTROLLERS, v2.IO_CONTROLLER)
    if not visible:
        return HostDescription(2, "", (), wanted, "mount cgroup v2: mount -t cgroup2 none /sys/fs/cgroup")
    base = v2.find_base(visible[-1])
    there = v2.controllers_in(base)
    hint = "look for cgroup_disable= in /proc/cmdline, and in /proc/cgroups for controllers that v1 holds"
    if base != visible[-1].point:
        hint = "set Delegate=yes in the unit of pjwd"
    return _compare(2, base, wanted, there, hint)


def _describe_v1(mounts: Sequence[interface_files.CgroupMount]) -> HostDescription:
    points = v1.mounted_controllers(mounts)
    hint = "mount each: mount -t cgroup -o CONTROLLER none /sys/fs/cgroup/CONTROLLER; or boot with cgroup v2"
    location = points.get("memory", "")
    return _compare(1, location, (*v1.CONTROLLERS, v1.IO_CONTROLLER), points.keys(), hint)


def _compare(
    version: int, location: str, wanted: Sequence[str], there: AbstractSet[str], hint: str
) -> HostDescription:
    missing = tuple(name for name in wanted if name not in there)
    present = tuple(name for name in wanted if name in there)
    return HostDescription(version, location, present, missing, hint if missing else None)
