"""The rights that the network process keeps when it gives root up, and so those of an attacker within it.

The order matters. The bounding set is emptied while root, which takes CAP_SETPCAP. Landlock comes before any
thread, since it holds for the calling one and its children. The filter of system calls comes last: it would
stop the steps before it. The launcher was spawned long before, so it has none of these restrictions.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pjw.errors import ConfigError, KernelError, describe_errno
from pjw.server.landlock import OWN, READ, READ_FILE, WRITE_FILE, Beneath, landlock_abi, restrict_files
from pjw.server.syscalls import architecture_of, filter_system_calls

if TYPE_CHECKING:
    # pjwd-egress enters the same sandbox, and has no configuration to read
    from pjw.server.config import ServerConfig

# linux/prctl.h, linux/capability.h
_PR_SET_DUMPABLE, _PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 23, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_SECCOMP_ACTIONS: Final = "/proc/sys/kernel/seccomp/actions_avail"

# The files that the server reads after it has given root up. Every user may read these; homes, data and other
# mounts are not among them. A library that talks to a device, say, would need another entry here.
READABLE: Final = (
    # the resolver's files, each replaced by a rename now and then, so that a rule for one would not last
    "/etc",
    # libraries that libc loads when a name is first looked up; time zones; a traceback's lines
    "/usr",
    "/lib",
    "/lib64",
    sys.prefix,
    sys.base_prefix,
    # its own numbers, for metrics; how many processors there are
    "/proc",
    "/sys/devices/system",
    "/dev/urandom",
)
_RESOLVER: Final = "/etc/resolv.conf"
# Descriptors of the network process: a follower has two, a running job one, a connection one. The rest is for
# launches under way, and for files that are open for a moment.
_DESCRIPTORS_SPARE: Final = 4096


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The needs of one server: the directory of its own files, its ports, its number of descriptors."""

    # None: it has none
    own_directory: int | None
    # None: any port, since one of them is the kernel's choice
    ports: Sequence[int] | None
    descriptors: int
    # directories that it reads besides, as far as its user may
    readable: Sequence[str] = ()
    # directories, by their descriptors, in which it also has its own files
    writable: Sequence[int] = ()


def enter(sandbox: Sandbox, uid: int) -> None:
    """Become *uid* for good, with nothing beyond *sandbox*. Raises ConfigError or KernelError."""
    _require_one_thread()
    _empty_bounding_set()
    become(uid)
    _clear_capabilities()
    _confine(sandbox)


def enter_as_we_are(sandbox: Sandbox) -> None:
    """Keep nothing beyond *sandbox*, in a process that never was root. Raises as `enter`."""
    _require_one_thread()
    _clear_capabilities()
    _confine(sandbox)


def _confine(sandbox: Sandbox) -> None:
    _prctl("set no_new_privs on", _PR_SET_NO_NEW_PRIVS, 1)
    # a core file, or a process of the same user that attaches, would have the private key
    _prctl("keep others out of", _PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_descriptors(sandbox.descriptors)
    more = [Beneath(path, READ) for path in sandbox.readable]
    more += [Beneath(descriptor, OWN) for descriptor in sandbox.writable]
    restrict_files([*rules(sandbox.own_directory), *more], sandbox.ports)
    filter_system_calls()


def descriptors_for(config: "ServerConfig") -> int:
    """Return the network process's number of descriptors: enough for its limits, far below the launcher's.

    Where the configuration has no limit, neither has this.
    """
    streams, jobs = config.clients.followers_total_max, config.clients.running_total_max
    if not streams or not jobs:
        return 2**31 - 1
    return _DESCRIPTORS_SPARE + config.port.connections_max + 2 * streams + jobs


def limit_descriptors(wanted: int) -> None:
    """Lower the limit of descriptors, for good; one that is lower already stays."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def rules(own_directory: int | None) -> list[Beneath]:
    """Return the rules for the files that may be opened."""
    # The resolver's file may be a link to where a service keeps it.
    resolver = os.path.dirname(os.path.realpath(_RESOLVER))
    return [
        *([Beneath(own_directory, OWN)] if own_directory is not None else ()),
        *(Beneath(path, READ) for path in dict.fromkeys((*READABLE, resolver)) if path != "/"),
        Beneath(os.devnull, READ_FILE | WRITE_FILE),
    ]


def status() -> Iterator[tuple[bool | None, str, str | None]]:
    """Yield the parts of the sandbox: whether this host offers them, in words, and the remedy."""
    try:
        architecture_of(platform.machine())
    except ConfigError as error:
        yield False, str(error), error.hint
    else:
        there = os.path.exists(_SECCOMP_ACTIONS)
        text = "sandbox of the server: " + ("system calls are filtered" if there else "no seccomp filter")
        yield there, text, None if there else "this kernel was built without CONFIG_SECCOMP_FILTER"
    if abi := landlock_abi():
        yield True, f"sandbox of the server: files by Landlock, ABI {abi}", None
    else:
        yield (
            None,
            "sandbox of the server: no Landlock, so it may read what every user may read",
            "Linux has it since 5.13 (CONFIG_SECURITY_LANDLOCK); landlock must be in lsm= at boot",
        )


def _require_one_thread() -> None:
    if len(threads := os.listdir("/proc/self/task")) != 1:
        raise ConfigError(f"cannot confine the server: it has {len(threads)} threads already")


def _empty_bounding_set() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    number = 0
    # the kernel knows where its list ends
    while (held := libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        if held and libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            raise ConfigError(
                f"cannot empty the bounding set: {describe_errno(ctypes.get_errno())}",
                hint="this takes the capability CAP_SETPCAP",
            )
        number += 1


def become(uid: int) -> None:
    """Become a user, in a process that is root. Raises ConfigError."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise ConfigError(
            f"cannot become user {uid}: {describe_errno(error.errno or 0)}",
            hint="this takes the capabilities CAP_SETUID and CAP_SETGID",
        ) from error
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise ConfigError("cannot drop root: it could be taken back")


def _clear_capabilities() -> None:
    # The kernel takes the others with the last user id of root, but not the inheritable ones.
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) != 0:
        raise KernelError("clear the capabilities of", "the server", ctypes.get_errno())
    _prctl("clear the ambient capabilities of", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def _prctl(operation: str, option: int, argument: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) != 0:
        raise KernelError(operation, "the server", ctypes.get_errno())
