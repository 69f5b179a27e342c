"""cgroup v1: one directory of a job in each controller's own hierarchy.

v1 throttles reads and direct writes only: a buffered write is charged to no job.
"""

import errno
import os
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from pjw.errors import ConfigError, JobStateError, KernelError
from pjw.launcher.cgroup import devices, files
from pjw.model import Limits, Usage, UsageSample

CONTROLLERS: Final = ("cpu", "cpuacct", "memory", "pids")
IO_CONTROLLER: Final = "blkio"


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

    def create(self, job_id: int, limits: Limits) -> "V1Cgroup":
        subject = f"job {job_id}"
        settings = list(self._settings(limits, subject))
        made: list[str] = []
        try:
            cgroup = self._cgroup(job_id)
            for directory in cgroup.directories:
                try:
                    os.mkdir(directory, 0o755)
                except FileExistsError:
                    raise JobStateError(f"cannot create the cgroup of {subject}: it exists") from None
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
            raise
        return cgroup

    def find(self, job_id: int) -> "V1Cgroup | None":
        cgroup = self._cgroup(job_id)
        return cgroup if any(os.path.isdir(directory) for directory in cgroup.directories) else None

    def job_ids(self) -> list[int]:
        return sorted(set().union(*(files.job_ids_in(parent) for parent in self._parents.values())))

    def release(self) -> None:
        for parent in dict.fromkeys(self._parents.values()):
            files.remove_parents(parent)

    def _cgroup(self, job_id: int) -> "V1Cgroup":
        return V1Cgroup(job_id, {name: f"{parent}/job-{job_id}" for name, parent in self._parents.items()})

    def _settings(self, limits: Limits, subject: str) -> Iterator[tuple[str, str, str]]:
        if limits.cpu_max_millicores:
            quota = limits.cpu_max_millicores * files.CPU_PERIOD_USEC // 1000
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

    def __init__(self, job_id: int, by_controller: Mapping[str, str]) -> None:
        self.by_controller: Final = dict(by_controller)
        self.directories: Final = tuple(dict.fromkeys(by_controller.values()))
        self._subject: Final = f"job {job_id}"

    @contextmanager
    def init_arguments(self) -> Iterator[list[str]]:
        paths = [f"{directory}/cgroup.procs" for directory in self.directories]
        with files.inheritable(paths, os.O_WRONLY, self._subject) as descriptors:
            yield [word for number in descriptors for word in ("--cgroup-procs-fd", str(number))]

    def pids(self) -> list[int]:
        # init enters one hierarchy after the other, and may die between two of them
        return sorted(set().union(*(files.read_pids(directory) for directory in self.directories)))

    def kill(self) -> None:
        try:
            # No new process from now on: a fork bomb cannot outrun the loop.
            files.write_text(f"{self.by_controller['pids']}/pids.max", "0", f"pids.max of {self._subject}")
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
        files.kill_processes(self.pids, self._subject)

    def usage(self) -> Usage:
        read, written = devices.sum_io(self._read("blkio", "blkio.throttle.io_service_bytes"), _parse_io_line)
        return Usage(
            cpu_usage_usec=int(self._read("cpuacct", "cpuacct.usage") or 0) // 1000,
            memory_peak_bytes=int(self._read("memory", "memory.max_usage_in_bytes") or 0),
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
            cpu_usage_usec=int(self._read_now("cpuacct", "cpuacct.usage")) // 1000,
            memory_bytes=int(self._read_now("memory", "memory.usage_in_bytes")),
            io_read_bytes=read,
            io_write_bytes=written,
            pids=int(self._read_now("pids", "pids.current")),
        )

    def remove(self) -> None:
        deadline = time.monotonic() + files.SETTLE_SECONDS
        for directory in self.directories:
            while not self._try_remove(directory, deadline):
                files.wait_for_exit(files.read_pids(directory), deadline)

    def _try_remove(self, directory: str, deadline: float) -> bool:
        pause = select.poll()
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise KernelError(
                    "remove cgroup", f"{directory} of {self._subject}", error.errno or errno.EIO
                ) from error
            if not files.read_pids(directory):
                # The last process has ended for pidfds and not yet for its cgroup (kernels
                # from 6.19 on): v1 tells nobody when that is over, so look again in 1 ms.
                pause.poll(1)
            return False
        return True

    def _read_now(self, controller: str, name: str) -> str:
        return files.read_text(f"{self.by_controller[controller]}/{name}", f"{name} of {self._subject}")

    def _read(self, controller: str, name: str) -> str:
        """Nothing from a directory that is missing: such a job used nothing there."""
        directory = self.by_controller.get(controller)
        if directory is None or not os.path.isdir(directory):
            return ""
        return self._read_now(controller, name)


def _parse_io_line(line: str) -> tuple[str, int, int]:
    # `254:0 Read 4096`; the last line is `Total 4096`
    device, _, rest = line.partition(" ")
    kind, _, count = rest.partition(" ")
    return device, int(count) if kind == "Read" else 0, int(count) if kind == "Write" else 0
