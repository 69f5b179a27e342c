"""The directories and GPUs of the host that jobs may ask for, and the places of mounts in a job. No I/O."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pjw.errors import InvalidJobError, MountNotFoundError

# execve(2): one argument holds at most MAX_ARG_STRLEN bytes, its NUL included.
ARGUMENT_MAX_BYTES: Final = 131_071
PATH_MAX_BYTES: Final = 4095
# the default working directory, as the job sees it: its scratch directory
JOB_DIRECTORY: Final = "/run/job"
# where a job has its workspace, as it sees it; the directory that outlives it
WORKSPACE_DIRECTORY: Final = "/run/workspace"
# where a job has a mount of the operator's unless it asks for another place, by the mount's name
MOUNT_DIRECTORY: Final = "/mnt"
# of one job, and of one operator: each is a descriptor of a launch, and part of the launcher's first message
MOUNTS_MAX: Final = 8
OFFERED_MAX: Final = 64
MOUNT_PATH_MAX_BYTES: Final = 255
# of one job: as many as one machine has, and far more
GPUS_MAX: Final = 64
# the directories of CDI files, and the patterns of clients that may have GPUs
CDI_DIRS_MAX: Final = 8
# no '.', which divides the keys of a configuration
_MOUNT_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
# a client's name (certs/profile.py), or a pattern of some
_CLIENTS: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._@+*-]{0,63}")
# a kind of devices, as CDI has it: vendor.example/class
_KIND: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]{0,61}[A-Za-z0-9]")
# where a job may have no mount, but in its own directory and its workspace
_SYSTEM: Final = ("/dev", "/proc", "/run", "/sys")


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory that the operator lends to jobs of a client, by its name."""

    name: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class MountSource:
    """The operator's side of a mount: its directory, and the clients whose jobs may have it.

    `clients` are names of clients, in which `*` stands for any characters. Raises InvalidJobError.
    """

    name: str
    path: str
    read_only: bool = True
    clients: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not _MOUNT_NAME.fullmatch(self.name):
            raise InvalidJobError(
                f"{self.name[:80]!r} is no name for a mount: up to 63 letters, digits, '_' and '-', the first"
                " a letter"
            )
        if not is_plain_path(self.path) or len(self.path.encode()) > PATH_MAX_BYTES:
            raise InvalidJobError(
                f"the path of the mount {self.name}, {self.path[:80]!r}, is not an absolute path without"
                " '.', '..' and '/' at its end"
            )
        for each in self.clients:
            if not _CLIENTS.fullmatch(each):
                raise InvalidJobError(f"the mount {self.name} is for {each[:80]!r}, which is no client")

    def is_for(self, client_name: str) -> bool:
        """Return whether jobs of this client may have it."""
        return are_for(self.clients, client_name)

    @property
    def shown(self) -> Mount:
        """The part of the mount that a client may see."""
        return Mount(self.name, self.read_only)


@dataclass(frozen=True, slots=True)
class GpuOffer:
    """The clients whose jobs may have GPUs, and the GPUs: the devices of a kind in CDI files.

    Without a kind there are none. `clients` is as in MountSource. Raises InvalidJobError.
    """

    kind: str = ""
    cdi_dirs: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    clients: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.kind and not _KIND.fullmatch(self.kind):
            raise InvalidJobError(f"{self.kind[:80]!r} is no kind of devices, such as nvidia.com/gpu")
        for each in self.cdi_dirs:
            if not is_plain_path(each) or len(each.encode()) > PATH_MAX_BYTES:
                raise InvalidJobError(f"{each[:80]!r} is not an absolute path without '.' and '..'")
        if len(self.cdi_dirs) > CDI_DIRS_MAX:
            raise InvalidJobError(f"there may be {CDI_DIRS_MAX} directories of CDI files")
        for each in self.clients:
            if not _CLIENTS.fullmatch(each):
                raise InvalidJobError(f"GPUs are for {each[:80]!r}, which is no client")

    def is_for(self, client_name: str) -> bool:
        """Return whether jobs of this client may have them."""
        return bool(self.kind) and are_for(self.clients, client_name)


def are_for(clients: Iterable[str], client_name: str) -> bool:
    """Whether a client is among *clients*: names, in which `*` stands for any characters."""
    return any(re.fullmatch(".*".join(map(re.escape, each.split("*"))), client_name) for each in clients)


def check_gpus(count: int) -> None:
    """Check a number of GPUs. Raises InvalidJobError."""
    # True is 1 to Python
    given: object = count
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= GPUS_MAX:
        raise InvalidJobError(f"a job has from 0 to {GPUS_MAX} GPUs, not {count!r:.80}")


def split_mount(mount: str) -> tuple[str, str]:
    """Return the name of a requested mount and its path in the job, from `NAME` or `NAME:PATH`."""
    name, _, path = mount.partition(":")
    return name, path or f"{MOUNT_DIRECTORY}/{name}"


def offered(sources: Iterable[MountSource], client_name: str, mounts: Iterable[str]) -> list[MountSource]:
    """Return the mounts a client asks for, in order. Raises MountNotFoundError for one not offered."""
    there = {source.name: source for source in sources if source.is_for(client_name)}
    found = []
    for name, _ in map(split_mount, mounts):
        if name not in there:
            raise MountNotFoundError(name)
        found.append(there[name])
    return found


def check_mounts(mounts: Sequence[str]) -> tuple[str, ...]:
    """Return a job's mounts, each as `NAME:PATH`. Raises InvalidJobError."""
    if len(mounts) > MOUNTS_MAX:
        raise InvalidJobError(f"a job has at most {MOUNTS_MAX} mounts, not {len(mounts)}")
    checked: dict[str, str] = {}
    for mount in mounts:
        name, path = split_mount(mount)
        if not _MOUNT_NAME.fullmatch(name):
            raise InvalidJobError(
                f"{name[:80]!r} is no name of a mount", hint="a mount is NAME or NAME:PATH; see `pjw quota`"
            )
        if not is_plain_path(path) or checked_size(path, "the path of a mount") > MOUNT_PATH_MAX_BYTES:
            raise InvalidJobError(
                f"cannot mount {name} at {path[:80]!r}: that is not an absolute path without '.', '..' and"
                f" '/' at its end, of at most {MOUNT_PATH_MAX_BYTES} bytes"
            )
        if _is_the_jobs_own(path):
            raise InvalidJobError(
                f"cannot mount {name} at {path}: each job has its own there",
                hint=f"leave the path out, which is {MOUNT_DIRECTORY}/{name} then",
            )
        for other in checked:
            if lies_in(path, other) or lies_in(other, path):
                raise InvalidJobError(f"cannot mount {name} at {path}: another one is mounted at {other}")
        checked[path] = name
    return tuple(f"{name}:{path}" for path, name in checked.items())


def is_plain_path(path: str) -> bool:
    """Return whether it is absolute, not the root, and no part of it has another meaning than its name."""
    parts = path.split("/")[1:]
    return path.startswith("/") and all(part not in ("", ".", "..") and "\0" not in part for part in parts)


def lies_in(path: str, directory: str) -> bool:
    """Return whether it is the directory, or lies in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _is_the_jobs_own(path: str) -> bool:
    """Return whether a mount would cover a job's own files, or lie in a directory no job may change."""
    if any(lies_in(own, path) for own in (*_SYSTEM, "/tmp", "/var/tmp")):  # noqa: S108  a job's
        return True
    inside = (JOB_DIRECTORY, WORKSPACE_DIRECTORY)
    return any(lies_in(path, each) for each in _SYSTEM) and not any(
        lies_in(path, each) and path != each for each in inside
    )


NO_GPUS: Final = GpuOffer()


def checked_size(text: str, what: str) -> int:
    """Return the bytes of a text that a program gets as an argument or a path. Raises InvalidJobError."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidJobError(f"{what} is not valid UTF-8") from None
    if "\0" in text:
        raise InvalidJobError(f"{what} has a NUL in it, which no argument of a program can hold")
    if size > ARGUMENT_MAX_BYTES:
        raise InvalidJobError(
            f"an argument of {what} is {size} bytes long; the kernel takes at most {ARGUMENT_MAX_BYTES}",
            hint="put a long script into a file and run that",
        )
    return size
