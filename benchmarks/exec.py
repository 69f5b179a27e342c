"""Further commands in a running job: the cost of one, and the time until a key comes back.

We compare the cost of entering a job with `crun exec`, which does the same work in a container with the same
limits. It is the processor time of all of pjw's processes but the server, since crun has no gRPC and no TLS.
Another row has the time with the server's.

A key goes from a terminal through the user's client, `pjw exec -it`, to a program that sends it back, and to
that terminal again. The reference is a key through `ssh` to an sshd of this machine, on a private port. We
also time one message of gRPC and its answer, on an open stream and through the same client: a key is two such
messages, in the two directions. We time all in turns.
"""

import itertools
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from benchmarks import accounts, pjwd
from benchmarks.accounts import Used
from benchmarks.clients import TRUE
from benchmarks.floor import build
from benchmarks.parts import nothing
from benchmarks.peers import open_exec
from benchmarks.processes import cpu_seconds
from benchmarks.report import Figure, Held, median, percentile
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import BIN, CALL_SECONDS, Service, wait_for

SUITE: Final = "exec"
CPU_GOAL: Final = 0.5
KEY_GOAL: Final = 2.0
# sends every key back, and announces its beginning
ECHO: Final = "stty raw -echo; echo ready; exec cat"
READY: Final = b"ready\n"
MESSAGE: Final = "a message of gRPC and its answer"
KEY_SECONDS: Final = 30.0
# The pause between two keys. A fast typist makes one of 100 ms.
PAUSE_SECONDS: Final = 0.02


def run(*, quick: bool) -> list[Figure]:
    """Measure both."""
    with pjwd.running() as service:
        job_id = pjwd.start(service, ["sleep", "3600"])
        return [
            *entering(service, job_id, rounds=4 if quick else 10, count=15 if quick else 50),
            *keys(service, job_id, rounds=3 if quick else 10, count=20 if quick else 50),
        ]


# --- to enter


def entering(service: Service, job_id: int, rounds: int, count: int) -> list[Figure]:
    """Return the seconds of `true` in a job, from the call until its end is known."""
    used, lives = Used(), list[float]()
    crun_cpu, crun_lives = 0.0, list[float]()
    with ExitStack() as stack:
        directory = stack.enter_context(pjwd.directory())
        directory.chmod(0o755)
        stub = stack.enter_context(service.stub())
        crun = stack.enter_context(open_exec(directory, build(directory), TRUE))
        account = stack.enter_context(accounts.opened(service))
        # caches, and connections
        _enter(stub, job_id)
        for _ in range(rounds):
            before = account.now()
            lives += [_enter(stub, job_id) for _ in range(count)]
            used += account.now() - before
            if crun is not None:
                before_crun = cpu_seconds(crun.pid)
                crun_lives += [crun.run().end for _ in range(count)]
                crun_cpu += cpu_seconds(crun.pid) - before_crun
    each = 1e3 / (rounds * count)
    against = ("", 0.0) if crun is None else ("crun exec", crun_cpu * each)
    wall = ("", 0.0) if crun is None else ("crun exec", median(crun_lives) * 1e3)
    entered = (used.total - used.server) * each
    return [
        Figure(SUITE, "CPU to enter", entered, "ms", *against, CPU_GOAL, held=Held.IF_THERE),
        Figure(
            SUITE, "CPU of an exec, with the server's", used.total * each, "ms", *against, held=Held.IF_THERE
        ),
        *(
            Figure(
                SUITE,
                f"CPU of an exec: {whose}",
                seconds * each,
                "ms",
                "all",
                used.total * each,
                held=Held.NEVER,
            )
            for whose, seconds in used.parts().items()
        ),
        Figure(SUITE, "until its end is known", median(lives) * 1e3, "ms", *wall, held=Held.IF_THERE),
    ]


def _enter(stub: JobWorkerServiceStub, job_id: int) -> float:
    began = time.perf_counter()
    request = pb.ExecRequest(id=job_id, argv=pb.Argv(arguments=[TRUE]))
    session = stub.Exec(request, timeout=CALL_SECONDS).session
    ended = stub.Wait(pb.WaitRequest(id=job_id, session=session.number), timeout=CALL_SECONDS).session
    seconds = time.perf_counter() - began
    if not ended.HasField("exit_code") or ended.exit_code != 0:
        raise RuntimeError(f"true in a job did not end as it should: {ended}")
    return seconds


# --- keys


class Typist:
    """A client at its own terminal. The program at the other end sends every key back."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._keys: Final = itertools.cycle(bytes([key]) for key in range(ord("a"), ord("z") + 1))
        self._ours, theirs = pty.openpty()
        tty.setraw(theirs)
        self._process: Final = subprocess.Popen(
            ["setsid", "--ctty", *command], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self._until(READY)

    def close(self) -> None:
        """End the client. The program at the other end ends with the client, or with its job."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def key(self) -> float:
        """Type one key; return the seconds until it is shown."""
        key = next(self._keys)
        began = time.perf_counter()
        os.write(self._ours, key)
        self._until(key)
        return time.perf_counter() - began

    def _until(self, text: bytes) -> None:
        seen, deadline = b"", time.monotonic() + KEY_SECONDS
        while text not in seen:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._ours], [], [], left)[0]:
                raise RuntimeError(f"waited for {text!r} and saw {seen!r}")
            try:
                seen += os.read(self._ours, 4096)
            except OSError:
                raise RuntimeError(f"waited for {text!r}, and the client ended: {seen!r}") from None


class _Message:
    """A stream of a bare grpc.aio server that answers each message."""

    def __init__(self, stub: JobWorkerServiceStub) -> None:
        self._requests: Final[SimpleQueue[pb.WriteInputRequest]] = SimpleQueue()
        self._call: Final = stub.WriteInput(iter(self._requests.get, None))

    def key(self) -> float:
        """Send one message; return the seconds until its answer."""
        began = time.perf_counter()
        self._requests.put(pb.WriteInputRequest(offset=1, data=b"x"))
        next(self._call)
        return time.perf_counter() - began


def keys(service: Service, job_id: int, rounds: int, count: int) -> list[Figure]:
    """Return the seconds of a key to the other end and back, each in its turn."""
    found: dict[str, list[float]] = {}
    command = [str(BIN / "pjw"), "exec", "-it", str(job_id), ECHO]
    with ExitStack() as stack:
        typists: dict[str, Typist | _Message] = {MESSAGE: _Message(stack.enter_context(nothing(service)))}
        if (ssh := stack.enter_context(_ssh())) is not None:
            typists["ssh localhost"] = ssh
        typists["pjw"] = ours = Typist(command, {**service.environment(), "TERM": "dumb"})
        stack.callback(ours.close)
        for number in range(-1, rounds):
            for name, typist in typists.items():
                for _ in range(count):
                    seconds = typist.key()
                    # the first turn is for caches
                    if number >= 0:
                        found.setdefault(name, []).append(seconds)
                    time.sleep(PAUSE_SECONDS)
    half, whole = (
        {name: share(seconds) * 1e3 for name, seconds in found.items()} for share in (median, _slowest)
    )
    key, ssh_key = "a key and back, p50", half.get("ssh localhost", 0.0)
    against = ("ssh localhost" if ssh_key else "", ssh_key)
    slow = (against[0], whole.get("ssh localhost", 0.0))
    return [
        Figure(SUITE, key, half["pjw"], "ms", *against, KEY_GOAL, held=Held.IF_THERE),
        Figure(SUITE, key, half["pjw"], "ms", MESSAGE, half[MESSAGE], held=Held.NEVER),
        Figure(SUITE, f"{MESSAGE}, p50", half[MESSAGE], "ms", *against, held=Held.NEVER),
        Figure(SUITE, "a key and back, p99", whole["pjw"], "ms", *slow, held=Held.NEVER),
    ]


def _slowest(seconds: Sequence[float]) -> float:
    return percentile(seconds, 0.99)


@contextmanager
def _ssh() -> Iterator[Typist | None]:
    """Give a typist at `ssh` to this machine; None, and why on stderr, where that cannot be had."""
    sshd = find_sshd()
    with ExitStack() as stack:
        typist = None
        if sshd is None:
            print("no ssh beside pjw: openssh-server or openssh-client is not installed", file=sys.stderr)
        else:
            directory = stack.enter_context(pjwd.directory())
            try:
                command = [*open_sshd(stack, sshd, directory, "-tt"), ECHO]
                typist = Typist(command, {"PATH": os.environ["PATH"], "TERM": "dumb"})
            except RuntimeError as error:
                log = (directory / "log").read_text().strip().splitlines()
                print(f"no ssh beside pjw: {error}; sshd says {log[-3:]}", file=sys.stderr)
            else:
                stack.callback(typist.close)
        yield typist


def find_sshd() -> Path | None:
    """Return the sshd of this machine, where there is an ssh as well."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    return Path(sshd) if sshd is not None and shutil.which("ssh") else None


def open_sshd(stack: ExitStack, sshd: Path, directory: Path, *options: str) -> list[str]:
    """Start an sshd on a private port, with its own keys; return the command line that leads to it.

    Options are those of ssh; the command follows the line. Raises RuntimeError.
    """
    for name in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(make, check=True)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    (directory / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPrintMotd no\nPrintLastLog no\nUseDNS no\n"
    )
    host = (directory / "host.pub").read_text()
    (directory / "known").write_text(f"[127.0.0.1]:{port} {host}")
    # Debian's sshd needs this directory for its sandbox; otherwise only systemd makes it
    empty = Path("/run/sshd")
    if not empty.exists():
        empty.mkdir(0o755)
        stack.callback(empty.rmdir)
    with (directory / "log").open("wb") as log:
        # by its whole path, as it executes itself again
        server = subprocess.Popen(
            [sshd.resolve(), "-D", "-e", "-f", str(directory / "config")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    stack.callback(server.wait)
    stack.callback(server.kill)
    wait_for(lambda: "listening" in (directory / "log").read_text() or server.poll() is not None)
    if server.poll() is not None:
        raise RuntimeError(f"sshd ended with {server.returncode}")
    return [
        *("ssh", "-F", "none", *options, "-q", "-i", str(directory / "user"), "-p", str(port), "-e", "none"),
        *("-o", f"UserKnownHostsFile={directory}/known", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
        # otherwise it would send keys by the clock, every 20 ms
        *("-o", "IgnoreUnknown=ObscureKeystrokeTiming", "-o", "ObscureKeystrokeTiming=no"),
        "root@127.0.0.1",
    ]
