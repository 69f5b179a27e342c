"""The files that the network process may open, and the ports it may listen on: Landlock (landlock(7)).

Landlock checks each open(2), and not descriptors that are open already: root opened the job table, the audit
log and the socket to the launcher. On a kernel without it (CONFIG_SECURITY_LANDLOCK, and `landlock` in the
boot's `lsm=`) only the modes of files decide.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.errors import KernelError

# the same on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2

# the rights of linux/landlock.h that rules here give
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = (
    1 << bit for bit in (1, 2, 3, 4, 5, 7, 8)
)
TRUNCATE: Final = 1 << 14
# The rights that each ABI knows, all of which are denied unless a rule gives them: 1 with 13 rights; 2 to
# move and link between directories; 3 truncate(2); 5 ioctl(2) on devices.
_RIGHTS_OF_ABI: Final = ((5, 16), (3, 15), (2, 14), (1, 13))
_BIND_TCP: Final = 1
_NET_ABI: Final = 4
# to signal other processes than ours; abstract sockets are left out, since systemd's may be one
_SCOPE_SIGNAL: Final = 2
_SCOPE_ABI: Final = 6

# rights to read a directory and its files
READ: Final = READ_FILE | READ_DIR
# plain files and directories, of which the server has no other
OWN: Final = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG


@dataclass(frozen=True, slots=True)
class Beneath:
    """The rights below a directory (or to a file) and all that is in it; a missing one needs no rule."""

    # or its descriptor
    place: str | int
    rights: int


def landlock_abi() -> int:
    """Return the version of this kernel's Landlock; 0 where there is none."""
    found = _syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(found, 0)


def restrict_files(rules: Sequence[Beneath], ports: Sequence[int] | None) -> bool:
    """Leave this thread, and those that it starts, no other files; tell whether the kernel can do that.

    *ports*: the only TCP ports that it may listen on; None where they are not known yet. It may always listen
    on one that the kernel chooses: gRPC does so to see whether there is IPv6. It can signal no other process.
    Needs no_new_privs. Raises KernelError.
    """
    abi = landlock_abi()
    if not abi:
        return False
    files = _rights_of(abi)
    net = _BIND_TCP if abi >= _NET_ABI and ports is not None else 0
    # an older kernel takes a shorter structure, without the fields that it does not know
    attributes = struct.pack("=QQQ", files, net, _SCOPE_SIGNAL if abi >= _SCOPE_ABI else 0)
    size = 8 if abi < _NET_ABI else 16 if abi < _SCOPE_ABI else 24
    ruleset = _checked(_syscall(_CREATE_RULESET, attributes, size, 0))
    try:
        for rule in rules:
            _allow_beneath(ruleset, rule, files)
        for port in (0, *ports) if net and ports is not None else ():
            _checked(_syscall(_ADD_RULE, ruleset, _RULE_NET_PORT, struct.pack("=QQ", _BIND_TCP, port), 0))
        _checked(_syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def _allow_beneath(ruleset: int, rule: Beneath, known: int) -> None:
    if isinstance(rule.place, int):
        _add(ruleset, rule.place, rule.rights & known)
        return
    with suppress(FileNotFoundError, PermissionError):
        descriptor = os.open(rule.place, os.O_PATH | os.O_CLOEXEC)
        try:
            _add(ruleset, descriptor, rule.rights & known)
        finally:
            os.close(descriptor)


def _add(ruleset: int, descriptor: int, rights: int) -> None:
    if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
        # the kernel refuses rights of directories for a file
        rights &= READ_FILE | WRITE_FILE | TRUNCATE
    # a packed structure
    _checked(_syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0))


def _rights_of(abi: int) -> int:
    return next((1 << bits) - 1 for first, bits in _RIGHTS_OF_ABI if abi >= first)


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number, *arguments))


def _checked(result: int) -> int:
    if result < 0:
        raise KernelError("restrict the files of", "the server", ctypes.get_errno() or errno.EINVAL)
    return result
