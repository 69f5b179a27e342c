"""The host out of sight: what a job shares with the host and with other jobs of the files that it may read.

Each job has overlays of its own of the host's file systems. What would cross them is tried here, and what the
host does with its files and disks while jobs run.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from pjw.errors import PjwError
from pjw.launcher.cgroup import open_hierarchy
from pjw.launcher.departures import Departures
from pjw.launcher.image_store import ImageStore
from pjw.launcher.images import Images
from pjw.launcher.inits import Init, InitPool
from pjw.launcher.phases import Phases
from pjw.launcher.policy import Policy, instance_name
from pjw.launcher.processes import Watcher
from pjw.launcher.protocol import Hello, Launch
from pjw.launcher.scratch import Scratch
from pjw.launcher.spawn import Spawner
from pjw.launcher.workspaces import Workspaces
from pjw.model import ExitStatus
from pjw.worker import Worker
from pjw.worker.settings import NO_CEILING, WAITING_INITS
from tests.support.disks import small_disk
from tests.support.service import BIN, wait_for, waiting_inits
from tests.support.worker_harness import NO_LIMITS, Bench, open_bench, python, run, start, start_said

INOTIFY = """
import ctypes, os, select
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
def watched(path): return libc.inotify_add_watch(watch, path.encode(), 0xfff) >= 0
def events(seconds):
    ready, _, _ = select.select([watch], [], [], seconds)
    return os.read(watch, 65536) if ready else b''
"""


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A state directory in one that jobs see, but for what pjw hides in it."""
    async with open_bench() as bench:
        bench.directory.chmod(0o755)
        yield bench


def do(*command: str | Path, pass_fds: Sequence[int] = ()) -> str:
    """Run a program as root on the host; what it says."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds)
    return done.stdout.strip()


def check(config: Path) -> str:
    """What `pjwd check` says; there are no certificates, so it finds fault with that."""
    command = [str(BIN / "pjwd"), "check", "--config", str(config)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout


def ask(script: str, then: str) -> list[str]:
    """A job that says it is ready, waits for `Bench.tell`, and then says what an expression is."""
    return python(
        f"{script}\nimport json, os\nos.mkfifo('ask'); asked = os.open('ask', os.O_RDWR)\n"
        f"print('ready', flush=True); os.read(asked, 3)\nprint(json.dumps({then}))"
    )


async def answer(bench: Bench, worker: Worker, job_id: int) -> object:
    """What the expression of `ask` is now."""
    bench.tell(job_id)
    job = await worker.wait(job_id)
    lines = bench.output(job_id).decode().splitlines()
    assert job.exit_status == ExitStatus(code=0), lines
    return json.loads(lines[1])


# --- S8: two clients share no lock and hear no event; the host's are out of reach


async def test_no_event_of_files_of_the_host_is_heard(bench: Bench, worker: Worker) -> None:
    """A watch of programs and of /etc: not what another client's job executes, nor what root does there."""
    for directory in (bench.directory / "watched", bench.directory / "watched/bin"):
        directory.mkdir()
    program, text = bench.directory / "watched/bin/program", bench.directory / "watched/text"
    shutil.copy("/bin/true", program)
    text.write_text("words")
    watches = [str(program.parent), str(program), str(text.parent), str(text), "/usr/bin", "/etc"]
    spy = await start_said(
        worker,
        ask(f"{INOTIFY}\nassert all(watched(path) for path in {watches})", "len(events(1))"),
        b"ready",
        "spy",
    )
    await run(worker, f"{program}; cat {text}; ls {program.parent} {text.parent} /etc; exec true", "other")
    do(str(program))
    assert text.read_text() == "words"
    text.write_text("others")
    (bench.directory / "watched/new").touch()
    assert await answer(bench, worker, spy.id) == 0


async def test_no_lock_is_shared(bench: Bench, worker: Worker) -> None:
    """A job that holds flock and fcntl locks on a file holds up neither another client's job nor the host."""
    path = bench.directory / "locked"
    path.touch()
    path.chmod(0o666)
    take = f"import fcntl\nfile = open('{path}'); fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    hold = f"{take}; fcntl.lockf(file, fcntl.LOCK_SH)"
    holder = await start_said(worker, ask(hold, "1"), b"ready", "one")
    job, output = await run(worker, python(take), "two")
    assert job.exit_status == ExitStatus(code=0), output
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # and the other way: what root has locked tells a job nothing
        job, output = await run(worker, python(take), "two")
        assert job.exit_status == ExitStatus(code=0), output
    assert await answer(bench, worker, holder.id) == 1


async def test_a_fifo_of_the_host_is_another_in_each_job(bench: Bench, worker: Worker) -> None:
    """What one job writes into it neither the host reads nor another job."""
    fifo = bench.directory / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    listen = f"fifo = os.open('{fifo}', os.O_RDONLY | os.O_NONBLOCK)"
    other = await start_said(
        worker, ask(f"import os\n{listen}", "os.read(fifo, 10).decode()"), b"ready", "one"
    )
    write = f"import os\n{listen}\nos.write(os.open('{fifo}', os.O_WRONLY), b'x')"
    job, output = await run(worker, python(write), "two")
    try:
        assert job.exit_status == ExitStatus(code=0), output
        assert os.read(reader, 10) == b""
        assert await answer(bench, worker, other.id) == ""
    finally:
        os.close(reader)


async def test_a_socket_of_the_host_is_nobody_s(bench: Bench, worker: Worker) -> None:
    """Connections and datagrams to its path are refused."""
    path = bench.directory / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o666)
        script = f"import socket\nprint(socket.socket(socket.AF_UNIX).connect_ex('{path}'))"
        assert (await run(worker, python(script)))[1] == b"111\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


# --- what the host installs, replaces and removes


async def test_a_job_sees_what_was_installed_before_its_start(bench: Bench, worker: Worker) -> None:
    """Programs that were replaced, added and removed after its init was made, before its start."""
    directory = bench.directory / "bin"
    directory.mkdir()

    def install(name: str, words: str) -> None:
        new = directory / f".{name}"
        new.write_text(f"#!/bin/sh\necho {words}\n")
        new.chmod(0o755)
        new.rename(directory / name)

    install("tool", "old")
    install("gone", "still there")
    look = f"{directory}/tool; {directory}/added; {directory}/gone; cat {directory}/*; true"
    await run(worker, look)
    wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    waited = waiting_inits(bench.state)[2]
    install("tool", "new")
    install("added", "added")
    (directory / "gone").unlink()
    job = await start(worker, ["sh", "-c", f"{look}; exec sleep 100"])
    assert bench.init_pid(job.id) == waited
    await bench.wait_for_output(job.id, b"echo new")
    output = bench.output(job.id).decode()
    assert output.startswith("new\nadded\n")
    assert "still there" not in output
    await worker.stop(job.id, grace_seconds=0)


def pool_of(bench: Bench, watcher: Watcher, oldest_seconds: float) -> tuple[InitPool, Callable[[], None]]:
    """A pool of this process, and what ends it."""
    hello = Hello(
        state_dir=str(bench.state),
        uid_first=1_000_000,
        uid_count=2,
        ceiling=NO_CEILING,
        floor=NO_LIMITS,
        waiting_inits=2,
        hidden_paths=(),
        visible_paths=(),
        operator_files=(),
    )
    bench.state.mkdir(exist_ok=True)
    hierarchy = open_hierarchy(
        instance_name(hello.state_dir), io_devices=[], supervisor_pids=(os.getpid(), os.getppid())
    )
    scratch = Scratch(hello.state_dir)
    images = Images(
        ImageStore(hello.state_dir, scratch.places), Workspaces(hello.state_dir, hello.uid_first), scratch
    )
    policy, departures = Policy.from_hello(hello), Departures(watcher)
    spawner, phases = Spawner(watcher, policy, scratch.directory), Phases()
    pool = InitPool(watcher, policy, hierarchy, scratch, departures, images, phases, spawner, oldest_seconds)

    # the services of other tests among them
    children = Path("/proc/thread-self/children")
    others = set(children.read_text().split())

    def are_collected() -> bool:
        watcher.run_once(0)
        return set(children.read_text().split()) <= others

    def end() -> None:
        pool.close()
        spawner.close()
        wait_for(are_collected)
        hierarchy.release()
        scratch.close()
        watcher.close()

    return pool, end


def given(made: Init | PjwError) -> Init:
    """What a pool gave, which is no error."""
    assert isinstance(made, Init)
    return made


async def test_an_init_that_waits_does_not_grow_old(bench: Bench) -> None:
    """It gives way to a new one, for the same job, for as long as nobody starts one."""
    watcher = Watcher()
    pool, end = pool_of(bench, watcher, oldest_seconds=0.5)
    try:
        pool.take(Launch(1, 1_000_000, NO_LIMITS), lambda made: pool.discard(given(made)))

        def turn() -> dict[int, int]:
            if not watcher.run_once(0 if pool.wants_more else None) and pool.wants_more:
                pool.fill()
            return waiting_inits(bench.state)

        deadline = time.monotonic() + 20
        watcher.call_after(20, lambda: None)
        generations: list[dict[int, int]] = []
        while len(generations) < 3:
            assert time.monotonic() < deadline
            found = turn()
            # that of job 1 is on its way out for a moment
            if sorted(found) == [2, 3] and (
                not generations or not set(found.values()) & set(generations[-1].values())
            ):
                generations.append(found)
    finally:
        end()


# --- B7: what is hidden stays hidden


@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_what_is_hidden_stays_hidden_when_the_host_replaces_it(bench: Bench, kind: str) -> None:
    """A rename over it, also twice, and one after a removal: in a running job and in one that starts then."""
    hidden = bench.directory / "secret"

    def make(path: Path, words: str) -> None:
        if kind == "directory":
            path.mkdir()
        for each in [path / "key"] if kind == "directory" else [path]:
            each.write_text(words)
            each.chmod(0o644)

    def replace(words: str) -> None:
        new = bench.directory / "new"
        make(new, words)
        if kind == "directory":
            hidden.rename(bench.directory / words)
            shutil.rmtree(bench.directory / words)
        new.rename(hidden)

    make(hidden, "first secret")
    worker = await bench.open(hidden_paths=(str(hidden),))
    way_around = f"{bench.directory}/../{bench.directory.name}/secret"
    look = f"[attempt(path) for path in ('{hidden}', '{hidden}/key', '{way_around}')]"
    script = """
def attempt(path):
    try: return open(path).read()
    except OSError as error: return error.errno
"""
    jobs = [
        await start_said(worker, ask(script, look), b"ready"),
        # one that has looked before
        await start_said(worker, ask(f"{script}\n{look}", look), b"ready"),
    ]
    replace("second secret")
    jobs.append(await start_said(worker, ask(f"{script}\n{look}", look), b"ready"))
    replace("third secret")
    if kind == "file":
        hidden.unlink()
        make(hidden, "fourth secret")
    # as much as the kernel gives up of what it knows by name
    Path("/proc/sys/vm/drop_caches").write_text("2")
    for job in jobs:
        found = json.dumps(await answer(bench, worker, job.id))
        assert "secret" not in found
        assert "13" in found


# --- B8: disks that are not to be seen


def has_reformatted(device: str) -> bool:
    """Try it; it fails when anybody still has the disk mounted."""
    return subprocess.run(["mkfs.ext4", "-q", device], stderr=subprocess.DEVNULL, check=False).returncode == 0


async def test_a_disk_can_be_unmounted_and_reformatted_while_jobs_run(bench: Bench, worker: Worker) -> None:
    """Jobs and the inits that wait, made while it was mounted, hold nothing of it, and see nothing of it."""
    with small_disk(16) as disk:
        disk.chmod(0o755)
        disk.parent.chmod(0o755)
        (disk / "file").write_text("words")
        device = do("findmnt", "-no", "SOURCE", disk)
        job = await start_said(worker, f"ls -A {disk}; cat {disk}/file; echo up; exec sleep 100", b"up")
        wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
        assert b"words" not in bench.output(job.id)
        assert b"file\n" not in bench.output(job.id)
        # a loop device would be let go of with the mount
        holder = os.open(device, os.O_RDONLY)
        try:
            do("umount", disk)
            # not at once: an init of whoever else tests here is born with all mounts of the host
            wait_for(lambda: has_reformatted(device))
            do("mount", device, disk)
        finally:
            os.close(holder)
        assert not (disk / "file").exists()
        await worker.stop(job.id, grace_seconds=0)


async def test_what_lies_beneath_a_mount_is_not_uncovered(bench: Bench, worker: Worker) -> None:
    """An operator's mount masks what is under it: a job, which is not shown it, finds nothing."""
    point = bench.directory / "masked"
    point.mkdir()
    (point / "secret").write_text("secret")
    do("mount", "-t", "tmpfs", "-o", "size=64k", "pjw-test", point)
    try:
        assert (await run(worker, f"ls -A {point}; cat {point}/secret 2>&1"))[1].startswith(b"cat: ")
    finally:
        do("umount", point)


# --- visible_paths


async def test_homes_are_not_visible(bench: Bench, worker: Worker) -> None:
    """/home and /srv are empty, whatever the host has there; an operator may show them, or a part of them."""
    with_home = Path("/home") / bench.directory.name
    with_home.mkdir()
    try:
        (with_home / "file").write_text("words")
        with_home.chmod(0o755)
        look = f"ls /home /srv | wc -w; cat {with_home}/file 2>/dev/null || echo none"
        assert (await run(worker, look))[1] == b"2\nnone\n"
        for visible in ("/home", str(with_home)):
            await bench.close(worker)
            worker = await bench.open(visible_paths=(visible,))
            assert (await run(worker, f"cat {with_home}/file; ls /home"))[1].startswith(b"words")
        assert (await run(worker, "ls /home"))[1].decode() == f"{with_home.name}\n"
    finally:
        shutil.rmtree(with_home)


async def test_a_link_that_came_later_leads_nowhere(bench: Bench) -> None:
    """Who owns the directory that the operator shows a part of can show no other one in its place."""
    base = Path("/srv") / bench.directory.name
    home = base / "home"
    shown, secret = home / "shown", home / "secret"
    try:
        for directory in (shown, secret):
            directory.mkdir(mode=0o755, parents=True)
            (directory / "file").write_text(directory.name)
        worker = await bench.open(visible_paths=(str(shown),), waiting_inits=0)
        look = f"cat {shown}/file 2>/dev/null || echo none"
        assert (await run(worker, look))[1] == b"shown"
        shown.rename(home / "moved")
        shown.symlink_to(secret)
        assert (await run(worker, look))[1] == b"none\n"
        # nor keep others from starting jobs
        shown.unlink()
        shown.touch()
        assert (await run(worker, look))[1] == b"none\n"
        home.rename(base / "moved")
        home.touch()
        assert (await run(worker, look))[1] == b"none\n"
        await bench.close(worker)
    finally:
        shutil.rmtree(base)


async def test_what_a_mount_of_the_host_forbids_stays_forbidden(bench: Bench) -> None:
    """Programs of a file system that is mounted noexec cannot be executed by a job either."""
    point = bench.directory / "noexec"
    point.mkdir()
    do("mount", "-t", "tmpfs", "-o", "size=1m,mode=0755,noexec", "pjw-test", point)
    try:
        shutil.copy("/bin/true", point / "program")
        worker = await bench.open(visible_paths=(str(point),))
        _, output = await run(worker, f"{point}/program; echo $?; grep ' {point} ' /proc/self/mountinfo")
        code, words = output.decode().splitlines()[-2:]
        assert code == "126"
        assert " - overlay " in words
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(words.split()[5].split(","))
        await bench.close(worker)
    finally:
        do("umount", point)


async def test_a_visible_disk_is_shown_with_what_is_mounted_in_it(bench: Bench) -> None:
    """Each file system by an overlay of its own, read-only; and the path may be a link."""
    with small_disk(16) as disk:
        disk.parent.chmod(0o755)
        disk.chmod(0o777)
        (disk / "file").write_text("outer")
        (disk / "sub").mkdir()
        do("mount", "-t", "tmpfs", "-o", "size=64k,mode=0755", "pjw-test", disk / "sub")
        link = bench.directory / "link"
        link.symlink_to(disk)
        try:
            (disk / "sub/file").write_text("inner")
            worker = await bench.open(visible_paths=(str(link),))
            _, output = await run(
                worker,
                f"cat {disk}/file {disk}/sub/file {link}/file; touch {disk}/x {disk}/sub/x || echo refused",
            )
            assert output.startswith(b"outerinnerouter")
            assert output.endswith(b"refused\n")
            types = f"grep {disk} /proc/self/mountinfo"
            lines = (await run(worker, types))[1].decode().splitlines()
            assert [" - overlay " in line for line in lines] == [True, True]
            await bench.close(worker)
        finally:
            do("umount", disk / "sub")


async def test_a_file_system_that_can_be_no_layer_is_bound(bench: Bench) -> None:
    """The fallback: read-only, without set-id and devices, as jobs saw it before there were overlays."""
    point = bench.directory / "proc"
    point.mkdir()
    # a mount of procfs is one that overlayfs refuses on every kernel (it has d_revalidate)
    do("mount", "-t", "proc", "-o", "hidepid=2", "pjw-test", point)
    try:
        worker = await bench.open(visible_paths=(str(point),))
        _, output = await run(worker, f"grep '{point} ' /proc/self/mountinfo; cat {point}/version")
        words = output.decode().splitlines()
        assert " - proc " in words[0]
        assert {"ro", "nosuid", "nodev"} <= set(words[0].split()[5].split(","))
        assert words[1].startswith("Linux")
        config = bench.directory / "check.toml"
        config.write_text(f'visible_paths = ["{point}"]\n')
        text = check(config)
        assert f"warning  no overlay is made of {point}: locks, events" in text
        await bench.close(worker)
    finally:
        do("umount", point)


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE in this kernel")
async def test_a_file_system_that_asks_others_who_may_read_it_is_bound(bench: Bench) -> None:
    """FUSE: it is not read as root for jobs. One whose program has died holds up no start."""
    point = bench.directory / "fuse"
    point.mkdir()
    program = os.open("/dev/fuse", os.O_RDWR)
    how = f"fd={program},rootmode=40000,user_id=0,group_id=0"
    try:
        do("mount", "-i", "-t", "fuse", "-o", how, "pjw-test", point, pass_fds=(program,))
    finally:
        os.close(program)
    try:
        worker = await bench.open(visible_paths=(str(point),))
        _, output = await run(worker, f"grep '{point} ' /proc/self/mountinfo; ls {point} 2>&1")
        words = output.decode().splitlines()
        assert " - fuse " in words[0]
        assert words[1].startswith("ls: ")
        await bench.close(worker)
    finally:
        do("umount", point)


async def test_the_command_line_of_init_names_no_path_of_the_host_s(bench: Bench) -> None:
    """/proc/1/cmdline of a job: neither what is hidden, nor what is shown or covered."""
    worker = await bench.open(hidden_paths=("/etc/pjw-hidden",), visible_paths=("/mnt",))
    _, output = await run(worker, ["cat", "/proc/1/cmdline"])
    assert b"pjw-init" in output
    for words in (b"/etc/pjw-hidden", b"/home", b"/mnt"):
        assert words not in output
