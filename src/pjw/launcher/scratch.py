"""Scratch directories: one for each running job, in a directory that only root may write.

So a hostile server cannot put a link where the launcher is about to make a directory. That directory is the
state directory's own, or one for this state directory where the operator has named another place: several
pjwd may be given the same place.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.cgroup.interface_files import job_ids_in, read_mounts
from pjw.launcher.image_store import MARK, image_of
from pjw.launcher.policy import instance_name
from pjw.launcher.root_files import make_root_s, replace_file, require_root_s

if TYPE_CHECKING:
    from pjw.launcher.project_quota import ProjectQuotas

QUOTA_HINT: Final = (
    "mount it with prjquota (ext4: mkfs.ext4 -O project,quota), or set scratch.bytes_max and"
    " scratch.inodes_max to 0"
)
# the file of the state directory that says where scratch directories are, and were
PLACES_NAME: Final = "scratch-dirs"
RM_PROGRAM: Final = "/bin/rm"
# A removal must leave processors and disks to others. But it must also end while they are busy, since it
# makes room. The IO priority follows: "io_nice = (cpu_nice + 20) / 5" (ioprio_set(2)).
_REMOVAL_NICE: Final = 10


def scratch_place(state_dir: str, scratch_dir: str) -> str:
    """Return the directory in which the scratch directories of a pjw are made."""
    if scratch_dir:
        return os.path.join(scratch_dir, instance_name(state_dir))
    return os.path.join(state_dir, "scratch")


def find_quotas(descriptor: int, instance: str) -> "ProjectQuotas | None":
    """Return the project quotas of the file system of a descriptor; None when it has none."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if not any(mount.device == number and "prjquota" in mount.super_options for mount in read_mounts()):
        return None
    from pjw.launcher.project_quota import ProjectQuotas

    return ProjectQuotas.find(descriptor, instance)


class Scratch:
    """The directory of all scratch directories of one pjw."""

    def __init__(
        self, state_dir: str, scratch_dir: str = "", bytes_max: int = 0, inodes_max: int = 0
    ) -> None:
        """Make the directory if need be.

        Raises KernelError, and ConfigError for one that is not root's, and for limits on jobs' files where
        the file system has no project quotas.
        """
        self._path: Final = scratch_place(state_dir, scratch_dir)
        make_root_s(self._path, "scratch directory")
        if scratch_dir:
            require_root_s(scratch_dir, "scratch directory", "configure another scratch_dir")
        self.places: Final = _remember(os.path.join(state_dir, PLACES_NAME), self._path, state_dir)

        # told of the image of a job of which nothing is left
        self.left: Callable[[str], object] = lambda _: None
        # good for asking how full the file system is, and for nothing else
        self.descriptor: Final = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._quotas: Final = find_quotas(self.descriptor, instance_name(state_dir))
        self._max: Final = (bytes_max, inodes_max)
        if any(self._max) and self._quotas is None:
            os.close(self.descriptor)
            raise ConfigError(
                f"cannot limit scratch directories: the file system of {self._path} has no project quotas",
                hint=QUOTA_HINT,
            )

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    @property
    def directory(self) -> str:
        """The directory in which scratch directories are made."""
        return self._path

    def path(self, job_id: int) -> str:
        """Return the path of a job's scratch directory, whether it exists or not."""
        for place in self.places:
            path = os.path.join(place, str(job_id))
            if os.path.lexists(path):
                return path
        return os.path.join(self._path, str(job_id))

    def job_ids(self) -> set[int]:
        """Return the jobs that have a directory; other names there are not ours. Raises KernelError."""
        return set().union(*(job_ids_in(place, prefix="") for place in self.places))

    def create(self, job_id: int) -> str:
        """Make the directory of a job, still root's. Raises KernelError."""
        path = os.path.join(self._path, str(job_id))
        try:
            os.mkdir(path, 0o700)
        except OSError as error:
            raise KernelError("make the scratch directory", path, error.errno or 0) from error
        if self._quotas is not None:
            try:
                self._quotas.begin(job_id, path, *self._max)
            except KernelError:
                os.rmdir(path)
                raise
        return path

    def begin_image(self, job_id: int, uid: int, image: str) -> str:
        """Prepare a directory made by `create` for writes of a job with an image; return its path.

        `job` in it is the job's own directory. Raises OSError.
        """
        path = os.path.join(self._path, str(job_id))
        # first of all: see image_store.py
        os.symlink(image, os.path.join(path, MARK))
        for name, owner, mode in (("job", uid, 0o700), ("upper", uid, 0o755), ("work", 0, 0o700)):
            os.mkdir(os.path.join(path, name), mode)
            os.chmod(os.path.join(path, name), mode)
            os.chown(os.path.join(path, name), owner, owner)
        return path

    def give_to(self, job_id: int, uid: int) -> None:
        """Make the directory of a job, which `create` has made, its owner's alone. Raises KernelError."""
        path = os.path.join(self._path, str(job_id))
        try:
            # the directory of a job with an image is never the client's: parts of it must stay unchanged
            owner = 0 if os.path.lexists(os.path.join(path, MARK)) else uid
            os.chown(path, owner, uid, follow_symlinks=False)
        except OSError as error:
            raise KernelError("give away the scratch directory", path, error.errno or 0) from error

    def remove_if_empty(self, job_id: int) -> bool:
        """Remove the directory unless something is in it: then false."""
        image = ""
        for place in self.places:
            path = os.path.join(place, str(job_id))
            try:
                if image := image_of(path):
                    _empty_image(path)
                os.rmdir(path)
                break
            except FileNotFoundError:
                pass  # it is in another place, or rm or an earlier launcher has removed it
            except OSError:
                return False
        if self._quotas is not None:
            # A limit of nothing is no harm: the next job with this project has its own set.
            with suppress(KernelError):
                self._quotas.forget(job_id)
        if image:
            self.left(image)
        return True

    def owner(self, job_id: int) -> int:
        """Return the user that a job's directory belongs to; root where there is none (any more)."""
        try:
            status = os.lstat(self.path(job_id))
        except OSError:
            return 0
        return status.st_uid or status.st_gid

    def spawn_removal(self, job_id: int) -> int:
        """Begin to remove all of a job's directory; give the pid of the process that does."""
        return spawn_removal(self.path(job_id))


def _empty_image(path: str) -> None:
    """Empty the directory of a job with an image. Raises OSError when the job left something."""
    for name in ("upper", "job"):
        # an attempt before this one may have come so far
        with suppress(FileNotFoundError):
            os.rmdir(os.path.join(path, name))
    with suppress(FileNotFoundError):
        # made by overlayfs for itself
        os.unlink(os.path.join(path, "work/work/incompat/volatile/dirty"))
    for name in ("work/work/incompat/volatile", "work/work/incompat", "work/work", "work"):
        with suppress(FileNotFoundError):
            os.rmdir(os.path.join(path, name))
    os.unlink(os.path.join(path, MARK))


def spawn_removal(path: str) -> int:
    """Begin to remove a directory and all that is in it; give the pid of the process that does.

    Its own process, since a job may leave millions of files, and the launcher has one
    thread. rm(1) walks by directory descriptors, follows no link and, with
    --one-file-system, enters no mount.
    """
    pid = os.posix_spawn(RM_PROGRAM, ["rm", "-rf", "--one-file-system", "--", path], {})
    # it may be done already
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, _REMOVAL_NICE)
    return pid


def known_places(state_dir: str) -> tuple[str, ...]:
    """Return the places where jobs of a pjw may have their directories. Raises OSError."""
    # without that file no other place was ever configured
    found = [scratch_place(state_dir, "")]
    with suppress(FileNotFoundError), open(os.path.join(state_dir, PLACES_NAME), "rb") as known:
        found = [os.fsdecode(path) for path in known.read().split(b"\0") if path]
    return tuple(found)


def _remember(file: str, here: str, state_dir: str) -> tuple[str, ...]:
    """Return all places of jobs' directories: *here*, and former ones that are not empty.

    *file* has them too, each ended by NUL. Raises KernelError.
    """
    try:
        former = list(known_places(state_dir))
        places = (here, *(place for place in former if place != here and _has_jobs(place)))
        if list(places) != former:
            replace_file(file, b"".join(os.fsencode(place) + b"\0" for place in places))
    except OSError as error:
        raise KernelError("remember the scratch directories in", file, error.errno or 0) from error
    return places


def _has_jobs(place: str) -> bool:
    return os.path.isdir(place) and bool(job_ids_in(place, prefix=""))
