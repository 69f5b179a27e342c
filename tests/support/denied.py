"""Runs a command to which the kernel seems to lack something: by a filter of system calls that asks us.

    denied.py maps|overlays COMMAND...

`maps`: mount_setattr(2) gives EINVAL for a mount that maps users, as before Linux 5.12, or where the file
system cannot have it. `overlays`: mount(2) gives ENODEV for an overlay, as where the module is missing or
on a list of those that nobody may load. All other calls are as ever. What the command starts has the same
kernel, whoever it is and whatever root it has. A process beside it decides each call (seccomp_unotify(2)),
and ends with the last of them.
"""

import array
import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

# numbers of mount(2) and of seccomp(2); mount_setattr(2) has the same everywhere
_NUMBERS: Final = {"x86_64": (165, 317), "aarch64": (40, 277)}
_MOUNT_SETATTR: Final = 442
_ID_MAP: Final = 0x100000
_SET_FILTER, _NEW_LISTENER = 1, 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_GO_ON: Final = 1


def command(kind: str, *words: str) -> list[str]:
    """The command line that runs a command so."""
    return [sys.executable, "-I", "-S", "-B", str(Path(__file__)), kind, *words]


def why_not() -> str:
    """Why this machine cannot be made to lack anything; empty where it can."""
    if "PJW_VM_GUEST" in os.environ:
        return "user mode Linux hangs with such a filter; there is tests/vm/test_images.py for it"
    if platform.machine() not in _NUMBERS:
        return "the numbers of system calls of this machine are not known here"
    child = os.fork()
    if child == 0:
        try:
            os.close(_listener())
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"the kernel asks nobody about system calls: {os.strerror(code)}" if code else ""


def _listener() -> int:
    """Have the kernel ask about mounts of this process, and of all that it starts; who answers has this."""
    mount, seccomp = _NUMBERS[platform.machine()]
    lines = [
        (_LOAD, 0, 0, 0),
        (_EQUAL, 2, 0, mount),
        (_EQUAL, 1, 0, _MOUNT_SETATTR),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ASK),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(seccomp, _SET_FILTER, _NEW_LISTENER, program)
    if found < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(found)


def _answer(listener: int, kind: str) -> None:
    """Decide each call, until nobody is left who makes one."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        [(_, events)] = poll.poll()
        if not events & select.POLLIN:
            return
        asked = bytearray(80)
        # who asked may have been killed meanwhile
        with suppress(OSError):
            fcntl.ioctl(listener, _RECEIVE, asked)
            number, pid = struct.unpack_from("QI", asked)
            call, _, _, *arguments = struct.unpack_from("iIQ6Q", asked, 16)
            error = _error_of(kind, call, pid, arguments)
            answer = struct.pack("QqiI", number, 0, -error, 0 if error else _GO_ON)
            fcntl.ioctl(listener, _SEND, bytearray(answer))


def _error_of(kind: str, call: int, pid: int, arguments: list[int]) -> int:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        if call == _MOUNT_SETATTR and kind == "maps":
            memory.seek(arguments[3])
            return errno.EINVAL if struct.unpack("Q", memory.read(8))[0] & _ID_MAP else 0
        if call != _MOUNT_SETATTR and kind == "overlays" and arguments[2]:
            memory.seek(arguments[2])
            return errno.ENODEV if memory.read(8) == b"overlay\0" else 0
    return 0


def _main() -> None:
    kind, *words = sys.argv[1:]
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        # no child of the command's, which may count its own
        if os.fork():
            os._exit(0)
        ours.close()
        os.setsid()
        _, rights, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
        [listener] = array.array("i", rights[0][2])
        theirs.close()
        _answer(listener, kind)
        os._exit(0)
    os.wait()
    theirs.close()
    listener = _listener()
    ours.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    ours.close()
    os.close(listener)
    os.execvp(words[0], words)  # noqa: S606  that is what this is for


if __name__ == "__main__":
    _main()
