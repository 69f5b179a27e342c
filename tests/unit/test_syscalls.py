"""The filter of the network process, asked by an interpreter of its own language, on both architectures."""

import re
import socket
import struct
import termios
from pathlib import Path
from typing import Final

import pytest

from pjw.errors import ConfigError
from pjw.server.syscalls import (
    ALLOW,
    ARCHITECTURES,
    DENIED,
    FAIL,
    KILL,
    NEWEST,
    Architecture,
    architecture_of,
    program,
)

PID: Final = 4711
EPERM: Final = FAIL | 1
ENOSYS: Final = FAIL | 38
# what a kernel's headers call each table
HEADERS: Final = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
THREAD: Final = 0x003D0F00
VFORK: Final = 0x4111

both: Final = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())


def ask(architecture: Architecture, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter answers to a call: struct seccomp_data through the machine of bpf(4)."""
    words = [*arguments, *(0,) * (6 - len(arguments))]
    audit = architecture.audit if audit is None else audit
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, audit, 0, *(word & (2**64 - 1) for word in words))
    code, place, held = program(architecture, PID), 0, 0
    while True:
        kind, yes, no, value = code[place]
        place += 1
        match kind:
            case 0x20:
                (held,) = struct.unpack_from("<I", data, value)
            case 0x06:
                return value
            case 0x15 | 0x25 | 0x45:
                true = {0x15: held == value, 0x25: held > value, 0x45: bool(held & value)}[kind]
                place += yes if true else no
            case _:
                raise AssertionError(f"no such instruction: {kind:#x}")


@both
def test_each_call_of_the_table_is_denied(architecture: Architecture) -> None:
    """The whole table, and nothing by the number of the other architecture."""
    for calls in DENIED.values():
        for name, numbers in calls.items():
            number = numbers[architecture.column]
            if number is not None:
                assert ask(architecture, number) == EPERM, name


@both
def test_what_nobody_has_judged_does_not_exist(architecture: Architecture) -> None:
    """Numbers above the newest, in the hole of the numbering, of x32 and -1; another architecture ends it."""
    for number in (NEWEST + 1, 10_000, architecture.last_old + 1, 423, 0x40000000 + 59, -1, 2**31):
        assert ask(architecture, number) == ENOSYS, number
    assert ask(architecture, NEWEST) == ALLOW
    assert ask(architecture, 0, audit=0x40000003) == KILL


@both
def test_threads_and_no_processes(architecture: Architecture) -> None:
    """clone(2) by its flags; clone3(2), whose flags no filter sees, sends libc back to it."""
    assert ask(architecture, architecture.clone, THREAD) == ALLOW
    assert ask(architecture, architecture.clone, VFORK) == EPERM
    assert ask(architecture, architecture.clone, 17) == EPERM
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(architecture, architecture.clone, THREAD | namespace) == EPERM
    assert ask(architecture, 435) == ENOSYS


@both
def test_signals_and_limits_of_its_own(architecture: Architecture) -> None:
    """A thread of its own is signalled, as setresuid(2) of libc does; another process is not."""
    assert ask(architecture, architecture.tgkill, PID) == ALLOW
    assert ask(architecture, architecture.tgkill, PID + 1) == EPERM
    assert (
        ask(architecture, architecture.prlimit64, 0)
        == ask(architecture, architecture.prlimit64, PID)
        == ALLOW
    )
    assert ask(architecture, architecture.prlimit64, 1) == EPERM


@both
def test_sockets(architecture: Architecture) -> None:
    """TCP, UDP, Unix and the table of routes; the high half of an int is the kernel's to drop, and ours."""
    made = architecture.socket
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP, 2**32):
            assert ask(architecture, made, family, 1, protocol) == ALLOW
        for protocol in (1, 132, 255, 262):
            assert ask(architecture, made, family, 3, protocol) == EPERM
    assert ask(architecture, made, socket.AF_UNIX, 1, 0) == ALLOW
    assert ask(architecture, made, socket.AF_NETLINK, 3, 0) == ALLOW
    for protocol in (socket.IPPROTO_TCP, 15, socket.IPPROTO_UDP):
        assert ask(architecture, made, socket.AF_NETLINK, 3, protocol) == EPERM
    for number in range(64):
        allowed = number in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
        assert (ask(architecture, made, number, 1, 0) == ALLOW) is allowed, number
    assert ask(architecture, architecture.socketpair, socket.AF_UNIX) == ALLOW
    assert ask(architecture, architecture.socketpair, socket.AF_INET) == EPERM


@both
def test_terminals(architecture: Architecture) -> None:
    """Nothing is typed into a terminal; other ioctls go on."""
    for request in (termios.TIOCSTI, termios.TIOCSTI + 2**32, 0x541C):
        assert ask(architecture, architecture.ioctl, 0, request) == EPERM
    assert ask(architecture, architecture.ioctl, 0, termios.TIOCGWINSZ) == ALLOW


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_the_kernel_s(machine: str) -> None:
    """Each number of the table beside the headers of Linux; those of before know fewer calls."""
    path = Path("/usr/include") / HEADERS[machine]
    if not path.exists():
        pytest.skip(f"no {path}")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text(), re.MULTILINE)
    known = {name: int(number) for name, number in reversed(found)}
    architecture = ARCHITECTURES[machine]
    for calls in DENIED.values():
        for name, numbers in calls.items():
            newer = name not in known and max(filter(None, numbers)) > known.get("futex_waitv", 449)
            assert newer or known.get(name) == numbers[architecture.column], name
    for name in ("clone", "tgkill", "ioctl", "prlimit64", "socket", "socketpair", "seccomp"):
        assert known[name] == getattr(architecture, name), name


def test_a_machine_that_nobody_has_looked_at() -> None:
    """It is refused in words, instead of running without a filter."""
    with pytest.raises(ConfigError, match="there is no filter for riscv64"):
        architecture_of("riscv64")
