"""From inside a job: every way out that has been thought of, tried in earnest, and seen to fail.

Each attempt is a program that runs twice: in a job, where it must fail, and outside, where it must not
(or it would prove nothing). tests/README.md, "What a hostile job tries", lists those of other files too.
"""

import ctypes
import errno
import json
import os
import secrets
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pjw.model import ExitStatus
from pjw.worker import Worker
from tests.support.init_harness import Inotify
from tests.support.worker_harness import (
    Bench,
    launchers_of,
    open_bench,
    python,
    run,
    run_in_session,
    start,
    start_said,
)

# Begins every program: what an attempt gives is its result, or the name of the error.
PRELUDE: Final = """
import ctypes, errno, json, os, resource, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments, **options):
    try: return function(*arguments, **options)
    except OSError as error: return errno.errorcode[error.errno]
def read(path, size=1 << 16, flags=os.O_RDONLY):
    fd = os.open(path, flags | os.O_NONBLOCK)
    try: return os.read(fd, size).decode(errors='replace')
    finally: os.close(fd)
def write(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try: return os.write(fd, text.encode())
    finally: os.close(fd)
def checked(result):
    if result < 0: raise OSError(ctypes.get_errno(), '')
    return result
"""
DENIED: Final = {"EPERM", "EACCES"}
HOSTILE: Final = "mallory"
WAY: Final = {"inside": "job", "root": "host"}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A state directory, and the proof that nothing stays behind."""
    async with open_bench() as bench:
        # visible in jobs, so that only pjw hides what is in it
        bench.directory.chmod(0o755)
        yield bench


@pytest.fixture
async def worker(bench: Bench) -> Worker:
    """A worker with the default settings, whose first client, and so first user, is the hostile one."""
    worker = await bench.open()
    await run(worker, "true", HOSTILE)
    return worker


@pytest.fixture(params=["job", "session"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `inside` is: in a job's own command, or in a session of a job of the same client."""
    monkeypatch.setitem(WAY, "inside", request.param)
    return str(request.param)


async def inside(worker: Worker, program: str) -> Any:
    """What a program finds as a job of the hostile client, or in one: the value of its last line."""
    status, output = await run_inside(worker, python(PRELUDE + printed(program)))
    assert status == ExitStatus(code=0), output
    return json.loads(output)


async def run_inside(worker: Worker, command: str | list[str]) -> tuple[ExitStatus | None, bytes]:
    """How a command of the hostile client ends there, and what it writes."""
    if WAY["inside"] == "job":
        job, output = await run(worker, command, HOSTILE)
        return job.exit_status, output
    status, output, words = await run_in_session(worker, command, HOSTILE)
    return status, output + words


def outside(program: str, uid: int) -> Any:
    """What the same program finds on the host, as that user."""
    code, output = on_the_host(python(PRELUDE + printed(program)), uid)
    assert code == 0
    return json.loads(output)


def on_the_host(command: list[str], uid: int, directory: Path = Path("/")) -> tuple[int, bytes]:
    """How a command ends on the host, and its output, as a user without groups."""
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, user=uid, group=uid, extra_groups=[], cwd=directory
    )
    return done.returncode, done.stdout


def printed(program: str) -> str:
    """A program that says what its last line is."""
    *lines, last = program.strip().splitlines()
    return "\n".join([*lines, f"print(json.dumps({last}))"])


def of_root(host: Any, image: Any) -> Any:
    """What a job finds whose root shows the host's files, or is an image's (test_images_escape.py)."""
    return image if WAY["root"] == "image" else host


# --- other processes


async def test_no_other_process_has_a_number(bench: Bench, worker: Worker, way: str) -> None:
    """Of all numbers only init's and its own name a process, to kill(2) and to pidfd_open(2).

    In a session those of the job's command, and of what waits for the session's, too; 3 has made that.
    """
    victim = await start(worker, ["sleep", "60"], HOSTILE)
    [pid] = bench.processes()
    program = f"""
def there(pid): return attempt(os.kill, pid, 0) != 'ESRCH' or attempt(os.pidfd_open, pid) != 'ESRCH'
[pid for pid in {{1, {pid}, *range(2, min(100_000, int(read('/proc/sys/kernel/pid_max'))))}} if there(pid)]
"""
    assert await inside(worker, program) == ([1, 2] if way == "job" else [1, 2, 4, 5])
    assert {1, pid} <= set(outside(program, bench.settings.uid_first))
    await worker.stop(victim.id, 0)


async def test_the_memory_of_another_job_of_the_same_user_is_out_of_reach(
    bench: Bench, worker: Worker
) -> None:
    """One user on the host, and yet no way to the memory, the files or the root of the other job."""
    await start(worker, ["sleep", "60"], HOSTILE)
    [pid] = bench.processes()
    program = f"""
vector = ctypes.create_string_buffer(16)
names = ('root', 'cwd', 'exe', 'fd/1', 'mem', 'maps', 'environ', 'cmdline')
found = [attempt(os.stat, f'/proc/{pid}/{{name}}') == 'ENOENT' for name in names]
traced = attempt(lambda: checked(libc.ptrace(0x4206, {pid}, 0, 0)))
[any(not gone for gone in found), traced]
"""
    assert await inside(worker, program) == [False, "ESRCH"]
    assert outside(program, bench.settings.uid_first) == [True, 0]


async def test_shared_memory_of_the_host_is_not_there(bench: Bench, worker: Worker) -> None:
    """A segment of System V that everybody may attach, by its key and by its id."""
    libc, key = ctypes.CDLL(None, use_errno=True), secrets.randbelow(2**30) + 1
    segment = libc.shmget(key, 4096, 0o1000 | 0o666)
    assert segment >= 0
    program = f"""
libc.shmat.restype = ctypes.c_long
[attempt(lambda: checked(libc.shmget({key}, 0, 0)) >= 0), libc.shmat({segment}, None, 0) != -1]
"""
    try:
        assert await inside(worker, program) == ["ENOENT", False]
        assert outside(program, bench.settings.uid_first) == [True, True]
    finally:
        libc.shmctl(segment, 0, None)


async def test_the_launcher_s_socket_is_out_of_reach(worker: Worker) -> None:
    """A job has none of the launcher's descriptors, no socket has a name, and none of its own is one."""
    [launcher] = launchers_of(os.getpid())
    assert os.readlink(f"/proc/{launcher}/fd/3").startswith("socket:")
    program = """
mine = [fd for fd in range(1024) if attempt(os.fstat, fd) != 'EBADF']
named = read('/proc/net/unix').splitlines()[1:]
request = b'{"op":"job_ids","seq":1,"after":0}'
sent = {attempt(lambda: socket.socket(fileno=os.dup(fd)).send(request)) for fd in mine}
[mine, named, sorted(sent)]
"""
    assert await inside(worker, program) == [[0, 1, 2], [], ["ENOTSOCK"]]
    assert outside(program, 0)[1] != []


# --- files


async def test_secrets_cannot_be_found(bench: Bench, worker: Worker) -> None:
    """A key, the table, another's output and scratch: by name, link, descriptor, /proc and search."""
    secret = secrets.token_hex(16)
    key = bench.directory / "server.key"
    key.write_text(secret)
    key.chmod(0o444)
    await bench.close(worker)
    worker = await bench.open(hidden_paths=(str(key),))
    said = f"echo {secret} | tee $HOME/file; chmod -R 777 $HOME; echo up; exec sleep 300"
    victims = [await start_said(worker, said, b"up", client) for client in (HOSTILE, "other")]
    places = [key, bench.state / "jobs.sqlite-wal"]
    for job in victims:
        own = bench.state / f"scratch/{job.id}" / of_root("file", "job/file")
        places += [bench.state / f"jobs/{job.id}/output", own]
    # all of them are there, and have it
    assert [path for path in places if secret.encode() not in path.read_bytes()] == []

    def search(ways: list[str], tops: list[str]) -> str:
        return f"""
secret = {secret[::-1]!r}[::-1]
found = []
def look(path, **options):
    if secret in attempt(read, path, **options): found.append(path)
for number, path in enumerate({[str(path) for path in places]}):
    for way in {ways}: look(way + path)
    if os.environ['HOME'] == os.getcwd():
        os.symlink(path, f'link{{number}}')
        look(f'link{{number}}')
        if attempt(os.link, path, f'hard{{number}}') is None: look(f'hard{{number}}')
    fd = os.open('/', os.O_PATH)
    for part in path.strip('/').split('/'):
        fd = attempt(os.open, part, os.O_PATH, dir_fd=fd) if isinstance(fd, int) else fd
    if isinstance(fd, int): look(f'/proc/self/fd/{{fd}}')
for top in {tops}:
    for directory, _, names in os.walk(top):
        for name in names: look(os.path.join(directory, name))
found
"""

    roots = [f"/proc/{name}" for name in ("self/root", "1/root", "1/cwd", "1/task/1/root")]
    tops = ["/run", "/tmp", "/var/tmp", "/dev", "/proc/1", "/proc/sys/kernel"]
    ways = ["", *roots, "/run/job/../..", "/dev/fd/0/../.."]
    assert await inside(worker, search(ways, [str(bench.directory), *tops])) == []
    # as root, who has no need of a way around, and whose devices are not to be read
    found = outside(search([""], [str(bench.directory)]), 0)
    assert {path for path in found if not path.startswith("/proc")} == {str(path) for path in places}
    assert len([path for path in found if path.startswith("/proc")]) == len(places)


async def test_a_device_of_the_host_cannot_be_opened(bench: Bench, worker: Worker) -> None:
    """One that lies where a job sees it, open to all: on no mount of a job is a device one."""
    device = bench.directory / "zero"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    device.chmod(0o666)
    program = f"attempt(read, '{device}', 1)"
    assert await inside(worker, program) == of_root("EACCES", "ENOENT")
    assert outside(program, bench.settings.uid_first) == "\0"


async def test_file_capabilities_give_nothing(bench: Bench, worker: Worker) -> None:
    """A program of the host that reads any file by its capability reads none for a job."""
    program, closed = bench.directory / "cat", bench.directory / "closed"
    shutil.copy("/bin/cat", program)
    dac_read_search, effective = 1 << 2, 0x02000001
    os.setxattr(program, "security.capability", struct.pack("<5I", effective, dac_read_search, 0, 0, 0))
    closed.write_text("secret")
    closed.chmod(0o600)
    command = [str(program), str(closed)]
    status, output = await run_inside(worker, command)
    assert (b"secret" in output, status) == (False, ExitStatus(code=1))
    assert on_the_host(command, bench.settings.uid_first) == (0, b"secret")


@pytest.fixture
def listener(bench: Bench) -> Iterator[tuple[Path, Path]]:
    """A Unix socket and a FIFO of the host that everybody may use, in a directory of their own."""
    directory = bench.directory / "service"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "socket"))
        server.listen()
        os.mkfifo(directory / "fifo")
        reader = os.open(directory / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        for path in (directory, *directory.iterdir()):
            path.chmod(0o777)
        yield directory / "socket", directory / "fifo"
        os.close(reader)


async def test_a_service_of_the_host_cannot_be_talked_to(
    bench: Bench, worker: Worker, listener: tuple[Path, Path]
) -> None:
    """S8: a job finds the path of a socket and of a FIFO, and nobody behind it; where hidden, no path."""
    program = f"""
connected = attempt(socket.socket(socket.AF_UNIX).connect, '{listener[0]}')
[connected, attempt(os.open, '{listener[1]}', os.O_WRONLY | os.O_NONBLOCK)]
"""
    assert outside(program, bench.settings.uid_first)[0] is None
    assert await inside(worker, program) == of_root(["ECONNREFUSED", "ENXIO"], ["ENOENT", "ENOENT"])
    await bench.close(worker)
    worker = await bench.open(hidden_paths=(str(listener[0].parent),))
    assert await inside(worker, program) == of_root(["EACCES", "EACCES"], ["ENOENT", "ENOENT"])


async def test_terminals_of_the_host_are_out_of_reach(bench: Bench, worker: Worker) -> None:
    """A terminal that everybody may write to is not in a job's /dev/pts, and a job has none to type into."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    Path(name).chmod(0o666)
    program = f"[attempt(write, '{name}', 'x'), attempt(read, '/dev/tty')]"
    try:
        assert await inside(worker, program) == ["ENOENT", "ENXIO"]
        assert outside(program, bench.settings.uid_first)[0] == 1
    finally:
        os.close(theirs)
        os.close(ours)


# --- the kernel


async def test_no_raw_socket_can_be_made(worker: Worker) -> None:
    """Neither of IP, nor below it, nor one that captures."""
    program = """
internet = (socket.AF_INET, socket.AF_INET6)
kinds = [(family, socket.SOCK_RAW, protocol) for family in internet for protocol in (1, 58, 255)]
kinds += [(socket.AF_PACKET, kind, 0x300) for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM)]
[attempt(lambda: socket.socket(*kind).close()) for kind in kinds]
"""
    # user mode Linux has no IPv6
    assert set(await inside(worker, program)) - {"EAFNOSUPPORT"} == {"EPERM"}
    assert None in outside(program, 0)


async def test_the_kernel_s_log_can_be_neither_read_nor_written(worker: Worker) -> None:
    """By device, by /proc, by system call, by a device of one's own."""
    program = """
ways, modes = ['/dev/kmsg', '/proc/kmsg', '/tmp/pjw-test-kmsg'], (os.O_RDONLY, os.O_WRONLY)
made = attempt(os.mknod, ways[2], 0o666 | stat.S_IFCHR, os.makedev(1, 11))
opened = [attempt(lambda: os.close(os.open(way, mode))) for way in ways for mode in modes]
size = attempt(lambda: checked(libc.klogctl(10, None, 0)) > 0)
if made is None: os.unlink(ways[2])
[made, *opened, size]
"""
    found = await inside(worker, program)
    assert set(found) <= {*DENIED, "ENOENT"}, found
    of_root = outside(program, 0)
    assert (of_root[:3], of_root[-1]) == ([None] * 3, True)


async def test_the_counters_of_the_host_are_hidden(bench: Bench, worker: Worker) -> None:
    """Of what engines mask, a job can read nothing that its user could outside; what programs need it can."""
    masked = [
        *("/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/latency_stats", "/proc/pressure"),
        *("/proc/sched_debug", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap"),
        *("/sys/firmware", "/sys/fs/selinux", "/sys/dev/block", "/sys/kernel", "/sys/block"),
    ]
    needed = ["/proc/meminfo", "/proc/stat", "/sys/devices/system/cpu/online", "/sys/class/net/lo/mtu"]
    program = f"""
def look(path): return os.listdir(path) if os.path.isdir(path) else read(path)
[attempt(look, path) for path in {[*masked, *needed]}]
"""
    found = await inside(worker, program)
    errors = dict(zip(masked, found, strict=False))
    # transparent huge pages, where the kernel has them
    assert errors.pop("/sys/kernel") in (["mm"], "ENOENT")
    assert set(errors.values()) <= {*DENIED, "ENOENT"}, errors
    assert [text for text in found[len(masked) :] if not text or text in errno.errorcode.values()] == []
    on_the_host = dict(zip(masked, outside(program, bench.settings.uid_first), strict=False))
    assert "CPU0" in on_the_host["/proc/interrupts"]
    assert "devices" in await inside(worker, "os.listdir('/sys')")
    assert set(await inside(worker, "os.listdir('/sys')")) < set(os.listdir("/sys"))


async def test_nothing_of_the_kernel_s_can_be_opened_for_writing(worker: Worker) -> None:
    """No file of /sys, none of /proc but a job's own processes' and one that refuses the write."""

    def search(writable: str) -> str:
        return f"""
found = []
for top in ('/proc', '/sys'):
    for directory, names, files in os.walk(top):
        if directory == '/proc': names[:] = [name for name in names if not name.isdigit()]
        paths = [os.path.join(directory, name) for name in files]
        found += [path for path in paths if not os.path.islink(path) and {writable}]
found
"""

    opened = "attempt(lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))) is None"
    # its mode is 0666, and a write takes a capability; kernels without checkpoints lack it
    one = "/proc/sys/kernel/ns_last_pid"
    assert set(await inside(worker, search(opened))) <= {one}
    assert await inside(worker, f"attempt(write, '{one}', '100')") in ("EPERM", "ENOENT")
    # as root, who is only asked whether he may: to open all of them might do something
    assert len(outside(search("os.access(path, os.W_OK)"), 0)) > 100


@pytest.fixture
def core_pattern() -> Iterator[Path]:
    """The setting of the whole host, which is put back."""
    path = Path("/proc/sys/kernel/core_pattern")
    former = path.read_text()
    try:
        path.write_text(former)
    except OSError as error:
        pytest.skip(f"cannot set the host's handler of core dumps: {error}")
    yield path
    path.write_text(former)


# PROC_PID_INIT_INO of the kernel's include/linux/proc_ns.h
@pytest.mark.skipif(
    os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC,
    reason="the kernel executes the handler in its first mount namespace, and this is a container",
)
async def test_a_crash_starts_nothing_on_the_host(bench: Bench, worker: Worker, core_pattern: Path) -> None:
    """A handler of core dumps, which would be root's and on the host, never hears of a job's crash."""
    handler, seen = bench.directory / "handler", bench.directory / "seen"
    handler.write_text(f'#!/bin/sh\necho "$1" >> {seen}\n')
    handler.chmod(0o755)
    seen.touch()
    crash = "import os; os.kill(os.getpid(), 11)"
    limits = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    uid, watch = bench.settings.uid_first, Inotify(seen)
    core_pattern.write_text(f"|{handler} %u")
    for script in (crash, f"{limits}\n{crash}"):
        status, output = await run_inside(worker, python(script))
        assert status == ExitStatus(signal=11), output
    assert on_the_host(python(f"{limits}\n{crash}"), uid + 1) == (-11, b"")
    watch.wait_until(lambda: f"{uid + 1}\n" in seen.read_text())
    watch.close()
    assert f"{uid}\n" not in seen.read_text()


async def test_a_crash_leaves_no_core_file(bench: Bench, worker: Worker, core_pattern: Path) -> None:
    """Neither in the job's own directory nor elsewhere, whatever limit it asks for."""
    core_pattern.write_text("core-of-a-test")
    script = "ulimit -c unlimited; sh -c 'kill -SEGV $$'; ls"
    assert b"core-of-a-test" not in (await run_inside(worker, script))[1]
    directory = bench.directory / "open"
    directory.mkdir()
    directory.chmod(0o777)
    _, output = on_the_host(["sh", "-c", script], bench.settings.uid_first, directory)
    assert b"core-of-a-test" in output
