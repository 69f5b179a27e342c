"""The system calls that the network process may make once it is set up: a seccomp filter.

A deny-list, as that of jobs (init/seccomp.c, which says why), and stricter: the server starts no
program, makes no process, signals no process and looks into no other one. A call newer than this list (above
NEWEST) fails with ENOSYS. Threads still work, and so does all that gRPC, SQLite and the resolver do.

A denied call fails with EPERM. Only a call of another architecture ends the process: its numbers mean other
calls.
"""

import ctypes
import os
import platform
import socket
import struct
import termios
from dataclasses import dataclass
from typing import Final

from pjw.errors import ConfigError, KernelError

# removexattrat, Linux 6.13, as for jobs: before raising it, judge the calls that come in with it
NEWEST: Final = 466
# from here on a call has the same number on every architecture
_FIRST_NEW: Final = 424

# Why it is denied, and the numbers on x86-64 and on aarch64; None where there is no such call.
DENIED: Final[dict[str, dict[str, tuple[int | None, int | None]]]] = {
    "no program is started: the launcher is there, and nothing else is needed": {
        "execve": (59, 221),
        "execveat": (322, 281),
        "fork": (57, None),
        "vfork": (58, None),
    },
    "nobody is signalled: another service may run as the same user": {
        "kill": (62, 129),
        "tkill": (200, 130),
        "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240),
        "pidfd_send_signal": (424, 424),
    },
    "other processes: their memory and descriptors": {
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "kcmp": (312, 272),
        "pidfd_getfd": (438, 438),
        "process_madvise": (440, 440),
        "process_mrelease": (448, 448),
    },
    "other namespaces, roots and mounts; files by handle, past the mounts that hide them": {
        "setns": (308, 268),
        "unshare": (272, 97),
        "chroot": (161, 51),
        "pivot_root": (155, 41),
        "mount": (165, 40),
        "umount2": (166, 39),
        "open_by_handle_at": (304, 265),
        "open_tree": (428, 428),
        "move_mount": (429, 429),
        "fsopen": (430, 430),
        "fsconfig": (431, 431),
        "fsmount": (432, 432),
        "fspick": (433, 433),
        "mount_setattr": (442, 442),
    },
    "keyrings: in no namespace": {
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "request_key": (249, 218),
    },
    "large parts of the kernel that a server has no need of, and where many of its holes were": {
        "bpf": (321, 280),
        "perf_event_open": (298, 241),
        "userfaultfd": (323, 282),
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "fanotify_init": (300, 262),
        "fanotify_mark": (301, 263),
        "lsm_get_self_attr": (459, 459),
        "lsm_set_self_attr": (460, 460),
        "lsm_list_modules": (461, 461),
    },
    "where memory lies": {
        "mbind": (237, 235),
        "set_mempolicy": (238, 237),
        "set_mempolicy_home_node": (450, 450),
        "migrate_pages": (256, 238),
        "move_pages": (279, 239),
    },
    "the machine: its kernel, clock, name, log, swap, quotas, accounting, terminals and ports": {
        "kexec_load": (246, 104),
        "kexec_file_load": (320, 294),
        "reboot": (169, 142),
        "init_module": (175, 105),
        "finit_module": (313, 273),
        "delete_module": (176, 106),
        "settimeofday": (164, 170),
        "clock_settime": (227, 112),
        "adjtimex": (159, 171),
        "clock_adjtime": (305, 266),
        "sethostname": (170, 161),
        "setdomainname": (171, 162),
        "syslog": (103, 116),
        "swapon": (167, 224),
        "swapoff": (168, 225),
        "quotactl": (179, 60),
        "quotactl_fd": (443, 443),
        "acct": (163, 89),
        "vhangup": (153, 58),
        "iopl": (172, None),
        "ioperm": (173, None),
        "modify_ldt": (154, None),
        "personality": (135, 92),
        "lookup_dcookie": (212, 18),
        "uselib": (134, None),
        "ustat": (136, None),
        "sysfs": (139, None),
    },
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The facts of one architecture for a filter: `column` is its place in DENIED."""

    column: int
    audit: int
    last_old: int
    clone: int
    tgkill: int
    ioctl: int
    prlimit64: int
    socket: int
    socketpair: int
    seccomp: int


# last_old: uretprobe, and kexec_file_load
ARCHITECTURES: Final = {
    "x86_64": Architecture(
        0,
        0xC000003E,
        335,
        clone=56,
        tgkill=234,
        ioctl=16,
        prlimit64=302,
        socket=41,
        socketpair=53,
        seccomp=317,
    ),
    "aarch64": Architecture(
        1,
        0xC00000B7,
        294,
        clone=220,
        tgkill=131,
        ioctl=29,
        prlimit64=261,
        socket=198,
        socketpair=199,
        seccomp=277,
    ),
}

_CLONE3: Final = 435
_CLONE_THREAD: Final = 0x00010000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NEW_NAMESPACES: Final = 0x7E020000
_TIOCLINUX: Final = 0x541C
_EPERM, _ENOSYS = 1, 38

ALLOW: Final = 0x7FFF0000
FAIL: Final = 0x00050000
KILL: Final = 0x80000000

# classic BPF (linux/bpf_common.h): load a word of seccomp_data, compare with a constant, return one
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
# struct seccomp_data: number, architecture, then the arguments, low word first on both
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_SECCOMP_SET_MODE_FILTER: Final = 1
# for every thread, and with it no_new_privs
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1

Instruction = tuple[int, int, int, int]


def filter_system_calls() -> None:
    """Filter this process's system calls from now on, for good. Raises ConfigError or KernelError."""
    architecture = architecture_of(platform.machine())
    code = b"".join(struct.pack("=HBBI", *each) for each in program(architecture, os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog, with the padding before its pointer
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(architecture.seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, header) != 0:
        raise KernelError("filter the system calls of", "the server", ctypes.get_errno())


def architecture_of(machine: str) -> Architecture:
    """Return the facts of this machine for the filter. Raises ConfigError for one that has no filter."""
    try:
        return ARCHITECTURES[machine]
    except KeyError:
        raise ConfigError(
            f"cannot filter the system calls of the server: there is no filter for {machine}",
            hint=f"pjw runs on {' and '.join(ARCHITECTURES)}",
        ) from None


def program(architecture: Architecture, pid: int) -> list[Instruction]:
    """Build the filter of the process *pid*."""
    numbers = [
        number
        for calls in DENIED.values()
        for each in calls.values()
        if (number := each[architecture.column]) is not None
    ]
    return [
        _load(_ARCHITECTURE),
        _when(_EQUAL, architecture.audit, 1, 0),
        _give(KILL),
        _load(_NUMBER),
        # calls newer than this list, and the hole in the numbering, which x32 and -1 are above
        _when(_ABOVE, NEWEST, 2, 0),
        _when(_ABOVE, _FIRST_NEW - 1, 2, 0),
        _when(_ABOVE, architecture.last_old, 0, 1),
        _give(FAIL | _ENOSYS),
        # its flags are in memory, which no filter can read: libc takes clone
        *_on(_CLONE3, [_give(FAIL | _ENOSYS)]),
        # a thread, and no process
        *_on(
            architecture.clone,
            [
                _load(_ARGUMENTS),
                _when(_ANY_BIT, _NEW_NAMESPACES, 1, 0),
                _when(_ANY_BIT, _CLONE_THREAD, 1, 0),
                _give(FAIL | _EPERM),
                _give(ALLOW),
            ],
        ),
        # its own threads, as libc does for all of them at once
        *_on(architecture.tgkill, _only(pid)),
        *_on(architecture.prlimit64, _only(0, pid)),
        # typing into a terminal that others have too
        *_on(
            architecture.ioctl,
            [
                _load(_ARGUMENTS + 8),
                _when(_EQUAL, termios.TIOCSTI, 1, 0),
                _when(_EQUAL, _TIOCLINUX, 0, 1),
                _give(FAIL | _EPERM),
                _give(ALLOW),
            ],
        ),
        *_on(
            architecture.socket,
            [
                _load(_ARGUMENTS),
                _when(_EQUAL, socket.AF_UNIX, 9, 0),
                _when(_EQUAL, socket.AF_NETLINK, 5, 0),
                _when(_EQUAL, socket.AF_INET, 1, 0),
                _when(_EQUAL, socket.AF_INET6, 0, 5),
                # the protocol, of the two families of the internet
                _load(_ARGUMENTS + 16),
                _when(_EQUAL, socket.IPPROTO_TCP, 4, 0),
                _when(_EQUAL, socket.IPPROTO_UDP, 3, 1),
                # and of netlink, where 0 is the table of routes
                _load(_ARGUMENTS + 16),
                _when(_EQUAL, 0, 1, 0),
                _give(FAIL | _EPERM),
                _give(ALLOW),
            ],
        ),
        *_on(architecture.socketpair, _only(socket.AF_UNIX)),
        *(instruction for number in numbers for instruction in _on(number, [_give(FAIL | _EPERM)])),
        _give(ALLOW),
    ]


def _only(*firsts: int) -> list[Instruction]:
    """Allow a call when its first argument is one of these."""
    return [
        _load(_ARGUMENTS),
        *(_when(_EQUAL, value, len(firsts) - place, 0) for place, value in enumerate(firsts)),
        _give(FAIL | _EPERM),
        _give(ALLOW),
    ]


def _on(number: int, rule: list[Instruction]) -> list[Instruction]:
    """Apply a rule to one call; for another call its number is still loaded behind the rule."""
    return [_when(_EQUAL, number, 0, len(rule)), *rule]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _when(kind: int, value: int, yes: int, no: int) -> Instruction:
    # the number of instructions to skip when it is so, and when not
    return (kind, yes, no, value)


def _give(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)
