"""pjw-init against the real kernel: what a job is given, what it must not get, and how it ends."""

import array
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.launcher.processes import INIT_SIGNAL_FIRST
from tests.support.init_harness import (
    COMMAND_MAX_BYTES,
    ENVIRONMENT,
    HAS_SYS_RESOURCE,
    JOB_UID,
    Harness,
    Inotify,
    processes_of,
    small_tmpfs,
    wait_readable,
)


@pytest.fixture
def scratch(visible: Path) -> Path:
    """A scratch directory as the launcher makes it."""
    path = visible / "scratch"
    path.mkdir(mode=0o700)
    os.chown(path, JOB_UID, JOB_UID)
    return path


def test_reports_and_status_tell_the_whole_life(init: Harness) -> None:
    """The launcher hears `cloned`, then `execed` with the time that the status file has too."""
    job = init.run("true")
    cloned, execed = job.reports
    started, ended = job.status
    assert cloned == "cloned"
    assert execed == f"execed {started[1]}"
    assert started[0] == "started"
    assert int(started[1]) <= int(ended[1])
    assert job.end == "exited 0 none"
    assert job.exit_code == 0


def test_every_exit_code_is_recorded(init: Harness) -> None:
    """Each arrives as itself, in all of its eight bits; also those that shells and pjw have a meaning for."""
    codes = [0, *(1 << bit for bit in range(8)), 125, 126, 127, 129, 130, 137, 143, 254, 255]
    ends = [init.run("/bin/sh", "-c", f"exit {code}").end for code in codes]
    assert ends == [f"exited {code} none" for code in codes]


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 11, 13, 15, 34, 64])
def test_an_end_by_signal_is_not_an_exit_code(init: Harness, number: int) -> None:
    """A command that a signal ends is recorded with that signal."""
    assert init.sh(f"kill -{number} $$").end == f"signaled {number} none"


def test_exec_errors_are_reported_with_their_errno(init: Harness, scratch: Path) -> None:
    """What cannot be executed is an error of the start, and leaves no record."""
    for name, content in {"no-format": "echo hi\n", "no-interpreter": "#!/no/such\n"}.items():
        (scratch / name).write_text(content)
        (scratch / name).chmod(0o755)
    expected = {
        "no-such-program": errno.ENOENT,
        "/no/such/program": errno.ENOENT,
        "/etc/passwd": errno.EACCES,
        "/etc/passwd/x": errno.ENOTDIR,
        "/run/job": errno.EACCES,
        "./no-format": errno.ENOEXEC,
        "./no-interpreter": errno.ENOENT,
    }
    for program, error in expected.items():
        job = init.run(program, options=("--scratch", str(scratch)))
        assert job.reports == ["cloned", f"failed exec {error}"], program
        assert job.status == []
        assert job.exit_code == (127 if error == errno.ENOENT else 126)


def test_path_search_goes_on_after_what_cannot_be_executed(init: Harness, visible: Path) -> None:
    """A name is searched as execvp(3) does: EACCES counts only when nothing later can be executed."""
    for name in ("first", "second"):
        (visible / name).mkdir()
    (visible / "first/tool").write_text("")
    path = f"/no/such:{visible}/first:{visible}/second"
    denied = init.run("tool", environment={"PATH": path})
    (visible / "second/tool").write_text("#!/bin/sh\necho second")
    (visible / "second/tool").chmod(0o755)
    found = init.run("tool", environment={"PATH": path})
    assert denied.reports[-1] == f"failed exec {errno.EACCES}"
    assert found.text == "second\n"
    assert init.run("echo", "no PATH", environment={}).text == "no PATH\n"


def test_a_failed_step_is_reported_by_name(init: Harness, tmp_path: Path) -> None:
    """A step of the set-up that fails says which one it was."""
    job = init.run("true", options=("--scratch", str(tmp_path / "missing")))
    assert job.reports == ["cloned", f"failed open-scratch {errno.ENOENT}"]
    assert job.operation == f"open the scratch directory {tmp_path}/missing"
    assert job.exit_code == 125


def test_a_failing_subject_may_be_any_bytes(init: Harness, tmp_path: Path) -> None:
    """A path with spaces, newlines and no text in it is one subject (R2); a long one is cut short."""
    odd = os.fsdecode(b"/a b\nfailed exec 2\xff")
    job = init.run("true", options=("--scratch", odd))
    assert job.reports == ["cloned", f"failed open-scratch {errno.ENOENT}"]
    assert job.operation == "open the scratch directory /a b\nfailed exec 2\\xff"
    long = init.run("true", options=("--scratch", "/long" * 500))
    assert long.reports == ["cloned", f"failed open-scratch {errno.ENOENT}"]
    assert 400 < len(long.operation) < 512


def test_every_namespace_is_its_own(init: Harness) -> None:
    """A job shares none of the host's namespaces that pjw promises to make."""
    job = init.sh("cd /proc/self/ns; for n in cgroup ipc mnt net pid uts; do readlink $n; done")
    ours = {os.readlink(f"/proc/self/ns/{name}") for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts")}
    theirs = set(job.text.split())
    assert len(theirs) == 6
    assert not ours & theirs


def test_the_network_is_loopback_and_up(init: Harness) -> None:
    """A job can talk to itself by 127.0.0.1 and sees no other interface."""
    job = init.python(
        "import os, socket\n"
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())\n"
        "print(os.listdir('/sys/class/net'), [name for _, name in socket.if_nameindex()])"
    )
    assert job.text == "['lo'] ['lo']\n"


def test_proc_shows_only_the_job(init: Harness) -> None:
    """The only processes in /proc are init and the command."""
    job = init.python("import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))")
    assert job.text == "[1, 2]\n"


def test_the_host_is_read_only(init: Harness, visible: Path) -> None:
    """Not even a directory that is open to all can be written to, and no mount honours setuid."""
    visible.chmod(0o777)
    job = init.python(
        "import os\n"
        f"for path in ('/', '/usr', '/etc', '/var', '/run', '/dev', '/dev/..', {str(visible)!r}):\n"
        "    try: os.mkdir(path + '/x')\n"
        "    except OSError as error: print(error.errno)\n"
        "    else: print('written', path)\n"
        "print(open('/proc/self/mountinfo').read())"
    )
    *errors, mounts = job.text.split("\n", 8)
    assert errors == [str(errno.EROFS)] * 8
    rows = [line.split() for line in mounts.splitlines() if line]
    # the last mount at a path is the one that is seen, and each one seen must be in this list to be writable
    options = {row[4]: set(row[5].split(",")) for row in rows}
    writable = {path for path, flags in options.items() if "rw" in flags}
    assert writable == {"/run/job", "/tmp", "/var/tmp", "/dev/shm", "/dev/pts", "/proc"}
    assert all("nosuid" in flags for flags in options.values())
    assert all("nodev" in flags for path, flags in options.items() if path not in ("/dev", "/dev/pts"))


def test_tmp_is_private(init: Harness) -> None:
    """/tmp is empty, writable, of the asked size, and the host's is another."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as ours:
        job = init.sh(
            "ls -A /tmp; echo hi > /tmp/x; cat /var/tmp/x; df -k --output=size /tmp",
            options=("--tmp-bytes", "65536"),
        )
        assert Path(ours.name).exists()
    assert job.text.split() == ["hi", "1K-blocks", "64"]
    full = init.sh("head -c 100000 /dev/zero > /tmp/x; wc -c < /tmp/x", options=("--tmp-bytes", "65536"))
    assert full.text.splitlines()[-1] == "65536"


def test_what_is_in_memory_has_one_limit(init: Harness) -> None:
    """What fills /tmp leaves nothing for /dev/shm; they are two directories, open to all."""
    job = init.sh(
        "head -c 100000 /dev/zero 2> /dev/null > /tmp/x; wc -c < /tmp/x; (echo x > /dev/shm/y) 2> /dev/null"
        " || echo full; rm /tmp/x; echo x > /dev/shm/y; cat /dev/shm/y; ls -A /tmp;"
        " stat -c %U:%a /tmp /var/tmp /dev/shm",
        options=("--tmp-bytes", "65536"),
    )
    assert job.text.split() == ["65536", "full", "x", *["root:1777"] * 3]


def test_a_job_has_few_file_systems(init: Harness, scratch: Path) -> None:
    """Two in memory, of which every path shows its own part, and one each of /proc, /sys and /dev/pts.

    What each is made in stays covered: no two paths show the same directory but /tmp and /var/tmp.
    """
    job = init.python(
        "import json, os\n"
        "rows = [line.split() for line in open('/proc/self/mountinfo')]\n"
        "shown = {row[4]: (row[2], row[3]) for row in rows}\n"
        "own = ['/run', '/tmp', '/var/tmp', '/dev', '/dev/shm', '/dev/pts', '/proc', '/sys']\n"
        "own += ['/sys/class/net']\n"
        "seen = {path: [*os.lstat(path)[1:3], sorted(os.listdir(path))] for path in own}\n"
        "print(json.dumps([{path: shown[path] for path in own}, seen]))",
        options=("--scratch", str(scratch)),
    )
    shown, seen = json.loads(job.text)
    assert len({device for device, _ in shown.values()}) == 5
    assert {path: root for path, (_, root) in shown.items() if root != "/"} == {
        "/run": "/run",
        "/dev": "/dev",
        "/sys": "/sys",
        "/tmp": "/tmp",
        "/var/tmp": "/tmp",
        "/dev/shm": "/shm",
        "/sys/class/net": "/class/net",
    }
    assert len({tuple(state[:2]) for state in seen.values()}) == len(seen) - 1
    assert seen["/run"][2] == [".hidden", ".hidden-directory", "job", "workspace"]
    assert [seen[path][2] for path in ("/tmp", "/var/tmp", "/dev/shm")] == [[], [], []]
    assert set(seen["/sys"][2]) <= {"class", "devices", "kernel"}


def test_home_is_the_scratch_directory(init: Harness, scratch: Path) -> None:
    """What a job writes at home is on the host's disk, in its scratch directory, and nowhere else."""
    job = init.sh("pwd; echo data > result; stat -c %U:%a .", options=("--scratch", str(scratch)))
    assert job.text.split() == ["/run/job", "pjw-job:700"]
    assert (scratch / "result").read_text() == "data\n"
    assert (scratch / "result").stat().st_uid == JOB_UID


def test_home_without_a_scratch_directory(init: Harness) -> None:
    """Without --scratch, home is writable as well and ends with the job."""
    assert init.sh("echo data > result; cat result; pwd").text == "data\n/run/job\n"


def test_hidden_paths_are_unreadable(init: Harness, visible: Path, scratch: Path) -> None:
    """A hidden directory, file or link target cannot be read, and a missing path is no error."""
    (visible / "directory").mkdir()
    (visible / "directory/key").write_text("secret")
    (visible / "file").write_text("secret")
    (visible / "target").write_text("secret")
    (visible / "link").symlink_to(visible / "target")
    hidden = [str(visible / name) for name in ("directory", "file", "link", "missing")]
    # the scratch directory goes on working when its parent is hidden: the launcher hides the state directory
    options = [word for path in (*hidden, str(visible / "scratch")) for word in ("--hide", path)]
    options += ("--scratch", str(scratch))
    job = init.sh(
        f"cd {visible}; cat directory/key; ls directory; cat file; cat target; echo x > file; cat missing;"
        " echo x > ~/ok",
        options=options,
    )
    assert "secret" not in job.text
    assert job.text.count("Permission denied") == 4
    assert (scratch / "ok").exists()
    assert (visible / "file").read_text() == "secret"


def test_what_is_shown_and_what_is_covered(init: Harness, visible: Path) -> None:
    """By an overlay, as it is, or not; in what is covered too; what is not there is passed over."""
    for name in ("covered/shown", "covered/bound"):
        (visible / name).mkdir(parents=True)
        (visible / name / "file").write_text(f"{name} ")
    options = ["--cover", f"{visible}/covered", "--bound", f"{visible}/covered/bound"]
    options += [
        "--visible",
        f"{visible}/covered/shown",
        "--visible",
        f"{visible}/none",
        "--cover",
        "/none/such",
    ]
    job = init.sh(
        f"cd {visible}/covered; echo *; cat */file; touch {{.,shown,bound}}/x 2>/dev/null || echo read-only;"
        f" grep -c '{visible}/covered/shown .* - overlay ' /proc/self/mountinfo;"
        f" grep -c '{visible}/covered/bound .* - overlay ' /proc/self/mountinfo",
        options=options,
    )
    assert job.text == "bound shown\ncovered/bound covered/shown read-only\n1\n0\n"


def test_a_user_namespace_uncovers_nothing(init: Harness, visible: Path) -> None:
    """With namespaces of its own a process in a job cannot take away what covers the host's files.

    The system call filter denies it those namespaces. This is what holds without: an unfiltered process that
    joins the job's mounts from outside.
    """
    possible = subprocess.run(["unshare", "-Ur", "true"], capture_output=True, text=True, check=False)
    if possible.returncode:
        pytest.skip(f"no user namespace can be made here, as in a chroot: {possible.stderr}")
    (visible / "key").write_text("secret")
    visible.chmod(0o777)
    job = init.start("sleep", "1000", options=("--hide", str(visible)))
    script = (
        f"umount {visible}; umount -l {visible}; umount /proc; umount /run; umount -l /;"
        f" mkdir /tmp/m; mount --bind /var /tmp/m; mount --bind /var/lib /tmp/m; mount -o remount,rw /;"
        f" mount -o remount,bind,rw {visible}; cat {visible}/key;"
        f" cat /tmp/m/lib/{visible.name}/key /tmp/m/{visible.name}/key;"
        f" touch {visible}/x /etc/x; echo done as $(id -u)"
    )
    enter = [
        "nsenter",
        f"--target={job.pid}",
        "--mount",
        "--pid",
        f"--setuid={JOB_UID}",
        f"--setgid={JOB_UID}",
    ]
    command = [*enter, "unshare", "-Urm", "sh", "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert "secret" not in done.stdout
    assert done.stdout == "done as 0\n", done.stderr
    assert list(visible.iterdir()) == [visible / "key"]


def test_nothing_of_the_host_lies_below_the_root(init: Harness) -> None:
    """Whoever may change its root finds no way to the template, which stays below a job's root.

    No process of a job may. This is what holds without: root without a filter, who joins the job's mounts.
    """
    job = init.start("sleep", "1000", options=("--visible", "/", "--visible", "/usr"))
    climb = (
        "import os\n"
        "top = os.open('/', os.O_RDONLY); os.chroot('/tmp'); os.fchdir(top)\n"
        "for _ in range(20): os.chdir('..')\n"
        "print(os.path.samestat(os.stat('.'), os.fstat(top)))"
    )
    enter = ["nsenter", f"--target={job.pid}", "--mount", "/usr/bin/python3", "-I", "-S", "-c", climb]
    done = subprocess.run(enter, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True\n"


def test_no_descriptor_leaks_into_the_job(init: Harness) -> None:
    """A command has standard input, output and error and nothing else, whatever its launcher had open."""
    with tempfile.TemporaryFile() as stray:
        job = init.python(
            "import os\n"
            "for fd in range(os.sysconf('SC_OPEN_MAX')):\n"
            "    try: print(fd, os.readlink(f'/proc/self/fd/{fd}').split(':')[0])\n"
            "    except FileNotFoundError: pass",
            pass_fds=(stray.fileno(),),
        )
    assert job.text.splitlines() == ["0 /dev/null", "1 pipe", "2 pipe"]


def test_init_holds_no_descriptor_of_its_callers(init: Harness) -> None:
    """With a launcher, init keeps none of its standard descriptors and not the report socket."""
    job = init.start("sleep", "1000")
    links = [os.readlink(f"/proc/{job.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{job.pid}/fd")]
    kinds = {link.split(":")[0] for link in links}
    files = {str(path) for path in (job.output_path, job.status_path, job.times_path)}
    assert kinds == {"/dev/null", "pipe", "anon_inode"} | files
    assert sum(link.startswith("pipe") for link in links) == 1


def test_a_command_has_no_privilege(init: Harness) -> None:
    """No capabilities, no groups, no_new_privs, no core files, and clean signals and umask."""
    # cat itself, and no shell, which would reset its signals
    status = dict(line.split(":\t", 1) for line in init.run("cat", "/proc/self/status").text.splitlines())
    assert {
        name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    } == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert {name: int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")} == {
        "SigBlk": 0,
        "SigIgn": 0,
        "SigCgt": 0,
    }
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"] == status["Gid"] == "\t".join([str(JOB_UID)] * 4)
    assert status["Groups"].split() == []
    assert init.sh("ulimit -c; ulimit -Hc; umask").text.split() == ["0", "0", "0022"]
    assert init.python("import os; print(os.getsid(0), os.getpgrp(), os.getpid())").text == "2 2 2\n"


def test_init_keeps_only_kill(init: Harness) -> None:
    """init itself lives on with CAP_KILL and nothing else, and cannot gain more."""
    job = init.start("sleep", "1000")
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{job.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    kill = 1 << 5
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [
        0,
        kill,
        kill,
        kill,
        0,
    ]
    assert status["NoNewPrivs"] == "1"


def test_setuid_programs_gain_nothing(init: Harness, visible: Path) -> None:
    """A setuid-root program runs as the job's own uid."""
    shutil.copy("/usr/bin/id", visible / "id")
    (visible / "id").chmod(0o6755)
    assert init.run(str(visible / "id"), "-u").text == f"{JOB_UID}\n"


def test_the_environment_is_exactly_what_was_given(init: Harness) -> None:
    """init adds nothing to the environment and takes nothing away."""
    environment = {"PATH": "/usr/bin", "A": "1 2", "EMPTY": "", "PJW_JOB_ID": "7"}
    job = init.run("env", "-0", environment=environment)
    assert dict(entry.split("=", 1) for entry in job.text.split("\0")[:-1]) == environment


def test_arguments_arrive_unchanged(init: Harness) -> None:
    """Every argument arrives byte for byte: empty, spaced, with newlines, up to the kernel's limit."""
    words = ["", "a b", "--", "new\nline", "é", "x" * 131_071]
    job = init.run("printf", "%s\\0", *words)
    assert job.text.split("\0")[:-1] == words


LINE = f"pjw-job:x:{JOB_UID}:{JOB_UID}:Job of pjw:/run/job:/bin/sh\n"


@pytest.mark.parametrize(
    ("theirs", "mode", "shown"),
    [
        ("root:x:0:0::/:/bin/sh\n", 0o644, "root:x:0:0::/:/bin/sh\n"),
        ("cut:x:1:1::/:/bin/sh", 0o644, "cut:x:1:1::/:/bin/sh\n"),
        ("", 0o644, ""),
        ("secret:hash:2:2::/:/bin/sh\n", 0o600, ""),
        ("x" * 262_145, 0o644, ""),
    ],
    ids=["as usual", "without a newline", "empty", "closed to others", "large"],
)
def test_the_users_are_the_host_s_and_the_job_s(
    init: Harness, scratch: Path, theirs: str, mode: int, shown: str
) -> None:
    """Whatever the host's passwd(5) is, and also when the host replaces it while the job runs."""
    etc = init.directory / "etc"
    etc.mkdir()
    (etc / "passwd").write_text(theirs)
    (etc / "passwd").chmod(mode)
    os.mkfifo(scratch / "go")
    os.chown(scratch / "go", JOB_UID, JOB_UID)
    # the host is a mount namespace of our own, with another /etc
    host = 'mount --bind "$1" /etc && shift && exec "$@"'
    options = ("--visible", "/", "--visible", "/etc", "--scratch", str(scratch))
    script = "cat /etc/passwd go /etc/passwd; ls /etc"
    command = [
        *("unshare", "--mount", "sh", "-c", host, "host", str(etc), str(init.binary), "--uid", str(JOB_UID)),
        *("--gid", str(JOB_UID), *options, "--", "/bin/sh", "-c", script),
    ]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as host_process:
        # who opens the FIFO waits for the job, which has shown the file by then
        with (scratch / "go").open("w"):
            (etc / "other").write_text("other:x:3:3::/:/bin/sh\n")
            (etc / "other").rename(etc / "passwd")
        assert host_process.stdout is not None
        assert host_process.stdout.read() == (shown + LINE) * 2 + "passwd\n"


def test_the_host_name_is_the_jobs(init: Harness) -> None:
    """--hostname names the job's own host."""
    ours = os.uname().nodename
    assert init.run("uname", "-n", options=("--hostname", "job-7")).text == "job-7\n"
    assert os.uname().nodename == ours


def test_oom_score_cannot_be_lowered(init: Harness) -> None:
    """S5: a command is at oom_score_adj 500, and cannot have the OOM killer take others first."""
    job = init.sh(
        "cat /proc/self/oom_score_adj;"
        " for score in 600 500 499 0 -1; do echo $score > /proc/$$/oom_score_adj; done;"
        " cat /proc/$$/oom_score_adj"
    )
    assert job.text.split()[0] == "500"
    # the least (oom_score_adj_min) can be set by CAP_SYS_RESOURCE alone
    assert job.text.split()[-1] == ("500" if HAS_SYS_RESOURCE else "0")


def test_init_is_out_of_the_jobs_reach(init: Harness) -> None:
    """A job cannot signal, trace or look into its init."""
    job = init.python(
        "import ctypes, os, signal\n"
        "def attempt(action, *arguments):\n"
        "    try: action(*arguments)\n"
        "    except PermissionError: print('refused')\n"
        "    else: print('done', action, arguments)\n"
        "for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGQUIT, 0):\n"
        "    attempt(os.kill, 1, number)\n"
        "for name in ('root', 'cwd', 'exe'): attempt(os.readlink, '/proc/1/' + name)\n"
        "for name in ('fd', 'map_files'): attempt(os.listdir, '/proc/1/' + name)\n"
        "for name in ('environ', 'mem', 'maps', 'stack'): attempt(open, '/proc/1/' + name)\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for request in (16, 0x4206):\n"
        "    print('refused' if libc.ptrace(request, 1, None, None) < 0 else 'traced')"
    )
    assert job.text.split() == ["refused"] * 16
    assert job.end == "exited 0 none"


def test_the_session_keyring_is_the_jobs_own(init: Harness) -> None:
    """A job possesses no keyring of its launcher's: each gets one of its own."""
    # not by keyctl(2), which a job is denied
    sessions = [
        [line.split()[0] for line in init.run("cat", "/proc/keys").text.splitlines() if " _ses" in line]
        for _ in range(2)
    ]
    assert [len(keys) for keys in sessions] == [1, 1]
    assert sessions[0] != sessions[1]


def test_a_command_that_asks_init_to_trace_it_goes_on(init: Harness) -> None:
    """Its stops are no ends: before this was told apart, the first one ended the job with a false status."""
    job = init.python(
        "import ctypes, subprocess; ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n"
        "subprocess.run(['true']); print('x')"
    )
    assert (job.end, job.text) == ("exited 0 none", "x\n")


def test_orphans_are_reaped(init: Harness) -> None:
    """What outlives its parent becomes init's child and is reaped at its end."""
    job = init.python(
        "import os, time\n"
        "for _ in range(50):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: os._exit(0)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "deadline = time.monotonic() + 30\n"
        "left = None\n"
        "while left != [1, 2] and time.monotonic() < deadline:\n"
        "    left = sorted(int(n) for n in os.listdir('/proc') if n.isdigit())\n"
        "print(left)"
    )
    assert job.text == "[1, 2]\n"


def test_daemons_end_with_the_command(init: Harness) -> None:
    """A daemon that left its session and holds the output delays nothing and does not survive."""
    job = init.sh(
        "(setsid sleep 1000 &); setsid sleep 1000 & (trap '' TERM HUP INT; sleep 1000) & echo up; exit 3"
    )
    assert job.end == "exited 3 none"
    assert job.text == "up\n"
    assert processes_of(JOB_UID) == []


def test_terminate_reaches_every_process(init: Harness, scratch: Path) -> None:
    """SIGTERM to init is SIGTERM to all of the job, whatever session it is in."""
    script = "trap 'echo ended; exit 0' TERM; echo up; while :; do sleep 1000 & wait $!; done"
    job = init.start(
        "/bin/sh", "-c", f'trap "wait; exit 5" TERM; setsid sh -c "{script}" & setsid sh -c "{script}" & wait'
    )
    job.wait_for_output("up\nup\n")
    job.send(signal.SIGTERM)
    assert job.wait().end == "exited 5 stopped"
    assert job.text.count("ended") == 2


def test_kill_ends_what_ignores_terminate(init: Harness) -> None:
    """A job that ignores SIGTERM goes on until SIGQUIT, which kills it, and init records that."""
    job = init.start(
        "/bin/sh", "-c", "trap 'echo ignored' TERM; echo up; while :; do sleep 1000 & wait $!; done"
    )
    job.wait_for_output("up")
    job.send(signal.SIGTERM)
    job.wait_for_output("ignored")
    job.send(signal.SIGQUIT)
    assert job.wait().end == "signaled 9 stopped"
    assert job.exit_code == 0


DEAF = "trap '' TERM; echo up; exec sleep 1000"


@pytest.mark.parametrize("time_max", ["0", "1000"])
def test_who_sends_sigterm_need_not_kill(init: Harness, time_max: str) -> None:
    """As at a shutdown: a job that ignores SIGTERM is killed after its grace, and its end recorded."""
    options = ("--grace", "1", "--time-max", time_max)
    job = init.start("/bin/sh", "-c", DEAF, options=options)
    job.wait_for_output("up")
    job.send(signal.SIGTERM)
    assert job.wait().end == "signaled 9 stopped"


def test_a_time_limit_is_not_put_off(init: Harness) -> None:
    """SIGTERM from outside gives a job no more time than it has."""
    job = init.start("/bin/sh", "-c", DEAF, options=("--grace", "1000", "--time-max", "2"))
    job.wait_for_output("up")
    job.send(signal.SIGTERM)
    assert job.wait().end.startswith("signaled 9 ")


def test_a_stopped_job_terminates(init: Harness) -> None:
    """A job that has stopped itself is continued, so that it sees its SIGTERM."""
    job = init.start("/bin/sh", "-c", "echo up; kill -STOP $$")
    job.wait_for_output("up")
    job.send(signal.SIGTERM)
    assert job.wait().end == "signaled 15 stopped"


def test_what_was_asked_for_first_is_sent_first(init: Harness) -> None:
    """An init that is held up beyond a grace period finds both signals, SIGKILL's with the lower number."""
    job = init.start("sleep", "1000")
    job.send(signal.SIGSTOP)
    job.send(INIT_SIGNAL_FIRST + signal.SIGINT)
    job.send(signal.SIGQUIT)
    job.send(signal.SIGCONT)
    assert job.wait().end == f"signaled {int(signal.SIGINT)} stopped"


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, 15), (signal.SIGQUIT, 9)])
def test_a_stop_during_the_start_is_not_lost(init: Harness, number: signal.Signals, end: int) -> None:
    """A signal that reaches init before the command exists is carried out as soon as it does."""
    assert init.run("sleep", "1000", at_clone=number).end == f"signaled {end} stopped"


def test_killing_init_takes_the_job_along(init: Harness) -> None:
    """SIGKILL of init leaves no process and no end record."""
    job = init.start("/bin/sh", "-c", "setsid sleep 1000 & sleep 1000")
    job.send(signal.SIGKILL)
    assert job.wait().exit_code == -9
    assert [record[0] for record in job.status] == ["started"]
    assert processes_of(JOB_UID) == []


def test_time_max_kills(init: Harness) -> None:
    """A job that outlives its time is killed, and that is the reason."""
    assert init.sh("trap '' TERM; sleep 1000", options=("--time-max", "1")).end == "signaled 9 timed_out"


def test_a_setup_without_limits_has_no_timer(init: Harness) -> None:
    """0 is no limit: of time, output and /tmp."""
    job = init.sh(
        "head -c 100000 /dev/zero", options=("--time-max", "0", "--output-max", "0", "--tmp-bytes", "0")
    )
    assert job.end == "exited 0 none"
    assert len(job.output) == 100_000


def test_by_hand_it_passes_on_how_the_command_ended(init: Harness) -> None:
    """From a shell, pjw-init gives the command's output and exit code, and says what went wrong."""
    done = init.by_hand("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\nerr\n", b"")
    assert init.by_hand("sh", "-c", "kill -9 $$").returncode == 128 + 9
    missing = init.by_hand("no-such-program")
    assert (missing.returncode, missing.stderr) == (
        127,
        b"pjw-init: cannot execute no-such-program: no such file or directory\n",
    )
    assert init.by_hand("/etc/passwd").returncode == 126
    refused = init.by_hand("true", options=("--scratch", "/no/such"))
    assert refused.returncode == 125
    assert (
        refused.stderr == b"pjw-init: cannot open the scratch directory /no/such: no such file or directory\n"
    )


def test_by_hand_signals_are_passed_on(init: Harness) -> None:
    """SIGTERM to the first stage terminates the job, and its output pipe is closed at the end."""
    with init.by_hand_open("sh", "-c", "echo up; exec sleep 1000") as (process, output):
        assert output.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert output.read() == b""


def test_by_hand_the_job_ends_with_the_first_stage(init: Harness) -> None:
    """Killed outright, the first stage takes init and the job along."""
    with init.by_hand_open("sh", "-c", "echo up; exec sleep 1000") as (process, output):
        assert output.readline() == b"up\n"
        (job,) = (os.pidfd_open(pid) for pid in processes_of(JOB_UID))
        process.kill()
        try:
            wait_readable(job, "the end of the job")
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(job, signal.SIGKILL)
            os.close(job)


def test_by_hand_a_reader_that_goes_away_ends_the_job(init: Harness) -> None:
    """`pjw-init ... yes | head -1` ends, as `yes | head -1` does."""
    with init.by_hand_open("yes") as (process, output):
        assert output.readline() == b"y\n"
        output.close()
        assert process.wait(30) == 128 + signal.SIGPIPE


def wait_until_pipe_full(pipe: int, size: int) -> None:
    """Wait until *pipe* holds *size* bytes; the kernel tells no reader of that."""
    deadline, held = time.monotonic() + 30, array.array("i", [0])
    while held[0] < size:
        fcntl.ioctl(pipe, termios.FIONREAD, held)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_by_hand_a_reader_that_stops_keeps_no_signal_away(init: Harness) -> None:
    """A full pipe behind init holds the job back and not init; what was written is whole when it is read."""
    with init.by_hand_open("seq", "1", "1000000000") as (process, output):
        full = fcntl.fcntl(output, fcntl.F_GETPIPE_SZ)
        wait_until_pipe_full(output.fileno(), full)
        (job,) = (os.pidfd_open(pid) for pid in processes_of(JOB_UID))
        process.send_signal(signal.SIGTERM)
        wait_readable(job, "the end of the job")
        os.close(job)
        text = output.read()
        assert process.wait(30) == 128 + signal.SIGTERM
    lines = text.split(b"\n")
    assert len(text) > full
    assert lines[:-1] == [b"%d" % number for number in range(1, len(lines))]


def test_by_hand_what_follows_goes_behind(binary: Path, tmp_path: Path) -> None:
    """`(pjw-init ...; date) > log` is in that order."""
    log = tmp_path / "log"
    script = f'("$0" --uid {JOB_UID} --gid {JOB_UID} -- echo job; echo after) > "$1"'
    subprocess.run(["/bin/sh", "-c", script, binary, log], env=ENVIRONMENT, check=True, timeout=30)
    assert log.read_text() == "job\nafter\n"


def test_by_hand_output_is_appended(binary: Path, tmp_path: Path) -> None:
    """A log that a shell opened with >> is appended to."""
    log = tmp_path / "log"
    log.write_text("before\n")
    command = [str(binary), "--uid", str(JOB_UID), "--gid", str(JOB_UID), "--", "echo", "job"]
    with log.open("ab") as appended:
        subprocess.run(command, env=ENVIRONMENT, stdout=appended, check=True, timeout=30)
    assert log.read_text() == "before\njob\n"


# -- Output


def test_output_is_whole(init: Harness) -> None:
    """100 MB of random bytes arrive as they were written."""
    job = init.python(
        "import hashlib, os, sys\n"
        "digest = hashlib.sha256()\n"
        "for _ in range(100):\n"
        "    block = os.urandom(1_000_000); digest.update(block)\n"
        "    while block: block = block[os.write(1, block):]\n"
        "open('/run/job/digest', 'w').write(digest.hexdigest()); os.write(2, digest.hexdigest().encode())"
    )
    output, digest = job.output[:-64], job.output[-64:].decode()
    assert len(output) == 100_000_000
    assert hashlib.sha256(output).hexdigest() == digest


def test_output_goes_behind_what_is_there(init: Harness) -> None:
    """init writes from the file's end at the start, and both streams in their order."""
    assert init.sh("echo 1; echo 2 >&2; echo 3", before=b"before\n").text == "before\n1\n2\n3\n"


def test_standard_streams_can_be_opened_by_name(init: Harness) -> None:
    """/dev/stdout and /dev/stderr can be opened, by the job's own uid."""
    assert (
        init.sh("echo out > /dev/stdout; echo err > /dev/stderr; echo fd > /dev/fd/1").text
        == "out\nerr\nfd\n"
    )


def test_a_job_cannot_shorten_its_output(init: Harness) -> None:
    """Truncating standard output is refused, and what was written stays."""
    job = init.sh("echo kept; truncate -s 0 /dev/stdout 2> /dev/null || echo refused; : > /dev/stdout")
    assert job.text == "kept\nrefused\n"


def test_a_job_may_close_its_output(init: Harness) -> None:
    """A job without output goes on until its own end."""
    job = init.start("/bin/sh", "-c", "trap 'exit 7' TERM; echo up; exec >&- 2>&-; while :; do :; done")
    job.wait_for_output("up")
    job.send(signal.SIGTERM)
    assert job.wait().end == "exited 7 stopped"


def test_output_max_keeps_exactly_so_much(init: Harness) -> None:
    """The limit is exact: the bytes up to it are kept, and one more is the end."""
    exact = init.sh("head -c 300000 /dev/zero", options=("--output-max", "300000"))
    assert (exact.end, len(exact.output)) == ("exited 0 none", 300_000)
    over = init.sh("trap '' TERM; yes", options=("--output-max", "300001"))
    assert (over.end, len(over.output)) == ("signaled 9 output_limit", 300_001)
    last = init.sh("echo 123456789", options=("--output-max", "9"))
    assert (last.end.split()[-1], last.output) == ("output_limit", b"123456789")


def test_output_in_packets(init: Harness) -> None:
    """A job may set its pipe to packet mode: each read then gives one packet, and none is lost."""
    script = (
        "import fcntl, os\n"
        "fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)\n"
        "for number in range(100): os.write(1, b'%09d\\n' % number)"
    )
    expected = b"".join(b"%09d\n" % number for number in range(100))
    assert init.python(script).output == expected
    over = init.python(script, options=("--output-max", "995"))
    assert (over.end.split()[-1], over.output) == ("output_limit", expected[:995])


def test_watchers_are_woken(init: Harness, scratch: Path) -> None:
    """Each burst of output is an IN_MODIFY, so that a follower needs no polling."""
    os.mkfifo(scratch / "go", 0o600)
    os.chown(scratch / "go", JOB_UID, JOB_UID)
    job = init.start(
        "/bin/sh",
        "-c",
        "exec 3<go; while read -r word <&3; do echo $word; done",
        options=("--scratch", str(scratch)),
    )
    watch = Inotify(job.output_path)
    with (scratch / "go").open("w") as go:
        for number in range(20):
            go.write(f"{number}\n")
            go.flush()
            watch.wait_until(lambda number=number: job.text.endswith(f"{number}\n"))  # type: ignore[misc]
    watch.close()
    assert job.wait().end == "exited 0 none"


@contextlib.contextmanager
def nearly_full_disk() -> Iterator[tuple[int, int]]:
    """A file system of 256 KiB: descriptors of an output file there, and of one that fills half of it."""
    root = small_tmpfs(262_144)
    try:
        filler = os.open("filler", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, dir_fd=root)
        output = os.open("output", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, dir_fd=root)
        os.write(filler, bytes(131_072))
        yield output, filler
        os.close(filler)
        os.close(output)
    finally:
        os.close(root)


def wait_until_full(job_output: int, watch: Inotify) -> None:
    """Wait until the file system takes no more."""
    watch.wait_until(lambda: os.fstat(job_output).st_size == 131_072)


def test_a_full_disk_holds_the_job_back_and_loses_nothing(init: Harness) -> None:
    """Without space the job waits; when space is freed it goes on; the end comes after the last byte."""
    size = 200_000
    with nearly_full_disk() as (output, filler):
        mode = os.fstat(output).st_mode
        job = init.start("/bin/sh", "-c", f"seq 1 1000000 | head -c {size}; exit 4", output_fd=output)
        in_attrib = 0x4
        watch = Inotify(Path(f"/proc/self/fd/{output}"), in_attrib)
        # by its mode, which takes no space: it says so while it waits
        watch.wait_until(lambda: bool(os.fstat(output).st_mode & stat.S_ISVTX))
        watch.close()
        assert os.fstat(output).st_size == 131_072
        os.ftruncate(filler, 0)
        assert job.wait().end == "exited 4 none"
        assert os.fstat(output).st_mode == mode
        expected = subprocess.run(["seq", "1", "1000000"], capture_output=True, check=True).stdout[:size]
        assert os.pread(output, size + 1, 0) == expected


@pytest.mark.parametrize(("most", "reason"), [(199_999, "output_limit"), (200_000, "none")])
def test_output_max_is_exact_on_a_full_disk(init: Harness, most: int, reason: str) -> None:
    """What was held back is counted once: the limit is the same to the byte."""
    with nearly_full_disk() as (output, filler):
        script = "seq 1 1000000 | head -c 200000"
        options = ("--output-max", str(most))
        job = init.start("/bin/sh", "-c", script, output_fd=output, options=options)
        watch = Inotify(Path(f"/proc/self/fd/{output}"))
        wait_until_full(output, watch)
        watch.close()
        os.ftruncate(filler, 0)
        assert job.wait().end.split()[-1] == reason
        expected = subprocess.run(["seq", "1", "1000000"], capture_output=True, check=True).stdout[:most]
        assert os.pread(output, 200_001, 0) == expected


def test_daemons_are_ended_before_the_output_is_drained(init: Harness, scratch: Path) -> None:
    """Nothing of a job outlives its command while what it wrote waits for space."""
    os.mkfifo(scratch / "go")
    os.chown(scratch / "go", JOB_UID, JOB_UID)
    script = "setsid sleep 1000 & echo up; read word < go; head -c 200000 /dev/zero; exit 3"
    with nearly_full_disk() as (output, filler):
        job = init.start("/bin/sh", "-c", script, output_fd=output, options=("--scratch", str(scratch)))
        watch = Inotify(Path(f"/proc/self/fd/{output}"))
        watch.wait_until(lambda: os.fstat(output).st_size > 0)
        watch.close()
        processes = [os.pidfd_open(pid) for pid in processes_of(JOB_UID)]
        assert len(processes) == 2
        (scratch / "go").write_text("go\n")
        for process in processes:
            wait_readable(process, "the end of a daemon")
            os.close(process)
        assert [record[0] for record in job.status] == ["started"]
        os.ftruncate(filler, 0)
        assert job.wait().end == "exited 3 none"
        assert os.fstat(output).st_size == 200_003


def test_a_job_that_is_held_back_can_be_stopped(init: Harness) -> None:
    """On a full disk a running job can be killed, and a second SIGQUIT gives up what cannot be written."""
    with nearly_full_disk() as (output, _):
        job = init.start("yes", output_fd=output)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text()
        command = os.pidfd_open(int(children))
        watch = Inotify(Path(f"/proc/self/fd/{output}"))
        wait_until_full(output, watch)
        watch.close()
        job.send(signal.SIGQUIT)
        wait_readable(command, "the end of the command")
        os.close(command)
        assert [record[0] for record in job.status] == ["started"]
        # Again until it has ended: one that init reads before it has reaped the command counts as the first.
        for _ in range(50):
            job.send(signal.SIGQUIT)
            if select.select([job.pidfd], [], [], 0.1)[0]:
                break
        assert job.wait().end == "signaled 9 stopped"


def test_terminals_work(init: Harness) -> None:
    """A job can make itself a terminal: script(1) runs."""
    job = init.sh("script -qec 'tty; echo from the terminal' /dev/null")
    assert job.text.split("\r\n") == ["/dev/pts/0", "from the terminal", ""]


# -- cgroups


def cgroup_mounts() -> dict[str, Path]:
    """Where this machine has cgroup v2 ("") and the v1 controllers that pjw uses."""
    mounts = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts[""] = Path(path)
        elif kind == "cgroup":
            mounts |= {
                name: Path(path)
                for name in options.split(",")
                if name in ("cpu", "cpuacct", "memory", "blkio", "pids")
            }
    return mounts


@contextlib.contextmanager
def own_cgroup(mount: Path) -> Iterator[Path]:
    """A cgroup .../pjw/test-PID, removed afterwards; with it .../pjw, when it was not there before."""
    parent = mount / "pjw"
    path = parent / f"test-{os.getpid()}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        path.rmdir()
        with contextlib.suppress(OSError):
            parent.rmdir()


def test_cgroup_v1_is_entered(init: Harness, scratch: Path) -> None:
    """init and the command are in the given cgroups and nobody else is, even at pids.max 2."""
    mounts = cgroup_mounts()
    mounts.pop("", None)
    if not mounts:
        pytest.skip("no cgroup v1 here")
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(own_cgroup(mount)) for mount in dict.fromkeys(mounts.values())]
        (mounts["pids"] / f"pjw/test-{os.getpid()}/pids.max").write_text("2")
        fds = [os.open(path / "tasks", os.O_WRONLY | os.O_CLOEXEC) for path in paths]
        options = [word for fd in fds for word in ("--cgroup-procs-fd", str(fd))]
        options += ["--scratch", str(scratch)]
        os.mkfifo(scratch / "go")
        os.chown(scratch / "go", JOB_UID, JOB_UID)
        job = init.start(
            "python3",
            "-c",
            "import os; print(open('/proc/self/cgroup').read()); open('go').read(); os.fork()",
            options=options,
            pass_fds=fds,
        )
        members = [path.joinpath("cgroup.procs").read_text().split() for path in paths]
        assert all(str(job.pid) in pids and len(pids) <= 2 for pids in members)
        (scratch / "go").write_text("go\n")
        job.wait()
        assert job.end == "exited 1 none"
        assert "BlockingIOError" in job.text
        rows = [
            line.split(":") for line in job.text.splitlines() if line.count(":") == 2 and line[0].isdigit()
        ]
        assert {row[2] for row in rows if set(row[1].split(",")) & set(mounts)} == {"/"}
        for fd in fds:
            os.close(fd)


def test_cgroup_v2_is_cloned_into(init: Harness) -> None:
    """With --cgroup-fd the job starts its life in that cgroup and sees it as the root."""
    mount = cgroup_mounts().get("")
    if mount is None:
        pytest.skip("no cgroup v2 here")
    with own_cgroup(mount) as path:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        script = "cat /proc/self/cgroup; exec sleep 1000"
        job = init.start("/bin/sh", "-c", script, options=("--cgroup-fd", str(fd)), pass_fds=[fd])
        os.close(fd)
        job.wait_for_output("0::/\n")
        assert str(job.pid) in path.joinpath("cgroup.procs").read_text().split()
        job.send(signal.SIGTERM)
        job.wait()


# -- Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-such-option"], b"no-such-option"),
        (["--uid", "0"], b"cannot take --uid 0: out of range"),
        (["--gid", "0"], b"cannot take --gid 0: out of range"),
        (["--uid", "4294967295"], b"out of range"),
        (["--uid", "1x"], b"not a whole number"),
        (["--uid", ""], b"not a whole number"),
        (["--uid", " 1"], b"not a whole number"),
        (["--uid", "+1"], b"not a whole number"),
        (["--uid", "-1"], b"not a whole number"),
        (["--uid", "99999999999999999999"], b"not a whole number"),
        (["--time-max", "-1"], b"not a whole number"),
        (["--tmp-bytes", "1k"], b"not a whole number"),
        (["--output-max", "9223372036854775808"], b"out of range"),
        (["--output-fd", "999"], b"cannot take --output-fd 999: not an open descriptor"),
        (["--scratch", "relative"], b"not an absolute path"),
        (["--hide", "relative"], b"not an absolute path"),
        (["--hide", "/x"] * 65, b"too many of them"),
        (["--visible", "/x"] * 129, b"too many of them"),
        (["--cgroup-procs-fd", "0"], b"out of range"),
        (["--command-fd", "0"], b"the command is given twice"),
    ],
)
def test_bad_options_are_refused(init: Harness, options: list[str], message: bytes) -> None:
    """What is not exactly right is refused, in words, before anything is made."""
    done = init.by_hand("true", options=options)
    assert done.returncode == 125
    assert message in done.stderr


def test_uid_gid_and_a_command_are_required(init: Harness) -> None:
    """Without a uid, a gid or a command nothing runs."""
    for words, message in {
        ("--gid", "1", "--", "true"): b"--uid (none): required",
        ("--uid", "1", "--", "true"): b"--gid (none): required",
        ("--uid", "1", "--gid", "1"): b"no command is given",
        ("--uid", "1", "--gid", "1", "--", ""): b"no command is given",
        ("--uid", "1", "--gid"): b"requires an argument",
    }.items():
        done = subprocess.run([init.binary, *words], capture_output=True, check=False, timeout=30)
        assert done.returncode == 125
        assert message in done.stderr


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", errno.EINVAL),
        (b"\0", errno.EINVAL),
        (b"\0\0", errno.EINVAL),
        (b"/\0", errno.EINVAL),
        (b"\0A=1\0", errno.EINVAL),
        (b"\0\0true", errno.EINVAL),
        (b"\0\0\0true\0", errno.EINVAL),
        (b"\0A\0\0true\0", errno.EINVAL),
        (b"\0=\0\0true\0", errno.EINVAL),
        (b"tmp\0\0true\0", errno.EINVAL),
        (b"x" * COMMAND_MAX_BYTES + b"\0", errno.E2BIG),
    ],
)
def test_a_bad_command_is_refused(init: Harness, raw: bytes, error: int) -> None:
    """A command that is empty, unfinished, nameless or too long is reported as such, before any clone."""
    job = init.start(raw_command=raw)
    assert job.reports == [f"failed command {error}"]


def test_the_command_may_fill_its_bound(init: Harness) -> None:
    """All of it is read; here the kernel's own limit for one argument is what refuses it."""
    job = init.start(raw_command=b"\0\0true\0" + b"x" * (COMMAND_MAX_BYTES - 8) + b"\0")
    assert job.reports == ["cloned", f"failed exec {errno.E2BIG}"]


def test_a_closed_launcher_does_not_end_a_launch(init: Harness) -> None:
    """A launcher that dies while init sets up loses nothing: the job runs, and its successor finds it."""
    job = init.start("sleep", "1000")
    job.report.close()
    job.send(signal.SIGTERM)
    wait_readable(job.pidfd, "the end")
    assert job.wait().end == "signaled 15 stopped"
