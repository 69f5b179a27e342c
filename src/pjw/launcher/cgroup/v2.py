"""cgroup v2: one directory for each job, processes only in the leaves."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup import devices, interface_files
from pjw.launcher.cgroup.places import Places, client_place
from pjw.model import DEFAULT_SHARE, GroupUse, Limits, Share, Sums, Usage, UsageSample

CONTROLLERS: Final = ("cpu", "memory", "pids")
IO_CONTROLLER: Final = "io"

# of a job, a line for each disk
IO_LIMITS: Final = "io.max"

# The leaf in which we and our server live, where the base may hold no process.
SUPERVISOR: Final = "supervisor"


def find_base(mount: interface_files.CgroupMount) -> str:
    """Return the top of our subtree: the root of the mount, or a cgroup delegated to us.

    Delegation counts only when systemd itself starts us in the leaf (DelegateSubgroup=supervisor). With
    Delegate=yes alone, jobs that outlive us would leave controllers handed on in the very cgroup that systemd
    must put our next main process into; the kernel refuses that (EBUSY, exit status 219/CGROUP) until the
    last job has ended. So jobs are then kept outside of the unit.
    """
    own = next(
        line.removeprefix("0::")
        for line in interface_files.read_text("/proc/self/cgroup", "/proc/self/cgroup").splitlines()
        if line.startswith("0::")
    )
    # A path with `..` lies outside of our cgroup namespace, so the mount does not show it.
    if os.path.basename(own) == SUPERVISOR and not own.startswith("/.."):
        parent = os.path.dirname(mount.point + own)
        if _is_delegated(parent):
            return parent
    return mount.point


def controllers_in(base: str) -> set[str]:
    """Return the controllers that *base* may hand on to its children."""
    path = f"{base}/cgroup.controllers"
    return set(interface_files.read_text(path, path).split())


def open_hierarchy(
    instance: str,
    base: str,
    controllers: Sequence[str],
    io_devices: Sequence[str],
    supervisor_pids: Sequence[int],
) -> "V2Hierarchy":
    """Make the parents and hand them the controllers, from the top downwards."""
    _leave(base, supervisor_pids)
    parent = base
    with interface_files.locked(base):
        for name in ("pjw", instance):
            _enable(parent, controllers)
            parent = f"{parent}/{name}"
            interface_files.make_parent(parent, hint=f"run as root, with {base} writable")
        _enable(parent, controllers)
    return V2Hierarchy(parent, controllers, io_devices)


def _is_delegated(directory: str) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            continue
    return False


def _leave(base: str, supervisor_pids: Sequence[int]) -> None:
    """Move *supervisor_pids* out of the way: a cgroup that hands on controllers holds no process."""
    # Only the real root may do both; it alone has no cgroup.events.
    if not os.path.exists(f"{base}/cgroup.events"):
        return
    movers = sorted(set(supervisor_pids) & set(interface_files.read_pids(base)))
    if not movers:
        return
    leaf = f"{base}/{SUPERVISOR}"
    interface_files.make_parent(leaf)
    for pid in movers:
        interface_files.write_text(f"{leaf}/cgroup.procs", str(pid), f"{leaf}/cgroup.procs")


def _enable(directory: str, controllers: Sequence[str]) -> None:
    path = f"{directory}/cgroup.subtree_control"
    enabled = interface_files.read_text(path, path).split()
    missing = [f"+{name}" for name in controllers if name not in enabled]
    if not missing:
        return
    try:
        interface_files.write_text(path, " ".join(missing), path)
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        others = ", ".join(map(str, interface_files.read_pids(directory))) or "none that is visible here"
        raise ConfigError(
            f"cannot give the controllers of {directory} to jobs: processes are in it ({others})",
            hint="start pjwd in a cgroup of its own, in a leaf called supervisor",
        ) from error


# the most that the kernel takes, and its default (admin-guide/cgroup-v2.rst, cpu.weight)
_WEIGHT_MAX: Final = 10_000
_WEIGHT_DEFAULT: Final = 100


class V2Hierarchy:
    """The jobs of one instance."""

    version: Final = 2

    def __init__(self, parent: str, controllers: Sequence[str], io_devices: Sequence[str]) -> None:
        self._top: Final = interface_files.open_top(parent)
        self._controllers: Final = tuple(controllers)
        self._io_devices: Final = tuple(io_devices)
        self._places: Final = Places([parent])
        self._shares: Final[dict[int, Share]] = {}
        # whether the kernel accounts swap
        self._bounds_swap: Final = os.path.exists(f"{parent}/memory.swap.max")
        self.shown: Final = (parent,)

    def create(self, job_id: int, limits: Limits, uid: int, share: Share = DEFAULT_SHARE) -> "V2Cgroup":
        subject = f"job {job_id}"
        settings = list(self._settings(limits, subject))
        new_client = uid not in self._places
        place = self._places.add(job_id, uid)
        made = False
        try:
            if new_client:
                self._make_client(uid)
            if self.share_of(uid) != share:
                self.set_share(uid, share)
            interface_files.make_cgroup(place, subject, self._top)
            made = True
            try:
                # The job runs as another user and may read its cgroup; on the host, parents keep others out.
                os.chmod(place, 0o755, dir_fd=self._top.descriptor)  # noqa: S103
            except OSError as error:
                raise KernelError(
                    "make readable", f"the cgroup of {subject}", error.errno or errno.EIO
                ) from error
            for name, value in settings:
                self._write(place, name, value, subject)
        except BaseException:
            if made:
                os.rmdir(place, dir_fd=self._top.descriptor)
            self._forget(job_id)
            raise
        return self._cgroup(job_id, place, [name for name, _ in settings if name == IO_LIMITS])

    def find(self, job_id: int) -> "V2Cgroup | None":
        cgroup = self._cgroup(job_id, self._places.of(job_id))
        return cgroup if os.path.isdir(cgroup.directory) else None

    def job_ids(self) -> list[int]:
        return sorted(self._places.job_ids())

    def set_sums(self, sums: Sums) -> list[str]:
        return self._set_sums(".", sums, "all jobs")

    def set_share(self, uid: int, share: Share) -> list[str]:
        if uid not in self._places:
            return []
        place, subject = client_place(uid), f"client {uid}"
        self._write(place, "cpu.weight", str(share.weight), subject)
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
            memory_bytes=int(self._read(place, "memory.current")),
            pids=int(self._read(place, "pids.current")),
            cpu_usage_usec=interface_files.read_fields(self._read(place, "cpu.stat"))["usage_usec"],
        )

    def release(self) -> None:
        self._top.close()
        interface_files.remove_parents(self._top.path)

    def _cgroup(self, job_id: int, place: str, throttled: Sequence[str] = ()) -> "V2Cgroup":
        return V2Cgroup(job_id, place, lambda: self._forget(job_id), self._top, throttled, self._io_devices)

    def _forget(self, job_id: int) -> None:
        uid = self._places.forget(job_id)
        if uid not in self._places:
            self._shares.pop(uid, None)

    def _make_client(self, uid: int) -> None:
        directory = f"{self._top.path}/{client_place(uid)}"
        interface_files.make_parent(directory)
        _enable(directory, self._controllers)

    def _set_sums(self, place: str, sums: Sums, subject: str) -> list[str]:
        """Bound the usage below *place*; return in words the bounds that would kill jobs now."""
        pids = str(sums.pids_max) if 0 < sums.pids_max < interface_files.PIDS_MAX else "max"
        self._write(place, "pids.max", pids, subject)
        cpu = (
            min(
                sums.cpu_max_millicores * interface_files.SUM_PERIOD_USEC // 1000,
                interface_files.CPU_QUOTA_MAX_USEC,
            )
            or "max"
        )
        self._write(place, "cpu.max", f"{cpu} {interface_files.SUM_PERIOD_USEC}", subject)
        # The kernel would kill jobs until the rest fits (admin-guide/cgroup-v2.rst, memory.max).
        used = self._memory_in_use(place)
        if 0 < sums.memory_max_bytes < used:
            return [
                interface_files.not_set(
                    "memory_max_bytes", sums.memory_max_bytes, subject, f"{used} are used"
                )
            ]
        self._write(place, "memory.max", str(sums.memory_max_bytes or "max"), subject)
        return []

    def _memory_in_use(self, place: str) -> int:
        """Return the memory in use without the cache of files, which the kernel takes back."""
        stat = interface_files.read_fields(self._read(place, "memory.stat"))
        cache = stat["active_file"] + stat["inactive_file"]
        return int(self._read(place, "memory.current")) - cache

    def _weigh_io(self, place: str, weight: int) -> None:
        # The first is there where io.cost is on, the second, from 1 to 1000, where a disk has BFQ.
        for name, value in (("io.weight", weight), ("io.bfq.weight", min(weight, 1000))):
            if os.path.exists(f"{self._top.path}/{place}/{name}"):
                self._write(place, name, str(value), place)

    def _write(self, place: str, name: str, value: str, subject: str) -> None:
        interface_files.write_text(f"{place}/{name}", value, f"{name} of {subject}", self._top)

    def _read(self, place: str, name: str) -> str:
        return interface_files.read_text(f"{place}/{name}", f"{name} of {place}", self._top)

    def _settings(self, limits: Limits, subject: str) -> Iterator[tuple[str, str]]:
        yield "cpu.weight", str(_WEIGHT_MAX)
        if limits.cpu_max_millicores:
            quota = limits.cpu_max_millicores * interface_files.CPU_PERIOD_USEC // 1000
            yield (
                "cpu.max",
                f"{min(quota, interface_files.CPU_QUOTA_MAX_USEC)} {interface_files.CPU_PERIOD_USEC}",
            )
        # Not memory.oom.group: v1 has no such thing, and a job means the same on both. The rest of a job that
        # lost a process may well handle that, as a shell does.
        if limits.memory_max_bytes:
            yield "memory.max", str(limits.memory_max_bytes)
        # not by a limit of all jobs: a job sees its own
        if self._bounds_swap:
            yield "memory.swap.max", "0"
        if 0 < limits.pids_max < interface_files.PIDS_MAX:
            yield "pids.max", str(limits.pids_max)
        io_limits = {
            "rbps": limits.io_rbps_max,
            "wbps": limits.io_wbps_max,
            "riops": min(limits.io_riops_max, interface_files.IOPS_MAX),
            "wiops": min(limits.io_wiops_max, interface_files.IOPS_MAX),
        }
        words = " ".join(f"{name}={value}" for name, value in io_limits.items() if value)
        if words and not self._io_devices:
            raise ConfigError(f"cannot limit the disk IO of {subject}: no disk was named", hint=devices.HINT)
        for device in self._io_devices if words else ():
            yield IO_LIMITS, f"{device} {words}"


class V2Cgroup:
    """One job's directory."""

    def __init__(
        self,
        job_id: int,
        place: str,
        on_removed: Callable[[], None] = lambda: None,
        top: interface_files.TopDirectory = interface_files.ROOT,
        throttled: Sequence[str] = (),
        disks: Sequence[str] = (),
    ) -> None:
        """Stand for the cgroup at *place* below *top*.

        *throttled*: the files that hold limits of disk IO, a line for each of *disks*.
        """
        self._top: Final = top
        self._place: Final = place
        self._throttled: Final = tuple(dict.fromkeys(throttled))
        self._disks: Final = disks
        self._subject: Final = f"job {job_id}"
        self._on_removed: Final = on_removed

    @property
    def directory(self) -> str:
        """Its path."""
        return os.path.join(self._top.path, self._place)

    @contextmanager
    def init_arguments(self) -> Iterator[list[str | int]]:
        lifts = [(self._top, f"{self._place}/{name}") for name in self._throttled]
        with (
            self.session_arguments() as enter,
            interface_files.opened(lifts, os.O_WRONLY, self._subject) as lift,
        ):
            words = interface_files.lift_words(self._throttled, lift, self._disks)
            yield [*enter, "--cgroup", self.directory, *words]

    @contextmanager
    def session_arguments(self) -> Iterator[list[str | int]]:
        own = [(self._top, self._place)]
        with interface_files.opened(own, os.O_RDONLY | os.O_DIRECTORY, self._subject) as [directory]:
            yield ["--cgroup-fd", directory]

    def make_equal(self) -> None:
        self._write("cpu.weight", str(_WEIGHT_DEFAULT))

    def pids(self) -> list[int]:
        return interface_files.read_pids(self.directory)

    def lift_throttles(self) -> None:
        interface_files.lift(self.directory)

    def kill(self) -> None:
        try:
            self._write("cgroup.kill", "1")
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            # No such file before Linux 5.14, or no such job any more.
            interface_files.kill_processes(self.pids)

    def usage(self) -> Usage:
        cpu = interface_files.read_fields(self._read("cpu.stat"))
        memory = interface_files.read_fields(self._read("memory.events"))
        # no such file before Linux 5.19
        peak = int(self._read_if_any("memory.peak") or "0")
        read, written = self._io()
        return Usage(
            cpu_usage_usec=cpu["usage_usec"],
            memory_peak_bytes=peak,
            io_read_bytes=read,
            io_write_bytes=written,
            oom_kills=memory["oom_kill"],
        )

    def measure(self) -> UsageSample:
        read, written = self._io()
        return UsageSample(
            time=datetime.now(UTC),
            cpu_usage_usec=interface_files.read_fields(self._read("cpu.stat"))["usage_usec"],
            memory_bytes=self._number("memory.current"),
            io_read_bytes=read,
            io_write_bytes=written,
            pids=self._number("pids.current"),
        )

    def try_remove(self) -> bool:
        if not interface_files.try_rmdir(self._place, self._subject, self._top):
            return False
        self._on_removed()
        return True

    def _io(self) -> tuple[int, int]:
        # no such file where no disk was named
        return devices.sum_io(self._read_if_any("io.stat"), _parse_io_line)

    def _write(self, name: str, value: str) -> None:
        interface_files.write_text(f"{self._place}/{name}", value, f"{name} of {self._subject}", self._top)

    def _read(self, name: str) -> str:
        return interface_files.read_text(f"{self._place}/{name}", f"{name} of {self._subject}", self._top)

    def _read_if_any(self, name: str) -> str:
        """Read likewise; return nothing where this kernel, or this cgroup, has no such file."""
        try:
            return self._read(name)
        except KernelError as error:
            if error.errno != errno.ENOENT or not os.path.isdir(self.directory):
                raise
            return ""

    def _number(self, name: str) -> int:
        return interface_files.read_number(f"{self._place}/{name}", f"{name} of {self._subject}", self._top)


def _parse_io_line(line: str) -> tuple[str, int, int]:
    # `254:0 rbytes=4096 wbytes=0 rios=1 …`; a device that was idle may have a bare number
    device, *pairs = line.split()
    counts = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return device, int(counts.get("rbytes", 0)), int(counts.get("wbytes", 0))
