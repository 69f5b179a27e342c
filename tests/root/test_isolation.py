"""What a job sees of the host, of other jobs and of pjw: nothing that it should not."""

import errno
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pjw.launcher.policy import JOB_ENVIRONMENT
from pjw.model import ExitStatus, JobSpec, JobState
from pjw.worker import Worker
from tests.support.init_harness import HAS_SYS_RESOURCE
from tests.support.worker_harness import (
    MIB,
    Bench,
    launchers_of,
    open_bench,
    python,
    read_all,
    run,
    run_in_session,
    start,
    start_said,
)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A state directory, and the proof that nothing stays behind."""
    async with open_bench() as bench:
        # readable for all, so that only pjw hides what is in it
        bench.directory.chmod(0o755)
        yield bench


WAY = {"inside": "job"}


@pytest.fixture(params=["job", "session"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `ask` asks: in a job's own command, or in a session of a job."""
    monkeypatch.setitem(WAY, "inside", request.param)
    return str(request.param)


BOTH = pytest.mark.usefixtures("way")


async def ask(worker: Worker, expression: str, client: str = "local", **limits: int) -> Any:
    """What an expression of Python is inside a job; errors of the system are their errno."""
    script = f"""
import ctypes, glob, json, os, resource, signal, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
    try: return function(*arguments)
    except OSError as error: return error.errno
    except ValueError: return None
def read(path):
    with open(path) as file: return file.read()
def write(path, text='x'):
    with open(path, 'w') as file: file.write(text)
print(json.dumps({expression}))
"""
    if WAY["inside"] == "job":
        job, output = await run(worker, python(script), client, **limits)
        assert job.exit_status == ExitStatus(code=0), output
    else:
        assert not limits, "those of a session are its job's"
        status, output, words = await run_in_session(worker, python(script), client)
        assert status == ExitStatus(code=0), words
    return json.loads(output)


CGROUP_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")


@BOTH
async def test_every_namespace_is_the_job_s_own(worker: Worker) -> None:
    """Six namespaces, none of which is the host's."""
    job = await ask(worker, f"{{name: os.readlink(f'/proc/self/ns/{{name}}') for name in {NAMESPACES}}}")
    host = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
    assert [name for name in NAMESPACES if job[name] == host[name]] == []


async def test_jobs_that_run_together_share_no_namespace(bench: Bench, worker: Worker) -> None:
    """The namespaces of two running jobs, even of one client, are different ones."""
    seen = []
    for _ in range(2):
        job = await start(worker, ["sleep", "60"])
        init = bench.init_pid(job.id)
        seen.append({name: os.readlink(f"/proc/{init}/ns/{name}") for name in NAMESPACES})
    assert all(seen[0][name] != seen[1][name] for name in NAMESPACES)


async def test_the_processes_of_the_host_are_not_there(worker: Worker) -> None:
    """/proc shows init and the job's own processes; its PID 1 is init, and no number leads outside."""
    assert await ask(worker, "[sorted(int(p) for p in os.listdir('/proc') if p.isdigit()), os.getpid()]") == [
        [1, 2],
        2,
    ]
    assert await ask(worker, f"attempt(os.kill, {os.getpid()}, 0)") == 3
    assert await ask(worker, "read('/proc/1/comm')") == "pjw-init\n"


@BOTH
async def test_init_is_out_of_reach(worker: Worker) -> None:
    """A job can neither signal nor trace nor look into its init, which is root's."""
    assert await ask(worker, "[attempt(os.kill, 1, n) for n in (0, 2, 9, 15, 18, 19)]") == [1] * 6
    for name in ("root", "cwd", "exe", "fd", "ns/mnt"):
        assert (
            await ask(worker, f"attempt(os.listdir if '{name}' == 'fd' else os.readlink, '/proc/1/{name}')")
            == 13
        )
    for name in ("mem", "environ", "maps"):
        assert await ask(worker, f"attempt(read, '/proc/1/{name}')") in (1, 13)
    assert await ask(worker, "[libc.ptrace(16, 1, 0, 0), ctypes.get_errno()]") == [-1, 1]


@BOTH
async def test_terminals_are_few(worker: Worker) -> None:
    """S7: a job has 16 at most, so that it can neither take the host's nor keep the kernel's threads busy."""
    taken = await ask(worker, "[attempt(os.openpty) for _ in range(17)]")
    assert ([type(pair) for pair in taken[:16]], taken[16]) == ([list] * 16, errno.ENOSPC)


@BOTH
async def test_the_network_is_empty(worker: Worker) -> None:
    """One interface, the loopback, which is up; no way out, and the host's ports are not there."""
    assert await ask(worker, "sorted(os.listdir('/sys/class/net'))") == ["lo"]
    assert await ask(worker, "sorted(name for _, name in socket.if_nameindex())") == ["lo"]
    talk = (
        "(lambda s, c: (s.bind(('127.0.0.1', 0)), s.listen(), c.connect(s.getsockname()), 'connected')[-1])"
    )
    assert await ask(worker, f"{talk}(socket.socket(), socket.socket())") == "connected"
    assert await ask(worker, "socket.socket().connect_ex(('192.0.2.1', 80))") == 101
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert await ask(worker, f"socket.socket().connect_ex({server.getsockname()!r})") == 111
        socket.create_connection(server.getsockname()).close()


@BOTH
async def test_sockets_of_the_host_are_not_there(bench: Bench, worker: Worker) -> None:
    """Abstract sockets belong to the network namespace: the host's cannot be reached."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{bench.directory.name}")
        server.listen()
        assert (
            await ask(worker, f"socket.socket(socket.AF_UNIX).connect_ex('\\0{bench.directory.name}')") == 111
        )
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0{bench.directory.name}")


async def test_the_host_name_is_the_job_s(worker: Worker) -> None:
    """It names the job, and cannot be set."""
    job, output = await run(worker, "hostname; hostname x 2>/dev/null || echo refused")
    assert output == b"job-%d\nrefused\n" % job.id
    assert socket.gethostname() != f"job-{job.id}"


# the home is there and its own; its host has a name with a dot, which some programs ask for
WHO = """
import getpass, grp, os, pwd, socket
entry = pwd.getpwuid(os.getuid())
print(getpass.getuser(), entry.pw_name, grp.getgrgid(os.getgid()).gr_name, entry.pw_dir, entry.pw_gecos)
print(pwd.getpwnam("root").pw_uid, pwd.getpwnam(entry.pw_name) == entry, os.path.samefile(entry.pw_dir, "."))
name = socket.gethostname()
print(socket.gethostbyname(name), socket.getaddrinfo(name, None, flags=socket.AI_CANONNAME)[0][3])
"""


async def test_the_user_and_the_host_of_a_job_have_names(worker: Worker) -> None:
    """`whoami`, `git commit`, `initdb` and their like ask who they are, and where; no other job is named."""
    job, output = await run(worker, ["/usr/bin/python3", "-c", WHO])
    assert output.decode().splitlines() == [
        "pjw-job pjw-job pjw-job /run/job Job of pjw",
        "0 True True",
        f"127.0.1.1 job-{job.id}.localdomain",
    ]
    _, output = await run(worker, "cat /etc/hosts; grep -c pjw-job: /etc/passwd /etc/group; : > /etc/passwd")
    assert re.findall(rb"job-\d+", output) == [b"job-%d" % (job.id + 1)] * 2
    assert output.count(b":1\n") == 2
    assert b"cannot create /etc/passwd: Read-only file system" in output


@BOTH
async def test_the_root_is_read_only(bench: Bench, worker: Worker) -> None:
    """Nothing of the host can be written, also where everybody may: every mount is read-only."""
    open_to_all = bench.directory / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    assert await ask(worker, f"attempt(write, '{open_to_all}/file')") == 30
    assert list(open_to_all.iterdir()) == []
    mounts = [line.split() for line in (await ask(worker, "read('/proc/self/mountinfo')")).splitlines()]
    writable = {mount[4] for mount in mounts if "rw" in mount[5].split(",")}
    assert writable == {"/run/job", "/tmp", "/var/tmp", "/dev/shm", "/dev/pts", "/proc"}
    assert all({"nosuid"} & set(mount[5].split(",")) for mount in mounts)


@BOTH
async def test_home_and_tmp_are_the_job_s_own(bench: Bench, worker: Worker) -> None:
    """Both may be written and begin empty; no other job sees what is in them, not even the same client's."""
    job = await start_said(
        worker, "echo x > $HOME/home; echo x > /tmp/tmp; echo x > /dev/shm/shm; echo ok; exec sleep 60", b"ok"
    )
    look = "[sorted(os.listdir(path)) for path in (os.environ['HOME'], '/tmp', '/var/tmp', '/dev/shm')]"
    assert await ask(worker, look) == [[], [], [], []]
    assert await ask(worker, look, client="other") == [[], [], [], []]
    assert await ask(worker, "[os.getcwd(), os.environ['HOME']]") == ["/run/job"] * 2
    assert [path.name for path in (bench.state / "scratch" / str(job.id)).iterdir()] == ["home"]
    assert not Path("/tmp/tmp").exists()
    assert not Path("/dev/shm/shm").exists()


@BOTH
async def test_dev_is_minimal(worker: Worker) -> None:
    """A few harmless devices, no disk, no memory, no console; and none can be made."""
    names = await ask(worker, "sorted(os.listdir('/dev'))")
    assert set(names) <= {
        *(
            "fd",
            "full",
            "null",
            "ptmx",
            "pts",
            "random",
            "shm",
            "stderr",
            "stdin",
            "stdout",
            "tty",
            "urandom",
            "zero",
        )
    }
    assert await ask(worker, "attempt(os.mknod, '/tmp/disk', 0o60666, os.makedev(254, 0))") == 1
    assert await ask(worker, "attempt(write, '/dev/null')") is None
    assert await ask(worker, "attempt(write, '/dev/full')") == 28


@BOTH
async def test_users(bench: Bench, worker: Worker) -> None:
    """Two clients have two users, one client one; none is root, has groups, or can become another."""
    look = "[os.getresuid(), os.getresgid(), os.getgroups()]"
    one, again, other = [await ask(worker, look, client=client) for client in ("one", "one", "other")]
    first = bench.settings.uid_first
    assert one == again == [[first] * 3, [first] * 3, []]
    assert other == [[first + 1] * 3, [first + 1] * 3, []]
    for attempt in ("os.setuid, 0", f"os.setuid, {first + 1}", "os.setgid, 0", "os.setgroups, [0]"):
        assert await ask(worker, f"attempt({attempt})", client="one") == 1


@BOTH
async def test_privileges_are_gone(worker: Worker) -> None:
    """No capability in any set, no_new_privs, no core files, and setuid programs have no effect."""
    status = dict(
        line.split(":\t", 1) for line in (await ask(worker, "read('/proc/self/status')")).splitlines()
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert await ask(worker, "resource.getrlimit(resource.RLIMIT_CORE)") == [1, 1]
    assert (await run(worker, "su root -c id 2>&1 < /dev/null"))[1].find(b"uid=0") == -1
    assert await ask(worker, "[libc.unshare(0x00020000), ctypes.get_errno()]") == [-1, 1]
    assert await ask(worker, "[libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), ctypes.get_errno()]") == [-1, 1]


async def test_signals_start_as_they_should(worker: Worker) -> None:
    """Nothing is blocked or ignored, whatever the worker's own process does with its signals."""
    status = dict(
        line.split(":\t", 1) for line in (await ask(worker, "read('/proc/self/status')")).splitlines()
    )
    assert int(status["SigBlk"], 16) == 0
    _, output = await run(worker, "grep SigIgn /proc/self/status")
    # 32 and 33 are glibc's own: its posix_spawn(3) leaves them ignored, and no program may change them
    assert int(output.split()[1], 16) & ~0x180000000 == 0


async def test_descriptors(worker: Worker) -> None:
    """Three of them: nothing, and the output twice; no socket, no cgroup, no file of pjw."""
    _, output = await run(worker, "ls -l /proc/self/fd | sed -n 's/.* \\([0-9]*\\) -> /\\1 /p'")
    found = dict(line.split(" ", 1) for line in output.decode().splitlines())
    del found["3"]  # ls itself, reading the directory
    assert found.keys() == {"0", "1", "2"}
    assert found["0"] == "/dev/null"
    # ls writes to a pipe of the shell
    assert found["2"].startswith("pipe:")
    opened = "[int(n) for n in os.listdir('/proc/self/fd') if attempt(os.fstat, int(n)) != 9]"
    own = f"[[n, stat.S_ISFIFO(os.fstat(n).st_mode)] for n in sorted({opened})]"
    assert await ask(worker, own) == [[0, False], [1, True], [2, True]]


async def test_the_environment_is_the_documented_one(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly these variables, and none of the worker's."""
    monkeypatch.setenv("PJW_SERVER_KEY", "secret")
    expected = {**JOB_ENVIRONMENT, "PJW_JOB_ID": "1"}
    _, output = await run(worker, ["env", "-0"])
    assert dict(word.split("=", 1) for word in output.decode().rstrip("\0").split("\0")) == expected


async def test_temporary_files_are_on_the_disk(worker: Worker) -> None:
    """More of them than /tmp, which is memory, could hold; a client's own TMPDIR wins."""
    script = "f=$(mktemp); head -c 40M /dev/zero >$f; echo ${f%/*}; stat -c %s $f; echo >/tmp/x || :"
    job = await worker.start(JobSpec(script, {"memory_max_bytes": 64 * MIB}))
    assert (await read_all(worker, job.id)).decode().split() == ["/run/job", str(40 * MIB)]
    job = await worker.start(JobSpec(("mktemp", "-u"), env={"TMPDIR": "/var/tmp"}))
    assert (await read_all(worker, job.id)).startswith(b"/var/tmp/")


@BOTH
async def test_the_state_is_invisible(bench: Bench, worker: Worker) -> None:
    """Nothing in the state directory, not even a name, whoever asks; nor by way of a link."""
    (bench.directory / "link").symlink_to(bench.state)
    job, _ = await run(worker, "echo secret output")
    for path in (bench.state, bench.directory / "link"):
        assert await ask(worker, f"attempt(os.listdir, '{path}')") == 13
        for name in ("jobs.sqlite", f"jobs/{job.id}/output", "scratch", "launcher.lock"):
            assert await ask(worker, f"attempt(read, '{path}/{name}')") == 13


@BOTH
async def test_hidden_paths_are_hidden(bench: Bench) -> None:
    """A key, readable for all by mistake, and a directory: neither can be read or listed in a job."""
    key, directory = bench.directory / "server.key", bench.directory / "keys"
    key.write_text("secret")
    key.chmod(0o644)
    directory.mkdir()
    (directory / "ca.key").write_text("secret")
    link = bench.directory / "link.key"
    link.symlink_to(key)
    missing = bench.directory / "missing"
    worker = await bench.open(hidden_paths=(str(key), str(directory), str(missing)))
    for path in (key, link, directory / "ca.key"):
        assert await ask(worker, f"attempt(read, '{path}')") == 13
    assert await ask(worker, f"attempt(os.listdir, '{directory}')") == 13
    assert key.read_text() == "secret"


@BOTH
async def test_other_jobs_are_out_of_reach(bench: Bench, worker: Worker) -> None:
    """No job, another client's or the same one's, can be signalled; kill -1 ends only oneself."""
    victims = [await start(worker, ["sleep", "60"], client=client) for client in ("same", "other")]
    pids = bench.processes()
    assert len(pids) == 2
    for pid in (*pids, *launchers_of(os.getpid())):
        assert await ask(worker, f"attempt(os.kill, {pid}, 9)", client="same") == 3
    await run(worker, "kill -9 -1", client="same")
    for victim in victims:
        assert (await worker.get(victim.id)).state is JobState.RUNNING


@BOTH
async def test_limits_cannot_be_lifted(worker: Worker) -> None:
    """The job sees no cgroup file that it could write, neither its own nor any."""
    places = "glob.glob('/sys/fs/cgroup/*')"
    outcomes = f"sorted({{attempt(write, path) for path in {places}}})"
    # EROFS, whatever the modes are
    assert await ask(worker, outcomes) == ([30] if CGROUP_V2 else [])
    assert await ask(worker, "glob.glob('/proc/*/cgroup.procs')") == []
    assert set(
        await ask(worker, "[line.split(':', 2)[2] for line in read('/proc/self/cgroup').splitlines()]")
    ) <= {
        "/",
        *(line.rstrip("\n").split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()),
    }
    assert await ask(worker, "attempt(write, '/proc/self/oom_score_adj', '-1000')") in (1, 13)
    if HAS_SYS_RESOURCE:
        assert await ask(worker, "attempt(write, '/proc/self/oom_score_adj', '499')") in (1, 13)
    assert await ask(worker, "attempt(write, '/proc/self/oom_score_adj', '500')") is None
    assert await ask(worker, "attempt(os.nice, -5)") in (1, 13)


@pytest.mark.skipif(not CGROUP_V2, reason="on cgroup v1 a job does not see its cgroups")
async def test_a_job_sees_its_own_limits(worker: Worker) -> None:
    """Its cgroup, and no other: as the root of the only hierarchy, where runtimes look for it."""
    seen = await ask(
        worker,
        "[read('/proc/self/cgroup'), [read('/sys/fs/cgroup/' + name) for name in ('memory.max', 'cpu.max')],"
        " os.listdir('/sys/fs/cgroup/..'), [name for name in os.listdir('/sys/fs/cgroup')"
        " if os.path.isdir('/sys/fs/cgroup/' + name)],"
        " [line.split()[3] for line in open('/proc/self/mountinfo') if ' /sys/fs/cgroup ' in line],"
        " read('/sys/fs/cgroup/cgroup.procs').split()]",
        memory_max_bytes=128 * 1024**2,
        cpu_max_millicores=500,
    )
    assert seen == ["0::/\n", [f"{128 * 1024**2}\n", "50000 100000\n"], ["cgroup"], [], ["/"], ["1", "2"]]


@BOTH
async def test_sys_and_proc_cannot_be_written(worker: Worker) -> None:
    """/sys is read-only; what of /proc/sys is writable for root is not for the job."""
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname"):
        # ENOENT: not every kernel has a sysrq
        assert await ask(worker, f"attempt(write, '{path}')") in (1, 2, 13, 30)
    assert await ask(worker, "attempt(write, '/sys/kernel/uevent_helper')") in (2, 13, 30)
    assert await ask(worker, "attempt(os.mkdir, '/sys/fs/cgroup/x')") in (1, 2, 13, 30)


async def test_a_hostile_scratch_directory_cannot_aim_its_removal(bench: Bench, worker: Worker) -> None:
    """Links, a tree of mode 0000, deep and strange names: all is removed, and nothing that they point to."""
    target = bench.directory / "target"
    target.mkdir()
    (target / "file").write_text("kept")
    script = (
        f"ln -s {target} link; ln -s {target}/file file; mkdir -p closed/in; touch closed/in/file; "
        "i=0; while [ $i -lt 60 ]; do mkdir -p deep && cd deep; i=$((i+1)); done; cd $HOME; "
        "touch -- '-rf' '..x' 'new\nline'; mkfifo fifo; chmod 0 closed/in closed; chmod 0 .; echo made"
    )
    job, output = await run(worker, script)
    assert (output, job.exit_status) == (b"made\n", ExitStatus(code=0))
    assert (target / "file").read_text() == "kept"
    bench.check_nothing_remains()


async def test_a_job_s_processes_belong_to_it_alone(bench: Bench, worker: Worker) -> None:
    """Seen from the host: init is root's, the command the client's, all of them in the job's cgroup."""
    job = await start(worker, ["sleep", "60"])
    init = bench.init_pid(job.id)
    (command,) = bench.processes()
    for cgroup in bench.cgroups(job.id):
        assert sorted((cgroup / "cgroup.procs").read_text().split()) == sorted([str(init), str(command)])
    status = Path(f"/proc/{init}/status").read_text()
    assert "\nUid:\t0\t0\t0\t" in status
    assert "\nNoNewPrivs:\t1\n" in status
