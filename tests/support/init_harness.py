"""Runs pjw-init as the launcher does: with a report socket, an output file and a status file.

It never runs a job's command by other means, and it leaves no process behind.
"""

import array
import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from pjw.launcher.processes import status_of

SOURCES: Final = Path(__file__).resolve().parents[2] / "src/init"
# The command that the head of init.h gives to whoever builds it by hand.
BUILD: Final = (
    *("gcc", "-std=gnu17", "-Wall", "-Wextra", "-Werror", "-Os", "-static"),
    *("-ffunction-sections", "-Wl,--gc-sections"),
)
COMMAND_MAX_BYTES: Final = (1 << 20) + (1 << 16)
DEADLINE_SECONDS: Final = 60.0
ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/run/job"}
# of this run alone: another may be under way on the same machine
JOB_UID: Final = 300_000 + os.getpid()

# Whether root may raise hard limits, and set the least of oom_score_adj: in some containers it may not.
HAS_SYS_RESOURCE: Final = bool(int(status_of("self", b"CapEff")[0], 16) & 1 << 24)

_libc = ctypes.CDLL(None, use_errno=True)


def build_init(directory: Path) -> Path:
    """Name the binary to test: $PJW_INIT, or one built here by the documented command."""
    if named := os.environ.get("PJW_INIT"):
        return Path(named)
    binary = directory / "pjw-init"
    subprocess.run([*BUILD, "-o", binary, *sorted(SOURCES.glob("*.c"))], check=True)
    return binary


def command_file(argv: Sequence[str], env: Mapping[str, str] | None = None, workdir: str = "") -> bytes:
    """What tells init what to run."""
    variables = [f"{name}={value}" for name, value in (env or {}).items()]
    return b"".join(word.encode() + b"\0" for word in (workdir, *variables, "", *argv))


def wait_readable(fd: int, doing: str) -> None:
    """Wait for *fd*, at most until the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(DEADLINE_SECONDS * 1000):
        raise TimeoutError(f"nothing happened within {DEADLINE_SECONDS} s: {doing}")


@dataclass
class Running:
    """One init, from its clone to its end.

    `reports` are in words, that of a failure without `operation`: what could not be done.
    """

    report: socket.socket
    output_path: Path
    status_path: Path
    times_path: Path
    stderr_path: Path
    reports: list[str] = field(default_factory=list)
    pidfd: int = -1
    exit_code: int | None = None
    operation: str = ""

    def read_reports(self, at_clone: signal.Signals | None) -> None:
        """Read until init has closed the report socket: exec was confirmed, or a step failed.

        *at_clone* is sent to init as soon as it exists, long before it has started anything.
        """
        while True:
            wait_readable(self.report.fileno(), "a report")
            try:
                data, ancillary, _, _ = self.report.recvmsg(1024, socket.CMSG_SPACE(4))
            except ConnectionResetError:
                return
            if not data:
                return
            words = data.decode(errors="backslashreplace").split(" ", 3)
            self.reports.append(" ".join(words[:3]))
            self.operation = "".join(words[3:])
            for _, _, payload in ancillary:
                (self.pidfd,) = array.array("i", payload)
                if at_clone is not None:
                    self.send(at_clone)

    def send(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> "Running":
        """Wait for init's end and reap it; negative exit codes are signals."""
        if self.exit_code is None and self.pidfd >= 0:
            wait_readable(self.pidfd, "the end of init")
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            assert info is not None
            self.exit_code = info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
        return self

    def wait_for_output(self, text: str) -> None:
        """Wait until *text* was written."""
        watch = Inotify(self.output_path)
        watch.wait_until(lambda: text in self.text)
        watch.close()

    def close(self) -> None:
        """End what is left, so that a failed test leaves no job."""
        if self.pidfd >= 0:
            if self.exit_code is None:
                self.send(signal.SIGKILL)
                self.wait()
            os.close(self.pidfd)
        self.report.close()

    @property
    def pid(self) -> int:
        """init's pid outside, from its pidfd."""
        lines = Path(f"/proc/self/fdinfo/{self.pidfd}").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))

    @property
    def output(self) -> bytes:
        return self.output_path.read_bytes()

    @property
    def text(self) -> str:
        return self.output.decode()

    @property
    def times(self) -> list[tuple[int, int]]:
        """When output was written: nanoseconds, and where what was read until then ends."""
        return list(struct.iter_unpack("=qQ", self.times_path.read_bytes()))

    @property
    def status(self) -> list[list[str]]:
        """The records of the status file, as words."""
        return [line.split() for line in self.status_path.read_bytes().split(b"\0")[0].decode().splitlines()]

    @property
    def end(self) -> str:
        """How it ended, without the time: `exited 0 none`."""
        (_, ended) = self.status
        assert ended[0] == "ended"
        return " ".join(ended[2:])


class Harness:
    """Starts inits in a directory of its own; close() ends them all."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary: Final = binary
        self.directory: Final = directory
        self._running: Final[list[Running]] = []

    def start(
        self,
        *argv: str,
        options: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
        pass_fds: Sequence[int] = (),
        output_fd: int | None = None,
        before: bytes = b"",
        raw_command: bytes | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str = "",
        split_stderr: bool = False,
        at_clone: signal.Signals | None = None,
    ) -> Running:
        """Start *argv* and wait until it was executed, or could not be.

        *environment* is init's own, *env* what the client adds.
        """
        number = len(self._running)
        output_path, status_path, times_path, stderr_path = (
            self.directory / f"{name}-{number}" for name in ("output", "status", "times", "stderr")
        )
        output_path.write_bytes(before)
        status_path.write_bytes(bytes(4096))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        running = Running(ours, output_path, status_path, times_path, stderr_path)
        self._running.append(running)
        command_fd = os.memfd_create("command")
        output = os.open(output_path, os.O_RDWR | os.O_CLOEXEC) if output_fd is None else os.dup(output_fd)
        status = os.open(status_path, os.O_RDWR | os.O_CLOEXEC)
        files = [command_fd, output, status]
        files.append(os.open(times_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
        if split_stderr:
            files.append(os.open(stderr_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
            options = [*options, "--split-stderr", "--stderr-fd", str(files[-1])]
        os.write(command_fd, command_file(argv, env or {}, workdir) if raw_command is None else raw_command)
        command = [
            *(str(self.binary), "--report-fd", str(theirs.fileno()), "--command-fd", str(command_fd)),
            *("--output-fd", str(output), "--status-fd", str(status), "--times-fd", str(files[3])),
            *("--uid", str(JOB_UID), "--gid", str(JOB_UID), *options),
        ]
        inherited = (theirs.fileno(), *files, *pass_fds)
        stage0 = subprocess.Popen(
            command, env=dict(environment), pass_fds=inherited, stderr=subprocess.PIPE, extra_groups=[4, 27]
        )
        theirs.close()
        for fd in files:
            os.close(fd)
        running.read_reports(at_clone)
        _, errors = stage0.communicate(timeout=DEADLINE_SECONDS)
        if errors:
            running.reports.append(errors.decode())
        return running

    def order(
        self,
        *words: str,
        script: str = "",
        more_fds: Sequence[int] = (),
        options: Sequence[str] = (),
        with_credentials: bool = False,
    ) -> Running:
        """Start an init that waits, give it an order for a script, and wait until that was executed, or not.

        *more_fds* come behind the descriptors that every order has. *options* are init's own.
        *with_credentials*: the kernel adds those of the sender (SO_PASSCRED in unix(7)), and no descriptor
        comes along.
        """
        number = len(self._running)
        files = [self.directory / f"{name}-{number}" for name in ("output", "status", "times", "stderr")]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        running = Running(ours, files[0], files[1], files[2], files[3])
        self._running.append(running)
        fds = [os.memfd_create("command"), *(os.open(path, os.O_RDWR | os.O_CREAT) for path in files[:3])]
        os.write(fds[0], command_file(["/bin/sh", "-c", script]))
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, with_credentials)
        rights = (
            []
            if with_credentials
            else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*fds, *more_fds]))]
        )
        ours.sendmsg([b"".join(word.encode() + b"\0" for word in words)], rights)
        stage0 = subprocess.Popen(
            [str(self.binary), "--report-fd", str(theirs.fileno()), "--wait", *options],
            env=dict(ENVIRONMENT),
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        for fd in fds:
            os.close(fd)
        running.read_reports(None)
        stage0.wait(DEADLINE_SECONDS)
        return running

    def run(self, *argv: str, **how: object) -> Running:
        """Start *argv* and wait for its end."""
        return self.start(*argv, **how).wait()  # type: ignore[arg-type]

    def sh(self, script: str, **how: object) -> Running:
        """Run a shell script to its end."""
        return self.run("/bin/sh", "-c", script, **how)

    def python(self, script: str, **how: object) -> Running:
        """Run a Python script to its end, by the system's interpreter, which a job may read."""
        return self.run("/usr/bin/python3", "-I", "-S", "-c", script, **how)

    def by_hand(self, *argv: str, options: Sequence[str] = ()) -> "subprocess.CompletedProcess[bytes]":
        """Run *argv* as from a root shell, with no report."""
        return subprocess.run(
            [str(self.binary), "--uid", str(JOB_UID), "--gid", str(JOB_UID), *options, "--", *argv],
            env=ENVIRONMENT,
            capture_output=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )

    @contextlib.contextmanager
    def by_hand_open(self, *argv: str) -> "Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]":
        """Start *argv* as from a root shell, with its output in a pipe; it is gone afterwards."""
        command = [str(self.binary), "--uid", str(JOB_UID), "--gid", str(JOB_UID), "--", *argv]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield process, process.stdout
            finally:
                process.kill()

    def close(self) -> None:
        for running in self._running:
            running.close()


def processes_of(uid: int) -> list[int]:
    """Every process on this host with that real uid, zombies too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"\nUid:\t{uid}\t" in status:
                found.append(int(entry.name))
    return found


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def small_tmpfs(size_bytes: int) -> int:
    """A tmpfs of that size that is mounted nowhere: the descriptor of its root, gone when closed."""
    fsopen, fsconfig, fsmount = 430, 431, 432
    set_string, create = 1, 6
    fs = _checked(_libc.syscall(fsopen, b"tmpfs", 1))
    try:
        _checked(_libc.syscall(fsconfig, fs, set_string, b"size", str(size_bytes).encode(), 0))
        _checked(_libc.syscall(fsconfig, fs, create, None, None, 0))
        return _checked(_libc.syscall(fsmount, fs, 1, 0))
    finally:
        os.close(fs)


class Inotify:
    """A watch of one file for IN_MODIFY, or for another event."""

    def __init__(self, path: Path, event: int = 0x2) -> None:
        self.fd: Final = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        _checked(_libc.inotify_add_watch(self.fd, bytes(path), event))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for *condition*, looking at it only at first and when an event has come."""
        while not condition():
            wait_readable(self.fd, "an event of inotify")
            os.read(self.fd, 65536)

    def close(self) -> None:
        os.close(self.fd)
