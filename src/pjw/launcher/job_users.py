"""The user ids of one pjw's jobs: a range that no other pjw on this host has at the same time.

A launcher claims a range by a lock on bytes of one file: the first user id is the offset, the number of ids
the length. So the kernel itself sees an overlap and names the process with the other range. A claim ends
with its launcher, however that ends (fcntl(2), "Advisory record locking").

Where the operator configures no range, it comes from the path of the state directory, and stays with that
directory: the launcher writes it down there.
"""

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.errors import ConfigError, KernelError, describe_errno
from pjw.launcher.lock import LOCK_NAME, wait_for_lock
from pjw.launcher.root_files import replace_file

CLAIMS: Final = "/run/pjw/job-users"
RECORD: Final = "job-users"
# The range of every pjw of an older version: where one has run, jobs keep it.
FORMER_FIRST: Final = 1_900_000_000
# The place for ranges of state directories: systemd leaves it unused (systemd.io/UIDS-GIDS: containers below,
# foreign images above), and the ids that SSSD gives to the users of a domain end below (2000200000,
# sssd-ldap(5)).
OWN_FIRST: Final = 0x773A_0000
OWN_END: Final = 0x7FFE_0000
# The ranges that users may give to their own containers.
SUBORDINATES: Final = ("/etc/subuid", "/etc/subgid")

# struct flock of fcntl(2): l_type, l_whence, l_start, l_len, l_pid
_FLOCK: Final = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Claim:
    """A range of user ids, and its owner's state directory, None where that is unknown."""

    first: int
    count: int
    state_dir: str | None = None


def claim_users(state_dir: str, first: int, count: int) -> tuple[int, str]:
    """Claim a range until this process ends. Give its first user id, and why it is not claimed, if so.

    *first* is the operator's, or 0 for that of the state directory. The caller holds that directory's lock.
    Raises ConfigError when another pjw has one of the ids, KernelError when it cannot be written down.
    """
    wanted = first or known_first(state_dir)
    try:
        # stays open: to close any descriptor of the file would end the claim
        file = _open_claims()
    except OSError as error:
        first = wanted or next(own_ranges(state_dir, count))
        _write_down(state_dir, first, count)
        return first, (
            f"cannot keep user ids {first} to {first + count - 1} from other pjwd on this host:"
            f" {error.filename}: {describe_errno(error.errno or 0)}"
            " (under systemd the unit needs RuntimeDirectory=pjw and RuntimeDirectoryPreserve=yes)"
        )
    if wanted:
        first = wanted
        if other := _claim(file, first, count):
            raise _overlap(first, count, other)
    else:
        first = next(first for first in own_ranges(state_dir, count) if _claim(file, first, count) is None)
    _write_down(state_dir, first, count)
    return first, ""


def known_first(state_dir: str) -> int:
    """Return the first user id that jobs of a state directory have had; 0 where there were none.

    Raises ConfigError when that is unknown.
    """
    path = os.path.join(state_dir, RECORD)
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read().split()[0])
    except FileNotFoundError:
        # a launcher makes these after the record, so an older version was here
        used = any(os.path.lexists(os.path.join(state_dir, name)) for name in ("scratch", "scratch-dirs"))
        return FORMER_FIRST if used else 0
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(
            f"cannot read {path}, which says the user ids of this pjwd's jobs: {error}",
            hint="configure them: uid_first and uid_count below [job_users]",
        ) from error


def own_ranges(state_dir: str, count: int) -> Iterator[int]:
    """Yield the first user ids of ranges for a state directory, the best one first.

    Raises ConfigError when there are no more.
    """
    places = (OWN_END - OWN_FIRST) // count
    begin = int.from_bytes(hashlib.sha256(os.fsencode(state_dir)).digest()[:8])
    taken = subordinate_ranges()
    for place in range(places):
        first = OWN_FIRST + (begin + place) % places * count
        if not any(first < other.first + other.count and other.first < first + count for other in taken):
            yield first
    raise ConfigError(
        f"there are no {count} user ids for the jobs of another pjwd between {OWN_FIRST} and {OWN_END - 1}",
        hint="configure others, or fewer: uid_first and uid_count below [job_users]",
    )


def subordinate_ranges() -> list[Claim]:
    """Return the ranges that users may give to containers (subuid(5)); skip lines that cannot be read."""
    found = []
    for path in SUBORDINATES:
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError):
                    _, first, count = line.strip().split(":")
                    found.append(Claim(int(first), int(count)))
    return found


def claimed_by(first: int, count: int) -> Claim | None:
    """Return the claim that has one of these user ids."""
    try:
        file = os.open(CLAIMS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _holder(file, first, count)
    finally:
        os.close(file)


def _open_claims() -> int:
    os.makedirs(os.path.dirname(CLAIMS), 0o755, exist_ok=True)
    return os.open(CLAIMS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _claim(file: int, first: int, count: int) -> Claim | None:
    """Claim a range; return None when that is done, else the claim that has one of its ids."""
    while True:
        with suppress(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
            return None
        if other := _holder(file, first, count):
            break
    # A launcher without a state directory is about to end: its descriptors go one by one.
    ending = other.state_dir is None
    if ending and wait_for_lock(lambda: fcntl.lockf(file, fcntl.LOCK_EX, count, first)):
        return None
    return other


def _holder(file: int, first: int, count: int) -> Claim | None:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
    kind, _, start, length, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else Claim(start, length, _state_dir_of(pid))


def _state_dir_of(pid: int) -> str | None:
    """Return the state directory of another launcher, found by the lock that it has there."""
    directory = f"/proc/{pid}/fd"
    with suppress(OSError):
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                path = os.readlink(f"{directory}/{name}").removesuffix(" (deleted)")
                if os.path.basename(path) == LOCK_NAME:
                    return os.path.dirname(path)
    return None


def _overlap(first: int, count: int, other: Claim) -> ConfigError:
    return ConfigError(
        f"cannot have user ids {first} to {first + count - 1} for jobs: another pjwd on this host,"
        f" with the state directory {other.state_dir or '(unknown)'},"
        f" has {other.first} to {other.first + other.count - 1}",
        hint="give one of the two another range: uid_first and uid_count below [job_users]",
    )


def _write_down(state_dir: str, first: int, count: int) -> None:
    path = os.path.join(state_dir, RECORD)
    text = b"%d %d\n" % (first, count)
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if file.read() == text:
            return
    try:
        replace_file(path, text)
    except OSError as error:
        raise KernelError("write", path, error.errno or 0) from error
