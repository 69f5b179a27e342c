"""The system call filter of a job: what it denies, what must go on working, and that no number slips past it.

Most of what is denied a job could not do anyway, so that its refusal proves little: the whole table is held
by asking the filter itself, and a job then tries each call for real.
"""

import errno
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.init_harness import SOURCES, Harness

X86: Final = os.uname().machine == "x86_64"
LINUX_6_13: Final = 466
ALLOW: Final = 0x7FFF0000
FAIL: Final = 0x00050000
KILL: Final = 0x80000000
# x86-64, i386, arm, aarch64, s390x: one of them is ours
ARCHITECTURES: Final = (0xC000003E, 0x40000003, 0x40000028, 0xC00000B7, 0x80000016)
NAMESPACES: Final = {
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mnt": 0x00020000,
    "net": 0x40000000,
    "pid": 0x20000000,
    "user": 0x10000000,
    "uts": 0x04000000,
}
DENIED: Final = {
    "mounts": "mount umount2 pivot_root chroot",
    "new mounts": "open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr",
    "namespaces": "setns",
    "handles": "open_by_handle_at",
    "quotas": "quotactl quotactl_fd",
    "keyrings": "keyctl add_key request_key",
    "bpf": "bpf",
    "perf": "perf_event_open",
    "userfaultfd": "userfaultfd",
    "io_uring": "io_uring_setup io_uring_enter io_uring_register",
    "fanotify": "fanotify_init fanotify_mark",
    "lsm": "lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
    "other processes": "kcmp pidfd_getfd process_madvise",
    "memory policy": "mbind get_mempolicy set_mempolicy set_mempolicy_home_node migrate_pages move_pages",
    "kernel": "kexec_load kexec_file_load reboot init_module finit_module delete_module",
    "clock": "settimeofday clock_settime adjtimex clock_adjtime",
    "names": "sethostname setdomainname",
    "log": "syslog",
    "swap": "swapon swapoff",
    "accounting": "acct",
    "terminals": "vhangup",
    "obsolete": "lookup_dcookie" + " uselib ustat sysfs" * X86,
} | ({"ports": "iopl ioperm"} if X86 else {})
GONE: Final = "nfsservctl" + " _sysctl create_module vserver security tuxcall getpmsg afs_syscall" * X86
# seen at their arguments; not among DENIED
INSPECTED: Final = "ioctl socket socketpair clone unshare personality prlimit64 setrlimit"
LATER_THAN_HEADERS: Final = {
    "set_mempolicy_home_node": 450,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
}
CALLS: Final = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in (number, *arguments)]
    result = libc.syscall(*words)
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""

Filter = Callable[..., int]


@pytest.fixture
def compiled() -> Iterator[Callable[..., str]]:
    """Compile a C program to where a job can see it."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)

    def compile_program(source: str, *options: str) -> str:
        (directory / "probe.c").write_text(source)
        subprocess.run(["gcc", *options, "-o", directory / "probe", directory / "probe.c"], check=True)
        return str(directory / "probe")

    yield compile_program
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def numbers() -> dict[str, int]:
    """Every system call of this architecture, by name, from the C library's headers."""
    command = ["gcc", "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"]
    defines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in defines.splitlines() if line.startswith("#define __NR_")]
    return LATER_THAN_HEADERS | {row[1][5:]: int(row[2]) for row in rows if row[2].isdigit()}


@pytest.fixture(scope="session")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Filter:
    """Ask the filter itself: what it says of a call's number, arguments and architecture."""
    directory = tmp_path_factory.mktemp("filter")
    source = f'#include "{SOURCES}/seccomp.c"\n#include <unistd.h>\n'
    source += "int main(void) { unsigned a = ARCHITECTURE; filter_system_calls;"
    source += " return write(1, &a, 4) + write(1, FILTER, sizeof FILTER) < 0; }"
    (directory / "dump.c").write_text(source)
    subprocess.run(["gcc", "-w", "-o", directory / "dump", directory / "dump.c"], check=True)
    dumped = subprocess.run([directory / "dump"], check=True, capture_output=True).stdout
    (ours,) = struct.unpack_from("=I", dumped)
    program = list(struct.iter_unpack("=HBBI", dumped[4:]))

    def run(number: int, *arguments: int, architecture: int = ours) -> int:
        words = [*arguments, *[0] * (6 - len(arguments))]
        data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *words)
        loaded, at = 0, 0
        while True:
            code, yes, no, value = program[at]
            at += 1
            if code == 0x20:  # load a word
                (loaded,) = struct.unpack_from("=I", data, value)
            elif code == 0x06:  # return
                return int(value)
            else:
                holds = {0x15: loaded == value, 0x25: loaded > value, 0x45: bool(loaded & value)}[code]
                at += yes if holds else no

    return run


def test_exactly_the_listed_calls_are_denied(numbers: dict[str, int], verdict: Filter) -> None:
    """Those of the list are EPERM, clone3 and unknown numbers are ENOSYS, and the rest is allowed."""
    names = {number: name for name, number in numbers.items()}
    hole = range(336 if X86 else 295, 424)
    denied = {name for row in DENIED.values() for name in row.split()}
    inspected = set(INSPECTED.split())
    for number in (*range(LINUX_6_13 + 1000), 0x40000000, 0x40000027, 0x7FFFFFFF, 0x80000000, -1):
        name = names.get(number)
        if number in hole or not 0 <= number <= LINUX_6_13 or name == "clone3":
            expected = FAIL | errno.ENOSYS
        elif name in denied:
            expected = FAIL | errno.EPERM
        else:
            expected = ALLOW
        if name not in inspected:
            assert verdict(number) == expected, (number, name)
    assert denied | inspected | {"clone3"} <= set(numbers)


def test_every_other_architecture_is_killed(verdict: Filter) -> None:
    """Under another architecture's numbering nothing is looked at: the process is killed."""
    verdicts = [verdict(1, architecture=one) for one in ARCHITECTURES]
    assert sorted(verdicts) == sorted([ALLOW, *[KILL] * 4])


@pytest.mark.parametrize("family", DENIED)
def test_a_job_is_denied(init: Harness, numbers: dict[str, int], family: str) -> None:
    """Each call of the family fails with EPERM in a job, whatever the kernel would have said."""
    names = DENIED[family].split()
    calls = "\n".join(f"print({name!r}, call({numbers[name]}, -1, -1, -1, -1, -1, -1))" for name in names)
    assert init.python(CALLS + calls).text.splitlines() == [f"{name} EPERM" for name in names]


def test_what_linux_has_no_more_is_refused(init: Harness, numbers: dict[str, int]) -> None:
    """Obsolete calls without a line in the filter are refused by the kernel, as the filter supposes."""
    calls = "\n".join(f"print(call({numbers[name]}, 0, 0, 0, 0, 0, 0))" for name in GONE.split())
    assert init.python(CALLS + calls).text.split() == ["ENOSYS"] * len(GONE.split())


def test_the_command_is_filtered_and_init_is_not(init: Harness) -> None:
    """A command and its children have one filter; init, which ends the job, has none."""
    job = init.start("/bin/sh", "-c", "grep ^Seccomp /proc/self/status; echo up; exec sleep 1000")
    job.wait_for_output("up")
    assert job.text.split() == ["Seccomp:", "2", "Seccomp_filters:", "1", "up"]
    assert "\nSeccomp:\t0\n" in Path(f"/proc/{job.pid}/status").read_text()
    job.send(signal.SIGQUIT)
    job.wait()


def test_new_namespaces_are_denied(init: Harness, numbers: dict[str, int], verdict: Filter) -> None:
    """No flag of clone or unshare makes a namespace, nor does one that Linux has yet to invent."""
    clone, unshare, clone3 = (numbers[name] for name in ("clone", "unshare", "clone3"))
    job = init.python(
        f"{CALLS}\n"
        f"for flag in {list(NAMESPACES.values())}:\n"
        f"    child = call({clone}, flag | 17, 0, 0, 0, 0)\n"
        "    if child == 0: os._exit(0)\n"
        f"    print(child, call({unshare}, flag))\n"
        f"print(call({unshare}, 0x80), call({unshare}, 1 << 37))\n"
        f"print(call({clone3}, 0, 0), call({unshare}, 0x600))"
    )
    assert job.text.split() == ["EPERM"] * 16 + ["ENOSYS", "0"]
    harmless = {0x100, 0x200, 0x400, 0x800, 0x10000, 0x40000}
    allowed = {1 << bit for bit in range(64) if verdict(unshare, 1 << bit) == ALLOW}
    assert allowed == harmless
    refused = {1 << bit for bit in range(64) if verdict(clone, 1 << bit) != ALLOW}
    assert refused == set(NAMESPACES.values())


def test_unshare_says_why(init: Harness) -> None:
    """A person who tries a user namespace reads that it is not permitted."""
    job = init.run("unshare", "-U", "true")
    assert "Operation not permitted" in job.text
    assert job.end == "exited 1 none"


def test_only_local_and_internet_sockets(init: Harness, numbers: dict[str, int], verdict: Filter) -> None:
    """AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK can be made; AF_VSOCK, AF_ALG and all others cannot."""
    socket, socketpair = numbers["socket"], numbers["socketpair"]
    job = init.python(
        f"{CALLS}\n"
        f"made = [family for family in range(64) if call({socket}, family, 2, 0) != 'EPERM']\n"
        f"print(made, call({socket}, 40 | 1 << 32, 1, 0), call({socketpair}, 30, 5, 0, 0))\n"
        "import socket\n"
        "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1)); socket.if_nameindex()"
    )
    assert job.text == "[1, 2, 10, 16] EPERM EPERM\nb'x'\n"
    assert job.end == "exited 0 none"
    assert [family for family in range(256) if verdict(socketpair, family) == ALLOW] == [1]


def test_only_usual_protocols(init: Harness, numbers: dict[str, int], verdict: Filter) -> None:
    """TCP, UDP and ICMP of the internet, routes of netlink; no uevents of the host's devices (S9)."""
    number, high = numbers["socket"], 1 << 32
    for family, protocols in ((2, [0, 1, 6, 17, 58]), (10, [0, 1, 6, 17, 58]), (16, [0])):
        allowed = [each for each in range(512) if verdict(number, family | high, 1, each | high) == ALLOW]
        assert allowed == protocols
    assert {verdict(number, 1, kind, protocol) for kind in (1, 2, 5) for protocol in range(9)} == {ALLOW}
    job = init.python(
        f"{CALLS}\nimport socket\n"
        f"print([call({number}, 16, 3, protocol) for protocol in (4, 9, 15)])\n"
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0)); socket.if_nameindex()\n"
        "print(len(socket.getaddrinfo('127.0.0.1', 80)) > 0)"
    )
    assert job.text == "['EPERM', 'EPERM', 'EPERM']\nTrue\n"


def test_a_file_stays_in_its_project(init: Harness, numbers: dict[str, int]) -> None:
    """A job can set neither the project that a quota counts a file for, nor a file's flags (S6)."""
    setflags, fssetxattr, getflags = 0x40086602, 0x401C5820, 0x80086601
    job = init.python(
        f"{CALLS}\n"
        "file = os.open('/run/job', os.O_RDONLY)\n"
        f"for command in {(setflags, fssetxattr, setflags | 1 << 32)}:\n"
        f"    print(call({numbers['ioctl']}, file, command, ctypes.create_string_buffer(32)))\n"
        f"print(call({numbers['ioctl']}, file, {getflags}, ctypes.create_string_buffer(32)) != 'EPERM')"
    )
    assert job.text.split() == ["ENOTSUP"] * 3 + ["True"]


def test_nothing_can_be_typed_into_a_terminal(init: Harness, numbers: dict[str, int]) -> None:
    """TIOCSTI and TIOCLINUX are denied, with any high word; other ioctls are the kernel's business."""
    tiocsti, tioclinux, tiocgwinsz = 0x5412, 0x541C, 0x5413
    job = init.python(
        f"{CALLS}\n"
        "import pty\n"
        "_, terminal = pty.openpty()\n"
        f"for command in {(tiocsti, tioclinux, tiocsti | 1 << 32, tioclinux | 1 << 62, tiocgwinsz)}:\n"
        f"    print(call({numbers['ioctl']}, terminal, command, ctypes.create_string_buffer(8)))"
    )
    assert job.text.split() == ["EPERM"] * 4 + ["0"]


def test_personalities_are_only_names(init: Harness, numbers: dict[str, int], verdict: Filter) -> None:
    """A job may change what uname says and, for debuggers, leave addresses as they are; nothing more."""
    personality = numbers["personality"]
    job = init.python(
        f"{CALLS}\n"
        "for persona in (0xffffffff, 0x8, 0x20000, 0x20008, 0x40000, 0, 0x400000, 0x100000, 0x200000):\n"
        f"    print(call({personality}, persona))"
    )
    assert job.text.split() == ["0", "0", "8", str(0x20000), str(0x20008), str(0x40000)] + ["EPERM"] * 3
    assert [bit for bit in range(32) if verdict(personality, 1 << bit) == ALLOW] == [3, 17, 18]


def test_the_limit_of_core_files_stays(init: Harness, numbers: dict[str, int], verdict: Filter) -> None:
    """Whoever sets it is told that it is done, and it stays; every other limit can be set as ever."""
    prlimit, setrlimit = numbers["prlimit64"], numbers["setrlimit"]
    job = init.python(
        f"{CALLS}\n"
        "import resource\n"
        "none, own = ctypes.create_string_buffer(16), os.getpid()\n"
        f"print(call({prlimit}, 0, 4, none, 0), call({prlimit}, own, 4 | 1 << 32, none, 0))\n"
        f"print(call({setrlimit}, 4, none), *resource.getrlimit(resource.RLIMIT_CORE))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        f"print(call({setrlimit}, 1, none), *resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "print(*resource.getrlimit(resource.RLIMIT_FSIZE))"
    )
    assert job.text.split("\n") == ["0 0", "0 1 1", "0 64 64", "0 0", ""]
    # a pointer with an empty half is one too
    for pointer in (1, 1 << 32, 1 << 63):
        assert [limit for limit in range(32) if verdict(prlimit, 0, limit, pointer) != ALLOW] == [4]
    assert {verdict(prlimit, 0, limit, 0, 1) for limit in range(32)} == {ALLOW}
    assert [limit for limit in range(32) if verdict(setrlimit, limit, 1) != ALLOW] == [4]


def test_threads_and_children_start_without_clone3(init: Harness) -> None:
    """libc falls back to clone: threads, vfork, posix_spawn and pools work; so do pipelines in a shell."""
    job = init.python(
        "import multiprocessing, os, subprocess, threading\n"
        "thread = threading.Thread(target=print, args=('thread',), kwargs={'flush': True})\n"
        "thread.start(); thread.join()\n"
        "subprocess.run(['echo', 'vfork']); subprocess.run('echo fork', shell=True, preexec_fn=os.getpid)\n"
        "os.waitpid(os.posix_spawn('/bin/echo', ['echo', 'spawn'], {}), 0)\n"
        "pool = multiprocessing.get_context('fork').Pool(2)\n"
        "print(pool.map(abs, [-1, -2]))"
    )
    assert job.text.split("\n") == ["thread", "vfork", "fork", "spawn", "[1, 2]", ""]
    assert init.sh("seq 100 | grep 7 | sort -rn | head -1; true & wait").text == "97\n"


def test_a_job_can_trace_its_own(init: Harness, numbers: dict[str, int]) -> None:
    """ptrace and process_vm_readv work within the job, as strace and gdb need them."""
    job = init.python(
        f"{CALLS}\n"
        "import signal, struct\n"
        "word = ctypes.c_long(42)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    libc.ptrace(0, 0, None, None); os.kill(os.getpid(), signal.SIGSTOP); os._exit(7)\n"
        "print(os.WSTOPSIG(os.waitpid(child, 0)[1]))\n"
        "libc.ptrace.restype = ctypes.c_long\n"
        "print(libc.ptrace(2, child, ctypes.c_void_p(ctypes.addressof(word)), None))\n"
        "word.value = 0\n"
        "vector = ctypes.create_string_buffer(struct.pack('QQ', ctypes.addressof(word), 8))\n"
        f"print(call({numbers['process_vm_readv']}, child, vector, 1, vector, 1, 0), word.value)\n"
        "libc.ptrace(7, child, None, None)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert job.text.split() == [str(int(signal.SIGSTOP)), "42", "8", "42", "7"]


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace here")
def test_strace_works(init: Harness) -> None:
    """strace follows a shell and its children."""
    job = init.run("strace", "-f", "-e", "trace=execve", "sh", "-c", "echo hi; true; ls / >/dev/null")
    assert "exited with 0" in job.text
    assert "\nhi\n" in job.text
    assert job.end == "exited 0 none"


@pytest.mark.skipif(not X86, reason="names registers of x86-64")
def test_a_tracer_cannot_change_a_call_into_a_denied_one(init: Harness, compiled: Callable[..., str]) -> None:
    """A call that a tracer has put in the place of another is looked at as well."""
    probe = compiled(r"""
#include <stdio.h>
#include <errno.h>
#include <signal.h>
#include <unistd.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
int main(void) {
    struct user_regs_struct registers;
    int status;
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        long result = syscall(SYS_unshare, 0L);
        _exit(result == 0 ? 0 : errno);
    }
    waitpid(child, &status, 0);
    do {
        ptrace(PTRACE_SYSCALL, child, 0, 0);
        waitpid(child, &status, 0);
        ptrace(PTRACE_GETREGS, child, 0, &registers);
    } while (registers.orig_rax != SYS_unshare);
    registers.rdi = 0x10000000;
    ptrace(PTRACE_SETREGS, child, 0, &registers);
    ptrace(PTRACE_CONT, child, 0, 0);
    waitpid(child, &status, 0);
    printf("%d\n", WEXITSTATUS(status));
}
""")
    assert subprocess.run([probe], check=True, capture_output=True).stdout == b"0\n"
    assert init.run(probe).text == f"{errno.EPERM}\n"


def test_a_job_can_only_add_filters(init: Harness, numbers: dict[str, int]) -> None:
    """A job may sandbox itself further; a filter of its own that allows everything takes nothing away."""
    job = init.python(
        f"{CALLS}\n"
        "import struct\n"
        "allow = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
        "program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(allow)))\n"
        f"print(call({numbers['prctl']}, 22, 2, program), call({numbers['unshare']}, 0x10000000))\n"
        f"print(call({numbers['prctl']}, 22, 0, 0))"
    )
    assert job.text.split() == ["0", "EPERM", "EINVAL"]


@pytest.mark.skipif(not X86, reason="32-bit x86")
@pytest.mark.parametrize("width", ["-m32", "-m64"])
def test_32_bit_calls_are_refused(init: Harness, compiled: Callable[..., str], width: str) -> None:
    """int 0x80 kills a program, be it a 32-bit one or a 64-bit one that makes a 32-bit call."""
    source = 'void _start(void) { for (;;) __asm__ volatile("int $0x80" : : "a"(1), "b"(7)); }'
    probe = compiled(source, width, "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie")
    try:
        works = subprocess.run([probe], check=False).returncode == 7
    except OSError:
        works = False
    if not works:
        pytest.skip("no 32-bit programs on this kernel")
    assert init.run(probe).end == f"signaled {int(signal.SIGSYS)} none"
