"""What an attacker within the network process can still do: tried within the sandbox, and without it."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pjw.server.landlock import landlock_abi
from tests.support.service import Service
from tests.support.worker_harness import uid_range

SECONDS: Final = 60
# Becomes the server's user, in the sandbox or as before there was one; prints the errno of each attempt.
PROBE: Final = """
import ctypes, json, os, resource, signal, socket, sys, threading
from pjw.server import sandbox
given = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
own = os.open(given["own"], os.O_RDONLY)
import encodings.idna
if given["confined"]:
    sandbox.enter(sandbox.Sandbox(own, [given["port"]], 100), given["uid"])
else:
    sandbox.become(given["uid"])
    libc.prctl(38, 1, 0, 0, 0)

def fork():
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def write(path):
    with open(path, "w") as file:
        file.write("x")

def change_own():
    directory = f"/proc/self/fd/{own}/7"
    os.mkdir(directory)
    write(f"{directory}/output")
    os.truncate(f"{directory}/output", 0)
    open(f"{directory}/output").read()
    os.unlink(f"{directory}/output")
    os.rmdir(directory)

def bind(port):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))

def thread():
    one = threading.Thread(target=lambda: None)
    one.start()
    one.join()

def many():
    opened = []
    try:
        for _ in range(200):
            opened.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for each in opened:
            os.close(each)

ATTEMPTS = {
    "fork": fork,
    "spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "signal": lambda: os.kill(given["victim"], 0),
    "limits": lambda: resource.prlimit(given["victim"], resource.RLIMIT_CPU),
    "trace": lambda: call(given["calls"]["ptrace"], 0x4206, given["victim"], 0, 0),
    "namespace": lambda: call(given["calls"]["unshare"], 0x10000000),
    "keyring": lambda: call(given["calls"]["keyctl"], 0, -3, 1),
    "uevents": lambda: socket.socket(16, socket.SOCK_RAW, 15).close(),
    "read": lambda: open(given["secret"]).read(),
    "write": lambda: write(given["public"] + "/x"),
    "append": lambda: open(given["public"] + "/there", "a").close(),
    "list": lambda: os.listdir(given["public"]),
    "another port": lambda: bind(given["other_port"]),
    "descriptors": many,
    "own memory": lambda: open("/proc/self/mem", "rb").close(),
    # what goes on
    "own files": change_own,
    "port": lambda: bind(given["port"]),
    "any port": lambda: bind(0),
    "thread": thread,
    "resolver": lambda: socket.getaddrinfo("localhost", 1),
    "hosts": lambda: open("/etc/hosts").read(),
    "self": lambda: os.listdir("/proc/self/fd"),
    "signal to itself": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGWINCH),
    "exec": lambda: os.execv("/bin/true", ["true"]),
}
result = {}
for name, attempt in ATTEMPTS.items():
    if name == "exec":
        # nothing is left to say it when it succeeds
        print(json.dumps({**result, name: 0}), flush=True)
    try:
        attempt()
        result[name] = 0
    except OSError as error:
        result[name] = error.errno
print(json.dumps(result), flush=True)
"""
GOES_ON: Final = ("own files", "port", "any port", "thread", "resolver", "hosts", "self", "signal to itself")
EPERM, EACCES, EMFILE = 1, 13, 24
DENIED: Final = {
    "fork": EPERM,
    "spawn": EPERM,
    "signal": EPERM,
    "limits": EPERM,
    "trace": EPERM,
    "namespace": EPERM,
    "keyring": EPERM,
    "uevents": EPERM,
    "descriptors": EMFILE,
    "own memory": EACCES,
    "exec": EPERM,
}
BY_LANDLOCK: Final = dict.fromkeys(("read", "write", "append", "list"), EACCES)
NUMBERS: Final = {
    "x86_64": {"ptrace": 101, "unshare": 272, "keyctl": 250},
    "aarch64": {"ptrace": 117, "unshare": 97, "keyctl": 219},
}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """What each attempt came to, without the sandbox and within it."""
    uid = uid_range()
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    own, public = directory / "own", directory / "public"
    own.mkdir(mode=0o700)
    os.chown(own, uid, uid)
    public.mkdir()
    public.chmod(0o777)
    for path, mode in ((public / "there", 0o666), (directory / "readable", 0o644)):
        path.write_text("x")
        path.chmod(mode)
    given: dict[str, Any] = {
        "uid": uid,
        "own": str(own),
        "public": str(public),
        "secret": str(directory / "readable"),
        "calls": NUMBERS[os.uname().machine],
        "port": free_port(),
        "other_port": free_port(),
    }
    try:
        # dumpable, as a program that another of the same user has started
        with subprocess.Popen(["sleep", "60"], user=uid, group=uid, extra_groups=[]) as victim:
            given["victim"] = victim.pid
            yield probe(given, confined=False), probe(given, confined=True)
            victim.kill()
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def probe(given: dict[str, Any], *, confined: bool) -> dict[str, int]:
    """Run the attempts in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROBE, json.dumps({**given, "confined": confined})],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_a_broken_server_cannot_do(outcomes: tuple[dict[str, int], dict[str, int]]) -> None:
    """Programs, processes, signals, keys, files of others: each works for the same user outside (S11)."""
    free, confined = outcomes
    # its memory is root's once it was root, whatever is said of it
    assert {name: free[name] for name in {**DENIED, **BY_LANDLOCK} if name != "own memory"} == dict.fromkeys(
        sorted({*DENIED, *BY_LANDLOCK} - {"own memory"}), 0
    )
    assert {name: confined[name] for name in DENIED} == DENIED
    if landlock_abi():
        assert {name: confined[name] for name in BY_LANDLOCK} == BY_LANDLOCK
    if landlock_abi() >= 4:
        assert (free["another port"], confined["another port"]) == (0, EACCES)


def test_what_goes_on(outcomes: tuple[dict[str, int], dict[str, int]]) -> None:
    """Its own files, its ports, threads and the resolver."""
    for outcome in outcomes:
        assert {name: outcome[name] for name in GOES_ON} == dict.fromkeys(GOES_ON, 0)


def test_a_running_server_is_in_it(service: Service) -> None:
    """/proc tells: a filter, no capability in any set, no gain by exec, a limit of its own."""
    lines = Path(f"/proc/{service.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    # the same for each of its threads
    threads = list(Path(f"/proc/{service.pid}/task").iterdir())
    assert len(threads) > 1
    for thread in threads:
        assert re.search(r"^Seccomp:\t2$", (thread / "status").read_text(), re.MULTILINE), thread
    # not dumpable: what it has in /proc is root's
    assert os.stat(f"/proc/{service.pid}/mem").st_uid == 0
    assert limits_of(service.pid)["Max core file size"] == ("0", "0")
    server, launcher = (limits_of(pid)["Max open files"] for pid in (service.pid, service.launcher_pid()))
    assert int(server[1]) <= min(int(launcher[1]), 50_000)


def test_its_limit_of_descriptors_is_that_of_what_it_may_have(make_service: Callable[..., Service]) -> None:
    """Derived from the limits of clients, so that a smaller service has fewer; the launcher's stays."""
    config = "[clients]\nfollowers_total_max = 100\nrunning_total_max = 50\n"
    service = make_service(config=config).start()
    assert limits_of(service.pid)["Max open files"] == ("8442", "8442")
    assert int(limits_of(service.launcher_pid())["Max open files"][0]) > 8442


def limits_of(pid: int) -> dict[str, tuple[str, str]]:
    """/proc/PID/limits: soft and hard of each."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:25].strip(): (line[26:46].strip(), line[47:67].strip()) for line in lines}


def test_the_check_tells_what_the_host_has() -> None:
    """`pjwd check` names the filter and Landlock, or its lack."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "pjwd"), "check"],
        capture_output=True,
        check=False,
        timeout=SECONDS,
    )
    assert b"sandbox of the server: system calls are filtered\n" in done.stdout
    words = (
        b"files by Landlock, ABI " if landlock_abi() else b"no Landlock, so it may read what every user may"
    )
    assert words in done.stdout


def test_a_step_that_fails_is_an_error_in_words(make_service: Callable[..., Service]) -> None:
    """Without CAP_SETPCAP the bounding set stays as it is: pjwd says so, and does not serve."""
    service = make_service()
    done = subprocess.run(
        ["setpriv", "--bounding-set=-setpcap", "--inh-caps=-setpcap", *service.command()],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    # first what its trial of a job says
    assert re.search(
        rb"^pjwd: error: cannot empty the bounding set: operation not permitted", done.stderr, re.MULTILINE
    )
    assert b"hint: this takes the capability CAP_SETPCAP" in done.stderr
