"""Lets a process come to its Nth step, and there kills it or has that step fail: by ptrace(2), with no sleep.

A step is a system call that others can notice. As a program, it follows a process and its children:

    tracer.py PID GENERATION NTH ACTION [CALL,...]

GENERATION 0 is the process itself, with all its threads; 1 the first process that it starts, 2 the first that
this one starts. ACTION is `kill`; `kill-first`, which kills the process itself when another one comes to the
step; or the number of an error, which a step of CALLs alone may have. It says `ready`, then `hit CALL` just
before it acts, and ends: whoever it followed goes on as if nothing had been.
"""

import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

SUPPORTED: Final = platform.machine() == "x86_64" and "PJW_VM_GUEST" not in os.environ
WHY_NOT: Final = "the tracer knows the registers of x86-64, and user mode Linux cannot be traced so"

_CONT, _POKEUSER, _SYSCALL, _GETEVENTMSG = 7, 6, 24, 0x4201
_SEIZE, _INTERRUPT, _LISTEN, _GET_SYSCALL_INFO = 0x4206, 0x4207, 0x4208, 0x420E
_FOLLOW: Final = 1 | 2 | 4 | 8 | 16  # SYSGOOD, FORK, VFORK, CLONE, EXEC
_EVENT_FORKS, _EVENT_EXEC, _EVENT_STOP = (1, 2, 3), 4, 128
_WALL: Final = 0x40000000
_RAX, _ORIG_RAX = 80, 120  # in struct user

# Nobody but the process itself notices these: what comes before one of them and after it is the same world.
_UNNOTICED: Final = frozenset(
    {
        *(0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21, 23, 24, 25, 28, 35, 39, 63, 72, 79, 89),
        *(96, 97, 98, 102, 104, 107, 108, 110, 127, 128, 131, 137, 138, 158, 186, 201, 202, 204, 217, 218),
        *(228, 229, 230, 232, 233, 247, 262, 270, 271, 273, 281, 302, 318, 332, 334),
    }
)
# fmt: off
CALLS: Final[dict[str, int]] = {
    "write": 1, "close": 3, "fstat": 5, "pwrite64": 18, "socket": 41, "sendmsg": 46, "recvmsg": 47,
    "socketpair": 53, "clone": 56, "vfork": 58, "execve": 59, "fsync": 74, "fdatasync": 75, "ftruncate": 77,
    "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87, "symlink": 88, "chown": 92, "fchown": 93,
    "lchown": 94, "setsid": 112, "setgroups": 116, "setresuid": 117, "setresgid": 119, "setfsuid": 122,
    "capset": 126, "mknod": 133, "prctl": 157, "setrlimit": 160, "mount": 165, "sethostname": 170,
    "keyctl": 250, "openat": 257, "mkdirat": 258, "fchownat": 260, "newfstatat": 262, "unlinkat": 263,
    "unshare": 272, "utimensat": 280, "timerfd_create": 283, "fallocate": 285, "timerfd_settime": 286,
    "signalfd4": 289, "dup2": 33, "dup3": 292, "pipe2": 293, "prlimit64": 302, "memfd_create": 319,
    "pidfd_send_signal": 424, "open_tree": 428, "move_mount": 429, "pidfd_open": 434, "clone3": 435,
    "close_range": 436, "mount_setattr": 442, "exit_group": 231, "dup": 32, "epoll_ctl": 233,
    "inotify_add_watch": 254,
}
# fmt: on

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Tracer:
    """The program, as a context manager; `hit` is known once what it was waited for is over."""

    def __init__(
        self, pid: int, nth: int, action: str | int, *, generation: int = 0, calls: tuple[str, ...] = ()
    ) -> None:
        self.hit = ""
        arguments = [str(pid), str(generation), str(nth), str(action), *([",".join(calls)] if calls else [])]
        self._process: Final = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", Path(__file__), *arguments], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        """Return when no step can be missed any more."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go, if it has not acted."""
        self._process.terminate()
        said = self._process.communicate()[0]
        self.hit = said.removeprefix("hit ").strip()


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> bool:
    """Tell whether it was done; a process may be killed at any moment."""
    return bool(_libc.ptrace(request, pid, address, data) >= 0)


def _tgid(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


class _Following:
    def __init__(self, pid: int, generation: int, nth: int, action: str, calls: frozenset[int]) -> None:
        self._wanted, self._left, self._action, self._calls = generation, nth, action, calls
        self._generation: dict[int, int] = {}
        self._chosen = {0: pid}  # the first process of each generation
        self._early: set[int] = set()  # has stopped before we heard who made it
        self._failing = 0
        # threads come and go meanwhile: look until there is none that we have not seen
        seen: set[str] = set()
        while new := set(os.listdir(f"/proc/{pid}/task")) - seen:
            seen |= new
            for tid in map(int, new):
                if _ptrace(_SEIZE, tid, 0, _FOLLOW) and _ptrace(_INTERRUPT, tid):
                    self._generation[tid] = 0
        self._unstarted = set(self._generation)

    def run(self) -> None:
        while True:
            tid, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                self._on_stop(tid, os.WSTOPSIG(status), status >> 16)
            else:
                self._generation.pop(tid, None)
            if tid in self._unstarted:
                self._unstarted.remove(tid)
                if not self._unstarted:
                    print("ready", flush=True)

    def _on_stop(self, tid: int, number: int, event: int) -> None:
        if tid not in self._generation:
            self._early.add(tid)
            return
        if event in _EVENT_FORKS:
            self._on_fork(tid)
        elif event == _EVENT_EXEC and self._generation[tid] == self._wanted >= 2:
            sys.exit()  # from here on it is the job's own
        elif event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN):
            _ptrace(_LISTEN, tid)
            return
        elif number == signal.SIGTRAP | 0x80:
            self._on_call(tid)
        self._resume(tid, number if event == 0 and number != signal.SIGTRAP | 0x80 else 0)

    def _resume(self, tid: int, number: int = 0) -> None:
        counted = self._generation[tid] == self._wanted and _tgid(tid) == self._chosen.get(self._wanted)
        _ptrace(_SYSCALL if counted else _CONT, tid, 0, number)

    def _on_fork(self, tid: int) -> None:
        message = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, tid, 0, ctypes.addressof(message))
        new = message.value
        own = self._generation[tid]
        self._generation[new] = own if _tgid(new) == _tgid(tid) else own + 1
        self._chosen.setdefault(self._generation[new], new)
        if new in self._early:
            self._early.remove(new)
            self._resume(new)

    def _on_call(self, tid: int) -> None:
        info = ctypes.create_string_buffer(88)
        _ptrace(_GET_SYSCALL_INFO, tid, len(info), ctypes.addressof(info))
        kind, (call,) = info.raw[0], struct.unpack_from("Q", info.raw, 24)
        if kind == 2 and tid == self._failing:
            _ptrace(_POKEUSER, tid, _RAX, 2**64 - int(self._action))
            sys.exit()
        counted = call in self._calls if self._calls else call not in _UNNOTICED
        if kind != 1 or self._unstarted or self._failing or not counted:
            return
        self._left -= 1
        if self._left:
            return
        print("hit", next((name for name, n in CALLS.items() if n == call), call), flush=True)
        if self._action in ("kill", "kill-first"):
            os.kill(_tgid(tid) if self._action == "kill" else self._chosen[0], signal.SIGKILL)
            sys.exit()
        self._failing = tid
        _ptrace(_POKEUSER, tid, _ORIG_RAX, 2**64 - 1)


def _main() -> None:
    pid, generation, nth, action, *calls = sys.argv[1:]
    numbers = frozenset(CALLS[name] for name in calls[0].split(",")) if calls else frozenset[int]()
    _Following(int(pid), int(generation), int(nth), action, numbers).run()


if __name__ == "__main__":
    _main()
