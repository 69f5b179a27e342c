"""cgroup v1: one directory of a job in each controller's own hierarchy.

v1 throttles reads and direct writes only: a buffered write is charged to no job.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup import devices, interface_files
from pjw.launcher.cgroup.places import Places, client_place
from pjw.model import DEFAULT_SHARE, WEIGHT_DEFAULT, GroupUse, Limits, Share, Sums, Usage, UsageSample

_T = TypeVar("_T")

CONTROLLERS: Final = ("cpu", "cpuacct", "memory", "pids")
IO_CONTROLLER: Final = "blkio"
# the most that the kernel takes, and its default: MAX_SHARES and NICE_0_LOAD in kernel/sched
_SHARES_MAX: Final = 262_144
_SHARES_DEFAULT: Final = 1024


def mounted_controllers(mounts: Sequence[interface_files.CgroupMount]) -> dict[str, str]:
    """Return the mount point of each controller; two may share one, as cpu and cpuacct often do."""
    points: dict[str, str] = {}
    v1_mounts = [mount for mount in mounts if mount.fs_type == "cgroup"]
    # A mount of the whole hierarchy is preferred to one of a part (a container's bind mount).
    for mount in sorted(v1_mounts, key=lambda mount: mount.root != "/"):
        for controller in (*CONTROLLERS, IO_CONTROLLER):
            if controller in mount.super_options:
                points.setdefault(controller, mount.point)
    return points


def open_hierarchy(instance: str, points: Mapping[str, str], io_devices: Sequence[str]) -> "V1Hierarchy":
    """Make the parents; *points* has every controller that is needed."""
    parents = {}
    for controller, point in points.items():
        with interface_files.locked(point):
            interface_files.make_parent(f"{point}/pjw", hint=f"run as root, with {point} writable")
            parents[controller] = f"{point}/pjw/{instance}"
            interface_files.make_parent(parents[controller])
    hierarchy = V1Hierarchy(parents, io_devices)
    hierarchy.forbid_swapping()
    return hierarchy


class V1Hierarchy:
    """The jobs of one instance."""

    version: Final = 1
    shown: Final = ()

    def __init__(self, parents: Mapping[str, str], io_devices: Sequence[str]) -> None:
        tops = {path: interface_files.open_top(path) for path in dict.fromkeys(parents.values())}
        self._tops: Final = {controller: tops[path] for controller, path in parents.items()}
        self._every_top: Final = tuple(tops.values())
        self._io_devices: Final = tuple(io_devices)
        self._places: Final = Places(tops)
        self._shares: Final[dict[int, Share]] = {}
        # the processor time that the kernel has for all jobs and for each client, in thousandths; 0 is any
        self._cpu: Final[dict[str, int]] = {}
        # whether the kernel accounts swap
        self._bounds_swap: Final = os.path.exists(f"{parents['memory']}/memory.memsw.limit_in_bytes")

    def forbid_swapping(self) -> None:
        """Have jobs that are made from now on stay in memory. Raises KernelError.

        A new cgroup inherits this setting from the one above it, and a client's cgroup may be an older
        version's. A limit of memory and swap together, which jobs have, would alone leave them free to swap.
        """
        for place in (".", *map(client_place, self._places.clients())):
            self._write("memory", place, "memory.swappiness", "0", place)

    def create(self, job_id: int, limits: Limits, uid: int, share: Share = DEFAULT_SHARE) -> "V1Cgroup":
        subject = f"job {job_id}"
        new_client = uid not in self._places
        place = self._places.add(job_id, uid)
        made: list[interface_files.TopDirectory] = []
        try:
            if new_client:
                self._make_client(uid)
            if self.share_of(uid) != share:
                self.set_share(uid, share)
            settings = list(self._settings(limits, uid, share, subject))
            for top in self._every_top:
                interface_files.make_cgroup(place, subject, top)
                made.append(top)
            for controller, name, value in settings:
                self._write(controller, place, name, value, subject)
        except BaseException:
            for top in reversed(made):
                os.rmdir(place, dir_fd=top.descriptor)
            self._forget(job_id)
            raise
        return self._cgroup(
            job_id, place, [name for controller, name, _ in settings if controller == IO_CONTROLLER]
        )

    def find(self, job_id: int) -> "V1Cgroup | None":
        cgroup = self._cgroup(job_id, self._places.of(job_id))
        return cgroup if any(os.path.isdir(directory) for directory in cgroup.directories) else None

    def job_ids(self) -> list[int]:
        return sorted(self._places.job_ids())

    def set_sums(self, sums: Sums) -> list[str]:
        return self._set_sums(".", sums, "all jobs")

    def set_share(self, uid: int, share: Share) -> list[str]:
        if uid not in self._places:
            return []
        place, subject = client_place(uid), f"client {uid}"
        self._write(
            "cpu", place, "cpu.shares", str(max(2, share.weight * _SHARES_DEFAULT // WEIGHT_DEFAULT)), subject
        )
        self._weigh_io(place, share.weight)
        not_set = self._set_sums(place, share.sums, subject)
        self._shares[uid] = share
        return not_set

    def share_of(self, uid: int) -> Share | None:
        return self._shares.get(uid)

    def use_of(self, uid: int) -> GroupUse:
        if uid not in self._places:
            return GroupUse()
        place = client_place(uid)
        return GroupUse(
            memory_bytes=int(self._read("memory", place, "memory.usage_in_bytes")),
            pids=int(self._read("pids", place, "pids.current")),
            cpu_usage_usec=int(self._read("cpuacct", place, "cpuacct.usage")) // 1000,
        )

    def release(self) -> None:
        for top in self._every_top:
            top.close()
            interface_files.remove_parents(top.path)

    def _cgroup(self, job_id: int, place: str, throttled: Sequence[str] = ()) -> "V1Cgroup":
        return V1Cgroup(job_id, self._tops, place, lambda: self._forget(job_id), throttled, self._io_devices)

    def _forget(self, job_id: int) -> None:
        uid = self._places.forget(job_id)
        if uid not in self._places:
            self._shares.pop(uid, None)
            self._cpu.pop(client_place(uid), None)

    def _make_client(self, uid: int) -> None:
        for top in self._every_top:
            interface_files.make_parent(f"{top.path}/{client_place(uid)}")

    def _set_sums(self, place: str, sums: Sums, subject: str) -> list[str]:
        """Bound the usage below *place*; return in words the bounds that the kernel does not take now."""
        pids = str(sums.pids_max) if 0 < sums.pids_max < interface_files.PIDS_MAX else "max"
        self._write("pids", place, "pids.max", pids, subject)
        not_set = []
        try:
            self._write("memory", place, "memory.limit_in_bytes", str(sums.memory_max_bytes or -1), subject)
        except KernelError as error:
            # memory that is in use and cannot be taken back
            if error.errno != errno.EBUSY:
                raise
            used = int(self._read("memory", place, "memory.usage_in_bytes"))
            not_set.append(
                interface_files.not_set(
                    "memory_max_bytes", sums.memory_max_bytes, subject, f"{used} are used"
                )
            )
        cpu = sums.cpu_max_millicores
        if cpu and place != ".":
            cpu = self._clamped(cpu, ".")
        quota = min(cpu * interface_files.SUM_PERIOD_USEC // 1000, interface_files.CPU_QUOTA_MAX_USEC) or -1
        try:
            self._write("cpu", place, "cpu.cfs_period_us", str(interface_files.SUM_PERIOD_USEC), subject)
            self._write("cpu", place, "cpu.cfs_quota_us", str(quota), subject)
        except KernelError as error:
            # No quota of a child may be above its parent's (Documentation/scheduler/sched-bwc.rst).
            if error.errno != errno.EINVAL:
                raise
            not_set.append(
                interface_files.not_set("cpu_max_millicores", cpu, subject, "a running job may use more")
            )
        self._cpu[place] = self._cpu_millicores(place)
        return not_set

    def _clamped(self, millicores: int, *places: str) -> int:
        """Return the processor time, at most that of the places above: v1 refuses more than that (EINVAL)."""
        return min(millicores, *(self._cpu.get(place) or millicores for place in places))

    def _cpu_millicores(self, place: str) -> int:
        quota = int(self._read("cpu", place, "cpu.cfs_quota_us"))
        period = int(self._read("cpu", place, "cpu.cfs_period_us"))
        return quota * 1000 // period if quota > 0 else 0

    def _weigh_io(self, place: str, weight: int) -> None:
        # Only BFQ has weights on v1, from 1 to 1000, and only where a disk uses it is the file there.
        name = "blkio.bfq.weight"
        top = self._tops.get(IO_CONTROLLER)
        if top is not None and os.path.exists(f"{top.path}/{place}/{name}"):
            self._write(IO_CONTROLLER, place, name, str(min(weight, 1000)), place)

    def _write(self, controller: str, place: str, name: str, value: str, subject: str) -> None:
        interface_files.write_text(f"{place}/{name}", value, f"{name} of {subject}", self._tops[controller])

    def _read(self, controller: str, place: str, name: str) -> str:
        return interface_files.read_text(f"{place}/{name}", f"{name} of {place}", self._tops[controller])

    def _settings(
        self, limits: Limits, uid: int, share: Share, subject: str
    ) -> Iterator[tuple[str, str, str]]:
        yield "cpu", "cpu.shares", str(_SHARES_MAX)
        if limits.cpu_max_millicores:
            # also the client's future quota that it cannot have yet, or the next job would keep it from that
            # again
            wanted = min(
                limits.cpu_max_millicores, share.sums.cpu_max_millicores or limits.cpu_max_millicores
            )
            cpu = self._clamped(wanted, client_place(uid), ".")
            quota = cpu * interface_files.CPU_PERIOD_USEC // 1000
            # of the period that a new cgroup has: to set either, the kernel looks at all cgroups of the host
            yield "cpu", "cpu.cfs_quota_us", str(min(quota, interface_files.CPU_QUOTA_MAX_USEC))
        if limits.memory_max_bytes:
            # memsw may never be below the limit of memory: that one goes first.
            yield "memory", "memory.limit_in_bytes", str(limits.memory_max_bytes)
            if self._bounds_swap:
                yield "memory", "memory.memsw.limit_in_bytes", str(limits.memory_max_bytes)
        if 0 < limits.pids_max < interface_files.PIDS_MAX:
            yield "pids", "pids.max", str(limits.pids_max)
        for name, value in (
            ("read_bps", limits.io_rbps_max),
            ("write_bps", limits.io_wbps_max),
            ("read_iops", min(limits.io_riops_max, interface_files.IOPS_MAX)),
            ("write_iops", min(limits.io_wiops_max, interface_files.IOPS_MAX)),
        ):
            if value and not self._io_devices:
                raise ConfigError(
                    f"cannot limit the disk IO of {subject}: no disk was named", hint=devices.HINT
                )
            for device in self._io_devices if value else ():
                yield IO_CONTROLLER, f"blkio.throttle.{name}_device", f"{device} {value}"


class V1Cgroup:
    """One job's directories. Any of them may be missing after a crash."""

    def __init__(
        self,
        job_id: int,
        tops: Mapping[str, interface_files.TopDirectory],
        place: str,
        on_removed: Callable[[], None],
        throttled: Sequence[str],
        disks: Sequence[str],
    ) -> None:
        """Stand for the cgroup at *place* below each of *tops*, which are by their controllers.

        *throttled*: the files that hold limits of disk IO, a line for each of *disks*.
        """
        self._tops: Final = tops
        self._place: Final = place
        self._throttled: Final = tuple(dict.fromkeys(throttled))
        self._disks: Final = disks
        self._subject: Final = f"job {job_id}"
        self._on_removed: Final = on_removed

    @property
    def by_controller(self) -> dict[str, str]:
        """The directory that has each controller's files."""
        return {controller: f"{top.path}/{self._place}" for controller, top in self._tops.items()}

    @property
    def directories(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(dict.fromkeys(self.by_controller.values()))

    @contextmanager
    def init_arguments(self) -> Iterator[list[str | int]]:
        lifts = [(self._tops[IO_CONTROLLER], f"{self._place}/{name}") for name in self._throttled]
        with (
            self.session_arguments() as enter,
            interface_files.opened(lifts, os.O_WRONLY, self._subject) as lift,
        ):
            yield [*enter, *interface_files.lift_words(self._throttled, lift, self._disks)]

    @contextmanager
    def session_arguments(self) -> Iterator[list[str | int]]:
        # Not cgroup.procs: to move all threads of a process the kernel first waits for every fork of the host
        # (cgroup_threadgroup_rwsem), for milliseconds. Init has one thread, and moves that.
        entries = [(top, f"{self._place}/tasks") for top in dict.fromkeys(self._tops.values())]
        with interface_files.opened(entries, os.O_WRONLY, self._subject) as descriptors:
            yield [word for number in descriptors for word in ("--cgroup-procs-fd", number)]

    def make_equal(self) -> None:
        self._write("cpu", "cpu.shares", str(_SHARES_DEFAULT))

    def pids(self) -> list[int]:
        # init enters one hierarchy after the other, and may die between two of them
        return sorted(set().union(*(interface_files.read_pids(directory) for directory in self.directories)))

    def lift_throttles(self) -> None:
        try:
            self._lift_quota()
        finally:
            if IO_CONTROLLER in self._tops:
                interface_files.lift(self.by_controller[IO_CONTROLLER])

    def kill(self) -> None:
        try:
            # No new process from now on: a fork bomb cannot outrun the loop.
            self._write("pids", "pids.max", "0")
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        interface_files.kill_processes(self.pids)

    def usage(self) -> Usage:
        read, written = devices.sum_io(self._read("blkio", "blkio.throttle.io_service_bytes"), _parse_io_line)
        return Usage(
            cpu_usage_usec=self._number("cpuacct", "cpuacct.usage") // 1000,
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            io_read_bytes=read,
            io_write_bytes=written,
            oom_kills=interface_files.read_fields(self._read("memory", "memory.oom_control")).get(
                "oom_kill", 0
            ),
        )

    def measure(self) -> UsageSample:
        io_stat = ""
        if "blkio" in self._tops:
            io_stat = self._read_now("blkio", "blkio.throttle.io_service_bytes")
        read, written = devices.sum_io(io_stat, _parse_io_line)
        return UsageSample(
            time=datetime.now(UTC),
            cpu_usage_usec=self._number_now("cpuacct", "cpuacct.usage") // 1000,
            memory_bytes=self._number_now("memory", "memory.usage_in_bytes"),
            io_read_bytes=read,
            io_write_bytes=written,
            pids=self._number_now("pids", "pids.current"),
        )

    def try_remove(self) -> bool:
        # a quota that cannot be lifted does not prevent the removal
        with suppress(KernelError):
            self._lift_quota()
        if not all(
            interface_files.try_rmdir(self._place, self._subject, top)
            for top in dict.fromkeys(self._tops.values())
        ):
            return False
        self._on_removed()
        return True

    def _lift_quota(self) -> None:
        # While it is there its client's may not be less (EINVAL, sched-bwc.rst); it outlives its directory.
        try:
            self._write("cpu", "cpu.cfs_quota_us", "-1")
        except KernelError as error:
            # the directory, or this file where the kernel has no such limits
            if error.errno != errno.ENOENT:
                raise

    def _write(self, controller: str, name: str, value: str) -> None:
        interface_files.write_text(
            f"{self._place}/{name}", value, f"{name} of {self._subject}", self._tops[controller]
        )

    def _read_now(self, controller: str, name: str) -> str:
        return interface_files.read_text(
            f"{self._place}/{name}", f"{name} of {self._subject}", self._tops[controller]
        )

    def _number_now(self, controller: str, name: str) -> int:
        return interface_files.read_number(
            f"{self._place}/{name}", f"{name} of {self._subject}", self._tops[controller]
        )

    def _read(self, controller: str, name: str) -> str:
        return self._unless_missing(self._read_now, controller, name, "")

    def _number(self, controller: str, name: str) -> int:
        return self._unless_missing(self._number_now, controller, name, 0)

    def _unless_missing(self, read: Callable[[str, str], _T], controller: str, name: str, nothing: _T) -> _T:
        """Read, or return *nothing* for a missing directory: such a job used nothing there."""
        if controller not in self._tops:
            return nothing
        try:
            return read(controller, name)
        except KernelError as error:
            if error.errno != errno.ENOENT or os.path.isdir(self.by_controller[controller]):
                raise
            return nothing


def _parse_io_line(line: str) -> tuple[str, int, int]:
    # `254:0 Read 4096`; the last line is `Total 4096`
    device, _, rest = line.partition(" ")
    kind, _, count = rest.partition(" ")
    return device, int(count) if kind == "Read" else 0, int(count) if kind == "Write" else 0
