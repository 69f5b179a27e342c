"""Sessions by pjw-init alone: what enters a job that runs, as the launcher has it made (init/session.c)."""

import array
import ctypes
import errno
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from pjw.launcher.processes import ENTERED_SIGNAL
from tests.root.test_spawner import Spawner, collect
from tests.support.init_harness import JOB_UID, Harness, Inotify, Running, command_file, wait_readable
from tests.support.tracer import SUPPORTED, WHY_NOT, Tracer

USER: Final = ("--uid", str(JOB_UID), "--gid", str(JOB_UID))
# struct orders of init.h: rows, columns, two sizes in pixels, whether to hang up
ORDERS: Final = struct.Struct("=4HI")
SERVER: Final = """
import socket, sys
with socket.create_server((sys.argv[1], 8080), family=int(sys.argv[2])) as server:
    print("listens", flush=True)
    with server.accept()[0] as connection:
        connection.sendall(connection.recv(100).upper())
"""


class Session(Running):
    """A session, from its request to its end; `control` is what it reads, `input` its input's file."""

    control: Path
    input: Path

    def tell(self, rows: int = 0, columns: int = 0, *, hang_up: bool = False) -> None:
        """Give its terminal a size, or hang it up."""
        self.control.write_bytes(ORDERS.pack(rows, columns, 0, 0, hang_up))

    def type(self, keys: bytes, *, end: bool = False) -> None:
        """Append to its input; the file's mode says that it is whole."""
        with self.input.open("ab") as file:
            file.write(keys)
        if end:
            self.input.chmod(0o400)

    def wait(self) -> "Session":
        """Wait for its end; it is the spawner's child, who leaves it to the kernel."""
        wait_readable(self.pidfd, "the end of a session")
        return self

    def close(self) -> None:
        """Let go of it: it ends with its job at the latest."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.report.close()


class Entrance:
    """A job that runs, and a spawner that makes sessions in it."""

    def __init__(self, init: Harness, spawner: Spawner) -> None:
        self.spawner: Final = spawner
        self.directory: Final = init.directory
        self.job: Final = init.start("sleep", "600")
        self.sessions: Final[list[Session]] = []

    def request(self, *words: str) -> socket.socket:
        """Have somebody enter; the socket that it reports to."""
        with suppress(ProcessLookupError):
            self.job.send(ENTERED_SIGNAL)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line = ("--report-fd", "4", "--wait", "--enter-fd", "5", "--variable", "PJW_JOB_ID=1", *words)
        with theirs:
            self.spawner.request(encoded(line), [theirs.fileno(), self.job.pidfd])
        return ours

    def enter(
        self,
        *argv: str,
        words: Sequence[str] = ("--control",),
        size: tuple[int, int] = (0, 0),
        files: Sequence[str] | None = None,
    ) -> Session:
        """Start a command in the job, and wait until it was executed, or could not be.

        *files* are what comes with the order; by default what *words* say.
        """
        number = len(self.sessions)
        paths = {
            name: self.directory / f"session-{name}-{number}"
            for name in ("command", "output", "status", "stderr", "control", "input")
        }
        for path in paths.values():
            path.touch(0o600)
        paths["command"].write_bytes(command_file(argv, {"A": "b"}))
        paths["status"].write_bytes(bytes(4096))
        session = Session(
            self.request(), paths["output"], paths["status"], self.directory / "none", paths["stderr"]
        )
        session.control, session.input = paths["control"], paths["input"]
        session.tell(*size)
        self.sessions.append(session)
        optional = {"stderr": "--split-stderr", "control": "--control", "input": "--input"}
        if files is None:
            files = [
                *("command", "output", "status"),
                *(name for name, word in optional.items() if word in words),
            ]
        descriptors = [os.open(paths[name], os.O_RDWR) for name in files]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        session.report.sendmsg([encoded((*USER, *words))], rights)
        for descriptor in descriptors:
            os.close(descriptor)
        session.read_reports(None)
        return session

    def connect(self, *words: str) -> tuple[bytes, socket.socket | None]:
        """Have a connection made to a port in the job: the last report, and the connection."""
        with self.request(*words) as report:
            while True:
                wait_readable(report.fileno(), "a report")
                said, descriptors, _, _ = socket.recv_fds(report, 512, 1)
                if said != b"cloned":
                    return said, socket.socket(fileno=descriptors[0]) if descriptors else None
                os.close(descriptors[0])


def encoded(words: Sequence[str]) -> bytes:
    """Words as they are sent."""
    return b"".join(word.encode() + b"\0" for word in words)


@pytest.fixture
def entrance(init: Harness, binary: Path) -> Iterator[Entrance]:
    """A job to enter."""
    made = Entrance(init, Spawner(binary))
    yield made
    made.job.close()
    for session in made.sessions:
        session.close()
    # the harness closes it once more
    made.job.pidfd = -1
    made.spawner.close()


def shown(session: Session) -> Callable[[str], None]:
    """What waits until a session has shown something."""

    def wait(text: str) -> None:
        watch = Inotify(session.output_path)
        watch.wait_until(lambda: text in session.text)
        watch.close()

    return wait


def test_it_is_in_the_job(entrance: Entrance) -> None:
    """Its user, its processes, its host name, its variables; both outputs, and the record of its end."""
    script = (
        "hostname; id -u; id -G; cat /proc/1/comm; tr '\\0' ' ' </proc/2/cmdline; echo; echo $PJW_JOB_ID $A;"
        " grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; echo beside >&2; exit 3"
    )
    session = entrance.enter("sh", "-c", script, words=("--split-stderr", "--control")).wait()
    assert session.end == "exited 3 none"
    lines = session.text.split()
    assert lines[1:8] == [str(JOB_UID), str(JOB_UID), "pjw-init", "sleep", "600", "1", "b"]
    assert lines[8:] == ["CapEff:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert session.stderr_path.read_text() == "beside\n"


def test_what_is_fed_to_it(entrance: Entrance) -> None:
    """What its input's file has, what comes later, and its end."""
    session = entrance.enter("cat", words=("--control", "--input"))
    session.type(b"one\n")
    shown(session)("one\n")
    session.type(b"two\n", end=True)
    assert session.wait().end == "exited 0 none"
    assert session.text == "one\ntwo\n"


def test_its_terminal(entrance: Entrance) -> None:
    """Of the size that its control file says, at first and later; what is typed, and its end."""
    # the signal ends a read(1) of the shell
    read = "until read line; do :; done; echo got $line; while read line; do :; done; exit 4"
    script = f"trap 'stty size' WINCH; tty; stty size; {read}"
    words = ("--terminal", "--control", "--input")
    session = entrance.enter("sh", "-c", script, words=words, size=(33, 101))
    shown(session)("/dev/pts/0\r\n33 101\r\n")
    session.tell(50, 200)
    shown(session)("50 200\r\n")
    session.type(b"word\r")
    shown(session)("got word\r\n")
    session.type(b"", end=True)
    assert session.wait().end == "exited 4 none"


@pytest.mark.parametrize(
    ("trap", "end"),
    [
        ("echo here; exec sleep 600", "signaled 1 stopped"),
        ("trap 'exit 9' HUP; echo here; while :; do sleep 0.1; done", "exited 9 stopped"),
        ("trap '' HUP; echo here; while :; do sleep 0.1; done", "signaled 9 stopped"),
    ],
)
def test_it_is_hung_up(entrance: Entrance, trap: str, end: str) -> None:
    """SIGHUP, after its grace period SIGKILL; the job goes on."""
    session = entrance.enter("sh", "-c", trap, words=("--control", "--grace", "1"))
    shown(session)("here\n")
    session.tell(hang_up=True)
    assert session.wait().end == end
    assert not select.select([entrance.job.pidfd], [], [], 0)[0]


def test_its_limit_of_output(entrance: Entrance) -> None:
    """It is killed there, and its job is not."""
    session = entrance.enter("yes", words=("--control", "--output-max", "10000")).wait()
    assert session.end == "signaled 9 output_limit"
    assert len(session.output) == 10000
    assert not select.select([entrance.job.pidfd], [], [], 0)[0]


def test_it_ends_with_its_job(entrance: Entrance) -> None:
    """By the kernel, without a record; the spawner need not run for that."""
    session = entrance.enter("sh", "-c", "trap '' TERM; echo here; sleep 600")
    shown(session)("here\n")
    os.kill(entrance.spawner.pid, signal.SIGSTOP)
    try:
        entrance.job.send(signal.SIGTERM)
        entrance.job.wait()
    finally:
        os.kill(entrance.spawner.pid, signal.SIGCONT)
    session.wait()
    assert entrance.job.end.startswith("signaled 15")
    assert len(session.status) == 1


@pytest.fixture
def _nobody_collects() -> Iterator[None]:
    """Orphans of the host are ours, and we collect none: as PID 1 of a container may do."""
    libc, set_child_subreaper = ctypes.CDLL(None), 36
    before = children_of(os.getpid())
    assert libc.prctl(set_child_subreaper, 1) == 0
    yield
    assert libc.prctl(set_child_subreaper, 0) == 0
    for pid in children_of(os.getpid()) - before:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def children_of(pid: int) -> set[int]:
    """The children of a process, ended ones too."""
    return {
        int(child)
        for task in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    }


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
@pytest.mark.usefixtures("_nobody_collects")
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("between", [1, 2])
def test_a_spawner_that_is_killed_meanwhile(entrance: Entrance, between: int, step: int) -> None:
    """Whoever is in between leaves no session, and the job's end waits for nobody outside."""
    with Tracer(entrance.spawner.pid, step, "kill-first", generation=between) as tracer:
        report = entrance.request()
        said = read_to_the_end(report)
    assert tracer.hit
    assert entrance.spawner.end() == -signal.SIGKILL
    assert b"execed" not in said
    entrance.job.send(signal.SIGTERM)
    entrance.job.wait()
    assert entrance.job.end.startswith("signaled 15")


def read_to_the_end(report: socket.socket) -> bytes:
    """All that is reported until nobody has the other end any more."""
    said = b""
    with report, suppress(ConnectionResetError):
        while True:
            wait_readable(report.fileno(), "a report, or its end")
            data, descriptors, _, _ = socket.recv_fds(report, 512, 1)
            for descriptor in descriptors:
                os.close(descriptor)
            if not data:
                break
            said += data
    return said


@pytest.mark.parametrize(
    ("words", "files", "report"),
    [
        pytest.param(("--control",), ("command", "output", "status"), "failed options", id="too few"),
        pytest.param((), ("command", "output", "status", "control"), "failed options", id="too many"),
        pytest.param(("--terminal",), None, "failed options", id="a terminal without its control file"),
        pytest.param(
            ("--terminal", "--split-stderr", "--control"), None, "failed options", id="a terminal's stderr"
        ),
        pytest.param(
            ("--control", "--hostname", "x"), None, "failed options", id="a word of the command line"
        ),
        pytest.param(("--control", "--connect", "80"), None, "failed options", id="another word of that"),
    ],
)
def test_what_is_no_order(
    entrance: Entrance, words: Sequence[str], files: Sequence[str] | None, report: str
) -> None:
    """It is refused before anything is started, and the job goes on."""
    session = entrance.enter("true", words=words, files=files)
    assert session.reports[-1] == f"{report} {errno.EINVAL}"
    session.wait()
    assert session.status == []
    assert not select.select([entrance.job.pidfd], [], [], 0)[0]


def test_a_program_that_is_none(entrance: Entrance) -> None:
    """It is told as for a job."""
    session = entrance.enter("/no/such")
    assert session.reports[-1] == f"failed exec {errno.ENOENT}"
    session.wait()


def test_a_job_that_has_ended(entrance: Entrance) -> None:
    """Nobody can enter it, and the spawner goes on."""
    entrance.job.send(signal.SIGKILL)
    entrance.job.wait()
    with entrance.request() as report:
        wait_readable(report.fileno(), "a report")
        assert report.recv(512).startswith(b"failed clone %d " % errno.ESRCH)
    report, (pidfd,) = entrance.spawner.init()
    report.close()
    assert collect(pidfd) == 0


@pytest.mark.parametrize(
    ("address", "family"),
    [
        pytest.param("127.0.0.1", socket.AF_INET, id="4"),
        pytest.param(
            *("::1", socket.AF_INET6),
            id="6",
            marks=pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 on this host"),
        ),
    ],
)
def test_a_connection(entrance: Entrance, address: str, family: socket.AddressFamily) -> None:
    """To what listens in the job at either loopback address, as its user; the socket is handed over."""
    server = entrance.enter("/usr/bin/python3", "-I", "-S", "-c", SERVER, address, str(int(family)))
    shown(server)("listens\n")
    said, connection = entrance.connect(*USER, "--connect", "8080")
    assert said == b"connected"
    assert connection is not None
    with connection:
        connection.setblocking(True)
        connection.sendall(b"words")
        assert connection.recv(100) == b"WORDS"
    assert server.wait().end == "exited 0 none"


def test_a_port_that_nobody_listens_at(entrance: Entrance) -> None:
    """It is refused as the kernel does."""
    assert entrance.connect(*USER, "--connect", "8080")[0].startswith(
        b"failed connect %d " % errno.ECONNREFUSED
    )


@pytest.mark.parametrize("words", [("--connect", "8080"), (*USER, "--connect", "0")])
def test_a_connection_of_nobody_s(entrance: Entrance, words: Sequence[str]) -> None:
    """Without a user, or without a port, it is refused; the launcher has another spawner then."""
    said, connection = entrance.connect(*words)
    assert (said.startswith(b"failed options %d " % errno.EINVAL), connection) == (True, None)
