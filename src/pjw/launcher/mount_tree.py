"""Mounts that are mounted nowhere yet, by descriptors: system calls for which Python has no function."""

import ctypes
import os
from contextlib import suppress
from typing import Final

# The same numbers on every machine: open_tree(2), mount_setattr(2) and their flags.
_OPEN_TREE: Final = 428
_MOUNT_SETATTR: Final = 442
_AT_EMPTY_PATH: Final = 0x1000
_TREE_CLONE: Final = 1
_RDONLY: Final = 1
_NOSUID_NODEV: Final = 2 | 4
_IDMAP: Final = 0x100000
_MS_PRIVATE: Final = 1 << 18
_CLONE_NEWUSER: Final = 0x10000000


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def _call(name: str, number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(result)


def clone(directory: int, user_namespace: int | None = None, *, read_only: bool = False) -> int:
    """Make a mount of an open directory, without its set-id programs and devices. Raises OSError.

    With a user namespace, its root becomes the owner of root's files in the directory.
    """
    flags = ctypes.c_uint(_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
    tree = _call("open_tree", _OPEN_TREE, directory, b"", flags)
    attributes = _Attributes(set=_NOSUID_NODEV, propagation=_MS_PRIVATE)
    if read_only:
        attributes.set |= _RDONLY
    if user_namespace is not None:
        attributes.set |= _IDMAP
        attributes.userns = user_namespace
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    try:
        where = (tree, b"", ctypes.c_uint(_AT_EMPTY_PATH))
        _call("mount_setattr", _MOUNT_SETATTR, *where, ctypes.byref(attributes), size)
    except OSError:
        os.close(tree)
        raise
    return tree


def user_namespace(owner: int) -> int:
    """Make a user namespace whose root is user and group *owner*, with no other. Raises OSError."""
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        # nothing but system calls, and no way back into the interpreter's own code
        if libc.unshare(_CLONE_NEWUSER) == 0:
            os.write(ready_write, b"\0")
        os.close(ready_write)
        os.close(done_write)
        os.read(done_read, 1)
        os._exit(0)
    try:
        os.close(ready_write)
        ready_write = -1
        if not os.read(ready_read, 1):
            raise OSError(1, "unshare")
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "wb", buffering=0) as file:
                file.write(b"0 %d 1" % owner)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (ready_read, ready_write, done_read, done_write):
            with suppress(OSError):
                os.close(descriptor)
        os.waitpid(pid, 0)
