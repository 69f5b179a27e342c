"""cgroup v1: one directory of a job in each controller's own hierarchy.

v1 throttles reads and direct writes only: a buffered write is charged to no job.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

from pjw.errors import ConfigError, JobStateError, KernelError
from pjw.launcher.cgroup import devices, files, throttles
from pjw.launcher.cgroup.places import Places, client_place
from pjw.model import DEFAULT_SHARE, WEIGHT_DEFAULT, GroupUse, Limits, Share, Sums, Usage, UsageSample

_T = TypeVar("_T")

CONTROLLERS: Final = ("cpu", "cpuacct", "memory", "pids")
IO_CONTROLLER: Final = "blkio"
# the most that the kernel takes, and its default: MAX_SHARES and NICE_0_LOAD in kernel/sched
_SHARES_MAX: Final = 262_144
_SHARES_DEFAULT: Final = 1024


def mounted_controllers(mounts: Sequence[files.Mount]) -> dict[str, str]:
    """The mount point of each controller; two may share one, as cpu and cpuacct often do."""
    points: dict[str, str] = {}
    v1_mounts = [mount for mount in mounts if mount.fs_type == "cgroup"]
    # A mount of the whole hierarchy goes before one of a part (a container's bind mount).
    for mount in sorted(v1_mounts, key=lambda mount: mount.root != "/"):
        for controller in (*CONTROLLERS, IO_CONTROLLER):
            if controller in mount.super_options:
                points.setdefault(controller, mount.point)
    return points


def open_hierarchy(instance: str, points: Mapping[str, str], io_devices: Sequence[str]) -> "V1Hierarchy":
    """Make the parents; *points* has every controller that is needed."""
    parents = {}
    for controller, point in points.items():
        with files.locked(point):
            files.make_parent(f"{point}/pjw", hint=f"run as root, with {point} writable")
            parents[controller] = f"{point}/pjw/{instance}"
            files.make_parent(parents[controller])
    return V1Hierarchy(parents, io_devices)


class V1Hierarchy:
    """The jobs of one instance."""

    version: Final = 1

    def __init__(self, parents: Mapping[str, str], io_devices: Sequence[str]) -> None:
        self._parents: Final = dict(parents)
        self._io_devices: Final = tuple(io_devices)
        self._places: Final = Places(parents.values())
        self._shares: Final[dict[int, Share]] = {}
        # the processor time that the kernel has for all jobs and for each client, in thousandths; 0 is any
        self._cpu: Final[dict[str, int]] = {}

    def create(self, job_id: int, limits: Limits, uid: int, share: Share = DEFAULT_SHARE) -> "V1Cgroup":
        subject = f"job {job_id}"
        if self.find(job_id) is not None:
            raise JobStateError(f"cannot create the cgroup of {subject}: it exists")
        new_client = uid not in self._places
        cgroup = self._cgroup(job_id, self._places.add(job_id, uid), throttled=throttles.are_set(limits))
        made: list[str] = []
        try:
            if new_client:
                self._make_client(uid)
            if self.share_of(uid) != share:
                self.set_share(uid, share)
            settings = list(self._settings(limits, uid, share, subject))
            for directory in cgroup.directories:
                try:
                    os.mkdir(directory, 0o755)
                except OSError as error:
                    raise KernelError(
                        "make cgroup", f"{directory} of {subject}", error.errno or errno.EIO
                    ) from error
                made.append(directory)
            for controller, name, value in settings:
                files.write_text(f"{cgroup.by_controller[controller]}/{name}", value, f"{name} of {subject}")
        except BaseException:
            for directory in reversed(made):
                os.rmdir(directory)
            self._forget(job_id)
            raise
        return cgroup

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
        for parent in dict.fromkeys(self._parents.values()):
            files.remove_parents(parent)

    def _cgroup(self, job_id: int, place: str, *, throttled: bool = False) -> "V1Cgroup":
        directories = {name: f"{parent}/{place}" for name, parent in self._parents.items()}
        disks = self._io_devices if throttled else ()
        return V1Cgroup(job_id, directories, lambda: self._forget(job_id), disks)

    def _forget(self, job_id: int) -> None:
        uid = self._places.forget(job_id)
        if uid not in self._places:
            self._shares.pop(uid, None)
            self._cpu.pop(client_place(uid), None)

    def _make_client(self, uid: int) -> None:
        for parent in dict.fromkeys(self._parents.values()):
            files.make_parent(f"{parent}/{client_place(uid)}")

    def _set_sums(self, place: str, sums: Sums, subject: str) -> list[str]:
        """Bound what is below *place*; in words, what the kernel does not take now."""
        pids = str(sums.pids_max) if 0 < sums.pids_max < files.PIDS_MAX else "max"
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
                files.not_set("memory_max_bytes", sums.memory_max_bytes, subject, f"{used} are used")
            )
        cpu = sums.cpu_max_millicores
        if cpu and place != ".":
            cpu = self._clamped(cpu, ".")
        quota = min(cpu * files.SUM_PERIOD_USEC // 1000, files.CPU_QUOTA_MAX_USEC) or -1
        try:
            self._write("cpu", place, "cpu.cfs_period_us", str(files.SUM_PERIOD_USEC), subject)
            self._write("cpu", place, "cpu.cfs_quota_us", str(quota), subject)
        except KernelError as error:
            # No quota of a child may be above its parent's (Documentation/scheduler/sched-bwc.rst).
            if error.errno != errno.EINVAL:
                raise
            not_set.append(files.not_set("cpu_max_millicores", cpu, subject, "a running job may use more"))
        self._cpu[place] = self._cpu_millicores(place)
        return not_set

    def _clamped(self, millicores: int, *places: str) -> int:
        """So much processor time, or what those above have: v1 refuses more than that (EINVAL)."""
        return min(millicores, *(self._cpu.get(place) or millicores for place in places))

    def _cpu_millicores(self, place: str) -> int:
        quota = int(self._read("cpu", place, "cpu.cfs_quota_us"))
        period = int(self._read("cpu", place, "cpu.cfs_period_us"))
        return quota * 1000 // period if quota > 0 else 0

    def _weigh_io(self, place: str, weight: int) -> None:
        # Only BFQ has weights on v1, from 1 to 1000, and only where a disk uses it is the file there.
        path = f"{self._parents.get(IO_CONTROLLER, '')}/{place}/blkio.bfq.weight"
        if os.path.exists(path):
            files.write_text(path, str(min(weight, 1000)), f"blkio.bfq.weight of {place}")

    def _write(self, controller: str, place: str, name: str, value: str, subject: str) -> None:
        files.write_text(f"{self._parents[controller]}/{place}/{name}", value, f"{name} of {subject}")

    def _read(self, controller: str, place: str, name: str) -> str:
        return files.read_text(f"{self._parents[controller]}/{place}/{name}", f"{name} of {place}")

    def _settings(
        self, limits: Limits, uid: int, share: Share, subject: str
    ) -> Iterator[tuple[str, str, str]]:
        yield "cpu", "cpu.shares", str(_SHARES_MAX)
        if limits.cpu_max_millicores:
            # also what its client is to have and cannot yet, or the next job would keep it from that again
            wanted = min(
                limits.cpu_max_millicores, share.sums.cpu_max_millicores or limits.cpu_max_millicores
            )
            cpu = self._clamped(wanted, client_place(uid), ".")
            quota = cpu * files.CPU_PERIOD_USEC // 1000
            yield "cpu", "cpu.cfs_period_us", str(files.CPU_PERIOD_USEC)
            yield "cpu", "cpu.cfs_quota_us", str(min(quota, files.CPU_QUOTA_MAX_USEC))
        # memsw bounds memory and swap together, so alone it would leave a job free to swap.
        yield "memory", "memory.swappiness", "0"
        if limits.memory_max_bytes:
            # memsw may never be below the limit of memory: that one goes first.
            yield "memory", "memory.limit_in_bytes", str(limits.memory_max_bytes)
            if os.path.exists(f"{self._parents['memory']}/memory.memsw.limit_in_bytes"):
                yield "memory", "memory.memsw.limit_in_bytes", str(limits.memory_max_bytes)
        if 0 < limits.pids_max < files.PIDS_MAX:
            yield "pids", "pids.max", str(limits.pids_max)
        for name, value in (
            ("read_bps", limits.io_rbps_max),
            ("write_bps", limits.io_wbps_max),
            ("read_iops", min(limits.io_riops_max, files.IOPS_MAX)),
            ("write_iops", min(limits.io_wiops_max, files.IOPS_MAX)),
        ):
            if value and not self._io_devices:
                raise ConfigError(
                    f"cannot limit the disk IO of {subject}: no disk was named", hint=devices.HINT
                )
            for device in self._io_devices if value else ():
                yield IO_CONTROLLER, f"blkio.throttle.{name}_device", f"{device} {value}"


class V1Cgroup:
    """One job's directories. Any of them may be missing in what a crash has left."""

    def __init__(
        self,
        job_id: int,
        by_controller: Mapping[str, str],
        on_removed: Callable[[], None],
        throttled_disks: Sequence[str] = (),
    ) -> None:
        self.by_controller: Final = dict(by_controller)
        self.directories: Final = tuple(dict.fromkeys(by_controller.values()))
        self._throttled_disks: Final = throttled_disks
        self._subject: Final = f"job {job_id}"
        self._on_removed: Final = on_removed

    @contextmanager
    def init_arguments(self) -> Iterator[list[str | int]]:
        # Not cgroup.procs: to move all threads of a process the kernel first waits for every fork of the host
        # (cgroup_threadgroup_rwsem), for milliseconds. Init has one thread, and moves that.
        paths = [f"{directory}/tasks" for directory in self.directories]
        blkio = self.by_controller.get(IO_CONTROLLER, "")
        with ExitStack() as stack:
            descriptors = stack.enter_context(files.opened(paths, os.O_WRONLY, self._subject))
            lifts = stack.enter_context(throttles.lift_options(blkio, self._throttled_disks, self._subject))
            yield [*(word for number in descriptors for word in ("--cgroup-procs-fd", number)), *lifts]

    def make_equal(self) -> None:
        path = f"{self.by_controller['cpu']}/cpu.shares"
        files.write_text(path, str(_SHARES_DEFAULT), f"cpu.shares of {self._subject}")

    def pids(self) -> list[int]:
        # init enters one hierarchy after the other, and may die between two of them
        return sorted(set().union(*(files.read_pids(directory) for directory in self.directories)))

    def lift_throttles(self) -> None:
        try:
            self._lift_quota()
        finally:
            if IO_CONTROLLER in self.by_controller:
                throttles.lift(self.by_controller[IO_CONTROLLER])

    def kill(self) -> None:
        try:
            # No new process from now on: a fork bomb cannot outrun the loop.
            files.write_text(f"{self.by_controller['pids']}/pids.max", "0", f"pids.max of {self._subject}")
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        files.kill_processes(self.pids)

    def usage(self) -> Usage:
        read, written = devices.sum_io(self._read("blkio", "blkio.throttle.io_service_bytes"), _parse_io_line)
        return Usage(
            cpu_usage_usec=self._number("cpuacct", "cpuacct.usage") // 1000,
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            io_read_bytes=read,
            io_write_bytes=written,
            oom_kills=files.read_fields(self._read("memory", "memory.oom_control")).get("oom_kill", 0),
        )

    def measure(self) -> UsageSample:
        io_stat = ""
        if "blkio" in self.by_controller:
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
        # one that cannot be lifted keeps nobody from the removal
        with suppress(KernelError):
            self._lift_quota()
        if not all(files.try_rmdir(directory, self._subject) for directory in self.directories):
            return False
        self._on_removed()
        return True

    def _lift_quota(self) -> None:
        # While it is there its client's may not be less (EINVAL, sched-bwc.rst); it outlives its directory.
        quota = f"{self.by_controller['cpu']}/cpu.cfs_quota_us"
        try:
            files.write_text(quota, "-1", f"cpu.cfs_quota_us of {self._subject}")
        except KernelError as error:
            # the directory, or this file where the kernel has no such limits
            if error.errno != errno.ENOENT:
                raise

    def _read_now(self, controller: str, name: str) -> str:
        return files.read_text(f"{self.by_controller[controller]}/{name}", f"{name} of {self._subject}")

    def _number_now(self, controller: str, name: str) -> int:
        return files.read_number(f"{self.by_controller[controller]}/{name}", f"{name} of {self._subject}")

    def _read(self, controller: str, name: str) -> str:
        return self._unless_missing(self._read_now, controller, name, "")

    def _number(self, controller: str, name: str) -> int:
        return self._unless_missing(self._number_now, controller, name, 0)

    def _unless_missing(self, read: Callable[[str, str], _T], controller: str, name: str, nothing: _T) -> _T:
        """*nothing* from a directory that is missing: such a job used nothing there."""
        if controller not in self.by_controller:
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
