"""A mount of a directory that is mounted nowhere yet: open_tree(2), for which Python has no function."""

import ctypes
import os
from typing import Final

# The same numbers on every machine: open_tree(2), mount_setattr(2) and their flags.
_OPEN_TREE: Final = 428
_MOUNT_SETATTR: Final = 442
_AT_EMPTY_PATH: Final = 0x1000
_TREE_CLONE: Final = 1
_ATTR_NOSUID_NODEV: Final = 2 | 4
_MS_PRIVATE: Final = 1 << 18


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def clone(directory: int) -> int:
    """A mount of an open directory, without its set-id programs and devices. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    tree = libc.syscall(_OPEN_TREE, directory, b"", ctypes.c_uint(flags))
    if tree < 0:
        raise OSError(ctypes.get_errno(), "open_tree")
    attributes = _Attributes(set=_ATTR_NOSUID_NODEV, propagation=_MS_PRIVATE)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if (
        libc.syscall(_MOUNT_SETATTR, tree, b"", ctypes.c_uint(_AT_EMPTY_PATH), ctypes.byref(attributes), size)
        < 0
    ):
        error = ctypes.get_errno()
        os.close(tree)
        raise OSError(error, "mount_setattr")
    return int(tree)
