"""A real pjwd on loopback with its own certificates and state, and a real pjw to talk to it.

Raw calls (`channel`, `stub`) go around pjw, for what pjw itself would never send.
"""

import errno
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

# gRPC reads both once, when imported: tests start processes beside its threads, and its
# complaints about refused handshakes are what many of them ask for.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from pjw import Client
from pjw.certs import authority
from pjw.launcher.policy import instance_name
from pjw.launcher.processes import status_of
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support import pjwd_with

BIN: Final = Path(sys.executable).parent
START_SECONDS: Final = 60
CALL_SECONDS: Final = 60
# Every method of the service: (name, whether its answer is a stream), from the contract itself.
METHODS: Final = [
    (method.name, method.server_streaming)
    for method in pb.DESCRIPTOR.services_by_name["JobWorkerService"].methods
]


class Service:
    """pjwd in a directory: `certs/` (ca, server, and a client for each name), `state/`, `pjwd.log`."""

    # what is changed in the server before it starts: a function of tests/support/pjwd_with.py
    change: Callable[[], None] | None = None
    # the program that is started
    pjwd = BIN / "pjwd"
    # the names and addresses in the certificate that it makes for itself
    hosts: Sequence[str] = ("localhost", "127.0.0.1")

    def __init__(
        self,
        directory: Path,
        clients: Sequence[str] = ("alice", "bob"),
        config: str | None = None,
        certs: Path | None = None,
    ) -> None:
        """Make the certificates, unless there are some in *certs*."""
        self.directory: Final = directory
        self.certs: Final = certs or directory / "certs"
        self.state = directory / "state"
        self.log: Final = directory / "pjwd.log"
        self.config = config
        self.address = "127.0.0.1:0"
        self.process: subprocess.Popen[bytes] | None = None
        if certs is None:
            authority.init_directory(str(self.certs))
            authority.write_server(str(self.certs), self.hosts)
            for name in clients:
                authority.write_client(str(self.certs), name)

    def command(self, *extra: str) -> list[str]:
        """The command line of `pjwd serve`."""
        certs = self.certs
        command = [str(self.pjwd), "serve", "--listen", self.address, "--state-dir", str(self.state)]
        command += ["--ca-crt", str(certs / "ca.crt")]
        command += ["--server-crt", str(certs / "server.crt"), "--server-key", str(certs / "server.key")]
        if self.config is not None:
            path = self.directory / "pjwd.toml"
            path.write_text(self.config)
            command += ["--config", str(path)]
        # `make coverage`: what the server has measured is written by itself, and it may write nowhere else
        measured = os.path.dirname(os.environ.get("COVERAGE_FILE", ""))
        if self.change is not None or measured:
            name = self.change.__name__ if self.change is not None else ""
            command[:1] = [sys.executable, "-P", str(Path(pjwd_with.__file__)), name, measured]
        return [*command, *extra]

    def start(self, *extra: str, env: dict[str, str] | None = None) -> Self:
        """Start pjwd, and wait until it says that it is ready; a restart keeps the port."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*extra), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        deadline = time.monotonic() + START_SECONDS
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while True:
                text = self.log.read_bytes()[start:].decode()
                if ready := re.search(r"^pjwd: ready on (\S+:\d+)$", text, re.MULTILINE):
                    self.address = ready[1]
                    return self
                # a file has no event that says "a line was written"; its writer's end has one
                if select.select([pidfd], [], [], 0.02)[0] or time.monotonic() > deadline:
                    raise AssertionError(f"pjwd did not become ready:\n{text}")
        finally:
            os.close(pidfd)

    def await_log(self, words: str) -> None:
        """Wait until its log has *words*: a thread writes it, at times after the call has been answered."""
        try:
            wait_for(lambda: words in self.log.read_text())
        except AssertionError:
            raise AssertionError(f"no {words!r} in the log:\n{self.log.read_text()}") from None

    @property
    def pid(self) -> int:
        """The server's pid."""
        assert self.process is not None
        return self.process.pid

    def launcher_pid(self) -> int:
        """The launcher's pid: the server's child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        [launcher] = [
            int(pid) for pid in children if b"pjw.launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return launcher

    def spawner_pid(self) -> int | None:
        """The pid of the process that clones inits: a child of the launcher's; None before the first init."""
        return spawner_of(self.launcher_pid())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End pjwd with a signal; its exit code."""
        assert self.process is not None
        os.kill(self.pid, number)
        code = self.process.wait(30)
        self.process = None
        return code

    def kill(self, what: str) -> None:
        """kill -9 of "server", "launcher" or "both", and wait for the server's end; `start` may follow."""
        launcher, server = self.launcher_pid(), self.pid
        assert self.process is not None
        if what != "server":
            os.kill(launcher, signal.SIGKILL)
        if what != "launcher":
            os.kill(server, signal.SIGKILL)
        self.process.wait(CALL_SECONDS)
        self.process = None

    def files(self, client: str = "alice") -> tuple[str, str, str]:
        """What the library needs of a client: the authority, its certificate, its key."""
        ca, crt, key = (str(self.certs / name) for name in ("ca.crt", f"{client}.crt", f"{client}.key"))
        return ca, crt, key

    def client(self, name: str = "alice", *, all_clients: bool = False) -> Client:
        """A client of the library."""
        return Client(self.address, *self.files(name), all_clients=all_clients)

    def environment(self, client: str = "alice") -> dict[str, str]:
        """What pjw needs to know, as environment variables."""
        ca, crt, key = self.files(client)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "PJW_SERVER": self.address,
            "PJW_CA_CRT": ca,
            "PJW_CLIENT_CRT": crt,
            "PJW_CLIENT_KEY": key,
        }

    def pjw(
        self, *arguments: str | bytes, client: str = "alice", **env: str
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run pjw to its end; whatever it was given, it must not show a traceback."""
        done = subprocess.run(
            [str(BIN / "pjw"), *arguments],
            env={**self.environment(client), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    def refused(self, *arguments: str | bytes, client: str = "alice", **env: str) -> tuple[int, str]:
        """Run pjw, which must fail with words and nothing on stdout; its exit code, its words."""
        done = self.pjw(*arguments, client=client, **env)
        assert (done.stdout, done.returncode > 0) == (b"", True), (arguments, done)
        return done.returncode, done.stderr.decode()

    def ok(self, *arguments: str, client: str = "alice") -> str:
        """Run pjw, which must succeed and say nothing on stderr; its output, as text."""
        done = self.pjw(*arguments, client=client)
        assert (done.returncode, done.stderr) == (0, b""), (arguments, done)
        return done.stdout.decode()

    def at_terminal(self, *arguments: str, columns: int = 80, client: str = "alice") -> str:
        """Run pjw with a terminal as its stdout and stderr; what the terminal was sent, without colours."""
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        environment = {**self.environment(client), "TERM": "xterm", "NO_COLOR": "1"}
        with subprocess.Popen(
            [str(BIN / "pjw"), *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        ):
            os.close(theirs)
            seen = bytearray()
            # EIO is a terminal's word for "all have hung up"
            with suppress(OSError):
                while data := os.read(ours, 65536):
                    seen += data
        os.close(ours)
        assert b"Traceback" not in seen, seen
        return seen.decode()

    def popen(self, *arguments: str, client: str = "alice") -> "Running":
        """Start pjw; the caller ends it."""
        return self.program([str(BIN / "pjw"), *arguments], client)

    def program(self, command: list[str], client: str = "alice") -> "Running":
        """Start a program that calls this service as a client; the caller ends it."""
        return Running(
            command,
            env=self.environment(client),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @contextmanager
    def channel(
        self, client: str | tuple[str, str] | None = "alice", address: str = ""
    ) -> Iterator[grpc.Channel]:
        """A connection of its own, as a client by name, by (crt, key) files, or as nobody."""
        crt: bytes | None = None
        key: bytes | None = None
        if client is not None:
            named = (str(self.certs / f"{client}.crt"), str(self.certs / f"{client}.key"))
            crt, key = (Path(path).read_bytes() for path in (named if isinstance(client, str) else client))
        credentials = grpc.ssl_channel_credentials((self.certs / "ca.crt").read_bytes(), key, crt)
        options = [
            ("grpc.ssl_target_name_override", "localhost"),
            ("grpc.max_receive_message_length", 16 * 1024 * 1024),
            ("grpc.use_local_subchannel_pool", 1),
            # A refused connection may be tried again at once. Not the minimum as well: that is how long a
            # handshake may take, which is much on a busy machine.
            ("grpc.initial_reconnect_backoff_ms", 20),
        ]
        with grpc.secure_channel(address or self.address, credentials, options) as channel:
            yield channel

    @contextmanager
    def stub(self, client: str | tuple[str, str] | None = "alice") -> Iterator[JobWorkerServiceStub]:
        """Typed calls over a connection of its own."""
        with self.channel(client) as channel:
            yield JobWorkerServiceStub(channel)

    def answer(self, method: str, request: bytes, client: str | tuple[str, str] | None = "alice") -> "Answer":
        """Everything that comes back for raw bytes: each message, code, details and all metadata."""
        with self.channel(client) as channel:
            return ask(channel, method, request)

    def start_job(self, command: str, client: str = "alice") -> int:
        """Start a job by a raw call, which is faster than pjw; its id."""
        with self.stub(client) as stub:
            return stub.Start(pb.StartRequest(command=command), timeout=CALL_SECONDS).job.id

    def job(self, job_id: int, client: str = "alice") -> pb.Job:
        """A job, by a raw call."""
        with self.stub(client) as stub:
            return stub.Get(pb.GetRequest(id=job_id), timeout=CALL_SECONDS).job

    def descriptors(self) -> int:
        """How many descriptors the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def open_outputs(self, job_id: int) -> int:
        """How many descriptors of a job's output the server has open: one for each follower."""
        directory, found = f"/proc/{self.pid}/fd", 0
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                found += os.readlink(f"{directory}/{name}").endswith(f"/jobs/{job_id}/output")
        return found

    def made(self) -> tuple[list[int], list[str], list[str], list[Path]]:
        """All that a job consists of on this host: a request that is refused must leave it unchanged."""
        ids: list[int] = []
        for client in ("alice", "bob"):
            with self.stub(client) as stub:
                ids += [job.id for job in stub.List(pb.ListRequest()).jobs]
        # what a job that is listed has may go at any time: its end is told before the last removals
        found = set(os.listdir(self.state / "jobs")) - {"sessions"}
        jobs = [name for name in found if int(name) not in ids]
        scratch = [path.name for path in self.scratch() if int(path.name) not in ids]
        cgroups = [path for path in self.job_cgroups() if int(path.name.removeprefix("job-")) not in ids]
        return ids, jobs, scratch, cgroups

    def tell(self, job_id: int) -> None:
        """Send a line to a job that began with ASK."""
        tell(self.state, job_id)

    def job_cgroups(self) -> list[Path]:
        """Every cgroup of a job of this service, whatever the version."""
        return job_cgroups(self.state)

    def scratch(self) -> list[Path]:
        """The scratch directories of jobs."""
        return job_scratch(self.state)

    def init_pid(self, job_id: int) -> int:
        """The pid, outside, of a job's init, which is PID 1 of the job; sessions have the same name."""
        group = next(group for group in self.job_cgroups() if group.name == f"job-{job_id}")
        pids = (group / "cgroup.procs").read_text().split()
        return next(int(pid) for pid in pids if status_of(pid, b"NSpid")[1:] == [b"1"])


def spawner_of(launcher: int) -> int | None:
    """The process that clones inits for a launcher, if it has one."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    # a new init still has its command line; it is younger
    for pid in children:
        # an init may end at any moment
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"pjw-init: spawner\0"):
                return int(pid)
    return None


def reloaded(service: Service, config: str) -> list[str]:
    """Write another configuration and have it read; what the log says of it."""
    start = service.log.stat().st_size
    (service.directory / "pjwd.toml").write_text(config)
    os.kill(service.pid, signal.SIGHUP)

    def said() -> list[str]:
        lines = service.log.read_bytes()[start:].decode().splitlines(keepends=True)
        return [line.removeprefix("pjwd: ") for line in lines if line.endswith("\n")]

    wait_for(lambda: "configuration" in "".join(said()))
    return [line.rstrip() for line in said() if "certificates" not in line]


def tell(state_dir: Path, job_id: int) -> None:
    """Send a line to a job that began with ASK (worker_harness.py), as soon as it has come so far."""
    ask = state_dir / "scratch" / str(job_id) / "ask"

    def told() -> bool:
        try:
            # never blocks: the job holds the fifo open for both
            descriptor = os.open(ask, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):
                raise
            return False
        os.write(descriptor, b"go\n")
        os.close(descriptor)
        return True

    wait_for(told)


def packs(pid: int) -> bool:
    """Whether a process is the program for archives, and no longer the init that it was made by."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"pjw-archive\0")
    return False


def job_cgroups(state_dir: Path) -> list[Path]:
    """Every cgroup of a job that belongs to a state directory."""
    # before and after: one that waits may come, and go when the host mounts something
    waiting = waiting_ids(state_dir)
    found = [path for parent in instance_cgroups(state_dir) for path in jobs_below(parent)]
    waiting |= waiting_ids(state_dir)
    return [path for path in found if path.name not in {f"job-{job_id}" for job_id in waiting}]


def jobs_below(instance: Path) -> list[Path]:
    """The cgroup of each job below an instance's, also of those that wait, whatever is between."""
    return [Path(found) for found, _, _ in os.walk(instance) if os.path.basename(found).startswith("job-")]


def job_scratch(state_dir: Path) -> list[Path]:
    """Every scratch directory of a job that belongs to a state directory."""
    waiting = waiting_ids(state_dir)
    found = sorted(path for place in scratch_places(state_dir) for path in place.glob("*"))
    waiting |= waiting_ids(state_dir)
    return [path for path in found if path.name not in {str(job_id) for job_id in waiting}]


def scratch_places(state_dir: Path) -> list[Path]:
    """Where scratch directories of a state directory may be: what its launcher has written down."""
    known = state_dir / "scratch-dirs"
    if not known.exists():
        return [state_dir / "scratch"]
    return [Path(os.fsdecode(path)) for path in known.read_bytes().split(b"\0") if path]


def waiting_ids(state_dir: Path) -> set[int]:
    """The ids for which the launcher has an init that waits: their scratch directories are root's alone."""
    found = set()
    for path in (path for place in scratch_places(state_dir) for path in place.glob("*")):
        with suppress(FileNotFoundError):
            if (path.lstat().st_uid, path.lstat().st_gid) == (0, 0):
                found.add(int(path.name))
    return found


def instance_cgroups(state_dir: Path) -> list[Path]:
    """The directory in each hierarchy that is for the jobs of a state directory alone."""
    instance = instance_name(os.path.realpath(state_dir))
    return [Path(found) for found, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(found) == instance]


def waiting_inits(state_dir: Path) -> dict[int, int]:
    """The pids of the inits that wait, by the ids that they wait for."""
    found, instances = {}, instance_cgroups(state_dir)
    for job_id in waiting_ids(state_dir):
        # an init enters by itself on v1: when it is in all of them, it is there
        groups = [
            path / "cgroup.procs"
            for instance in instances
            for path in jobs_below(instance)
            if path.name == f"job-{job_id}"
        ]
        pids = {path.read_text().strip() for path in groups if path.exists()}
        if len(pids) == 1 and pids != {""}:
            found[job_id] = int(pids.pop())
    return found


def end_all(state_dir: Path) -> None:
    """After a failure: leave no job on the machine, without pjw's help; server and launcher have ended."""
    instances = instance_cgroups(state_dir)
    # also those of inits that waited for a job when their launcher was killed
    groups = [path for parent in instances for path in jobs_below(parent)]
    # all of them first: thousands end beside each other
    for group in groups:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    for group in groups:
        wait_for(lambda: not (group / "cgroup.procs").read_text())  # noqa: B023
        group.rmdir()
    for instance in instances:
        for path, _, _ in os.walk(instance, topdown=False):
            os.rmdir(path)


class Running(subprocess.Popen[bytes]):
    """A process that a failed test does not wait for."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for its end; bring it about when the test has failed."""
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)  # type: ignore[arg-type]


Answer = tuple[
    list[bytes], grpc.StatusCode, str, list[tuple[str, str | bytes]], list[tuple[str, str | bytes]]
]


def ask(channel: grpc.Channel, method: str, request: bytes, timeout: float = CALL_SECONDS) -> Answer:
    """Call any method with raw bytes; messages, code, details, initial and trailing metadata."""
    # the server's side of a unary call looks the same on the wire as a stream of one
    start: Any = channel.unary_stream(f"/pjw.v1.JobWorkerService/{method}")
    call = start(request, timeout=timeout)
    messages: list[bytes] = []
    with suppress(grpc.RpcError):
        messages.extend(call)
    first, last = (
        [(key, value) for key, value in pairs or ()]
        for pairs in (call.initial_metadata(), call.trailing_metadata())
    )
    return messages, call.code(), call.details() or "", first, last


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for what has no event; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
