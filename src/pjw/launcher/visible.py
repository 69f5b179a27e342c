"""The host's file systems that a job is shown, how it is shown them, and the covered paths in them.

A job always sees the root file system. An overlay shows one file system and nothing that is mounted in it, so
each other file system takes an overlay of its own. At every other mount point a job would see the files
beneath the mount, which the operator may have masked by it: all these are covered.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup.interface_files import parse_mounts

# with the mounts in them; in addition to the root's own file system
VISIBLE: Final = ("/etc", "/opt", "/usr")
NOT_VISIBLE: Final = ("/home", "/srv")
# paths that are a job's own, whatever the host has there
OWN: Final = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/tmp")  # noqa: S108 - the host's, never opened
# These do not go by the mode of a file alone. An overlay would read them as root, which mounts it.
_ASK_OTHERS: Final = (
    b"9p afs ceph cifs coda fuse fuseblk gfs2 gpfs lustre nfs nfs4 ocfs2 orangefs smb3 smbfs virtiofs".split()
)
MOUNTINFO: Final = "/proc/self/mountinfo"
# as many as the kernel follows (path_resolution(7))
_LINKS_MAX: Final = 40

# Each is a mount for every job: of more of them, those that lie side by side are covered by their parents.
_COVERS_MAX: Final = 32
# the most that init takes (init/init.h, PLACES_MAX)
_PLACES_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class HostMount:
    """A line of a table of mounts: its id, the device and the type of its file system, its flags."""

    number: bytes
    device: bytes
    type: bytes
    flags: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """A path where a job is shown a file system of the host, or an empty directory.

    Or a mount of the host that such a path lies in.
    """

    path: str
    # an option of init's: by an overlay, as it is, or not; or a mount of the template (init/template.c)
    view: Literal["visible", "bound", "cover", "mount"]
    # lest another mount at the path is taken for it; None for a covered path
    mount: HostMount | None = None


def check_visible(paths: Iterable[str]) -> None:
    """Check paths to show; a missing one may come later. Raises ConfigError for one that cannot be shown."""
    mounts = mounts_of(read_mounts())
    for path in paths:
        real = _real(path, mounts)
        if _is_within(real, OWN):
            raise ConfigError(
                f"cannot show {path} to jobs: each has its own directory there",
                hint=f"visible_paths may not lie in {', '.join(OWN)}",
            )
        if not _asks_others(real, mounts) and os.path.exists(real) and not os.path.isdir(real):
            raise ConfigError(
                f"cannot show {path} to jobs: it is no directory", hint="add the directory that it lies in"
            )


def read_mounts() -> bytes:
    """Read the host's table of mounts, as this process sees it. Raises KernelError."""
    try:
        with open(MOUNTINFO, "rb") as file:
            return file.read()
    except OSError as error:
        raise KernelError("read", MOUNTINFO, error.errno or 0) from error


def places_of(visible: Sequence[str], hidden: Sequence[str], table: bytes) -> tuple[Place, ...]:
    """Return the places for init, parents first; *table* is proc_pid_mountinfo(5)'s. Raises ConfigError."""
    mounts = mounts_of(table)
    asked = {_real(path, mounts) for path in (*VISIBLE, *visible)}
    gone = {_real(path, mounts) for path in hidden}
    there = {
        path for path in mounts if path != "/" and not _is_within(path, OWN) and not _is_within(path, gone)
    }
    shown = {path for path in there if _is_within(path, asked)}
    homes = {_real(path, mounts) for path in NOT_VISIBLE}
    covered = _fold({path for path in there | homes if not _is_within(path, asked)})
    # a directory inside a covered one, which has no mount of its own
    shown |= {path for path in asked if _is_within(path, covered) and _may_be_shown(path, mounts)}
    if 1 + len(shown) + len(covered) > _PLACES_MAX:
        raise ConfigError(
            f"{len(shown)} file systems lie in the visible paths, and {len(covered)} are covered too:"
            f" a job takes {_PLACES_MAX}",
            hint="name directories in visible_paths that have fewer mounts in them",
        )
    places = [
        Place(path, "bound" if _asks_others(path, mounts) else "visible", mounts.get(path))
        for path in {"/", *shown}
    ]
    places += [Place(path, "cover") for path in covered]
    return tuple(sorted(places, key=lambda place: [name for name in place.path.split("/") if name]))


def template_of(places: Iterable[Place], others: Iterable[str], table: bytes) -> tuple[Place, ...]:
    """Return the mounts that hold the shown places and *others*, which have no links; the root first."""
    mounts = mounts_of(table)
    paths = ["/", *(place.path for place in places if place.view != "cover"), *others]
    points = {_mount_point(path, mounts) for path in paths}
    return tuple(Place(point, "mount", mounts.get(point)) for point in sorted(points))


def _real(path: str, mounts: Mapping[str, HostMount]) -> str:
    """Return *path* without links, but for those in a file system that asks others.

    Unlike os.path.realpath this asks no such file system: a server that is gone never answers, and the
    launcher would wait for it.
    """
    real, left, links = "/", path.split("/"), 0
    while left:
        name = left.pop(0)
        next_path = os.path.normpath(os.path.join(real, name))
        # without its root file system a host does nothing at all
        if next_path != "/" and next_path in mounts and _asks_others(next_path, mounts):
            return os.path.normpath(os.path.join(next_path, *left))
        target = "" if name in ("", "..") or next_path in mounts else _link(next_path)
        if not target:
            real = next_path
            continue
        links += 1
        if links > _LINKS_MAX:
            return os.path.normpath(os.path.join(next_path, *left))
        left[:0] = target.split("/")
        if target.startswith("/"):
            real = "/"
    return real


def _link(path: str) -> str:
    """Return the target of a link; nothing for another file, or for a missing one."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _may_be_shown(path: str, mounts: Mapping[str, HostMount]) -> bool:
    # init reports on a path that is not looked at here; it may wait
    return _asks_others(path, mounts) or os.path.isdir(path)


def _asks_others(path: str, mounts: Mapping[str, HostMount]) -> bool:
    """Return whether the file system of *path* asks others; False for an unknown one."""
    mount = mounts.get(_mount_point(path, mounts))
    return mount is not None and mount.type.split(b".")[0] in _ASK_OTHERS


def _mount_point(path: str, mounts: Mapping[str, HostMount]) -> str:
    """Return the mount point of the file system of *path*; the root for an unknown one."""
    while path != "/" and path not in mounts:
        path = os.path.dirname(path)
    return path


def mounts_of(table: bytes) -> dict[str, HostMount]:
    """Return the visible mount of each mount point; *table* is that of proc_pid_mountinfo(5)."""
    return {
        mount.point: HostMount(
            b"%d" % mount.id, mount.device.encode(), mount.fs_type.encode(), mount.options.encode()
        )
        for mount in parse_mounts(os.fsdecode(table))
    }


def _is_within(path: str, tops: Collection[str]) -> bool:
    """Return whether *path* is one of *tops*, or lies in one."""
    while path not in tops:
        if path == "/":
            return False
        path = os.path.dirname(path)
    return True


def _outermost(paths: set[str]) -> set[str]:
    return {path for path in paths if not _is_within(os.path.dirname(path), paths)}


def _fold(paths: set[str]) -> set[str]:
    """Reduce to a limited number: the deepest give way to their parents, which show nothing else."""
    paths = _outermost(paths)
    while len(paths) > _COVERS_MAX:
        parents = {path: os.path.dirname(path) for path in paths}
        parents = {
            path: parent
            for path, parent in parents.items()
            if parent != "/" and not any(_is_within(each, (parent,)) for each in OWN)
        }
        if not parents:
            break
        depth = max(path.count("/") for path in parents)
        deepest = {path: parent for path, parent in parents.items() if path.count("/") == depth}
        paths = _outermost((paths - deepest.keys()) | set(deepest.values()))
    return paths
