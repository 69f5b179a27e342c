"""The spawner, which clones inits: what it takes, what its end costs, and that no init has anything of it."""

import array
import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjw.model import JobState
from pjw.worker import Worker
from pjw.worker.settings import WAITING_INITS
from tests.support.init_harness import ENVIRONMENT, SOURCES, wait_readable
from tests.support.service import spawner_of, wait_for, waiting_inits
from tests.support.worker_harness import Bench, launchers_of, run, start

LINE: Final = ("pjw-init: spawner", "--spawner", "--hostname", "job-1000", "--scratch", "/scratch/1000")
# for an init that waits; the socket of its report comes along as descriptor 4
WAITING: Final = b"--report-fd\x004\x00--wait\x00"
EXIT_SETUP: Final = 125
OPTIONS: Final = re.findall(r'{"([a-z-]+)", (?:required|no)_argument', (SOURCES / "options.c").read_text())


class Spawner:
    """A spawner of our own, and the launcher's end of its socket."""

    def __init__(self, binary: Path, before: Sequence[str] = (), *, with_credentials: bool = False) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, with_credentials)
        actions = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        with theirs:
            actions.insert(0, (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3))  # type: ignore[arg-type]
            if before:
                words = [*before, str(binary), *LINE[1:]]
                self.pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
            else:
                self.pid = os.posix_spawn(binary, LINE, ENVIRONMENT, file_actions=actions)
        self.pidfd: Final = os.pidfd_open(self.pid)

    def request(self, words: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a request."""
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        self.requests.sendmsg([words], rights)

    def init(self, more: bytes = b"") -> tuple[socket.socket, list[int]]:
        """Have an init made; its report socket, and a pidfd of it, which it reports."""
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.request(WAITING + more, [theirs.fileno()])
        wait_readable(report.fileno(), "a report")
        words, descriptors, _, _ = socket.recv_fds(report, 512, 1)
        assert words.split()[0] in (b"cloned", b"failed"), words
        return report, descriptors

    def end(self) -> int:
        """Its exit code, once it has ended; negative for a signal."""
        wait_readable(self.pidfd, "the end of the spawner")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Have it end, if it has not."""
        self.requests.close()
        with suppress(ChildProcessError):
            self.end()
        os.close(self.pidfd)


def collect(pidfd: int) -> int:
    """The exit code of an init, our own child, once it has ended."""
    wait_readable(pidfd, "the end of init")
    info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert info is not None
    return info.si_status


@pytest.fixture
def spawner(binary: Path) -> Iterator[Spawner]:
    """A spawner of our own."""
    made = Spawner(binary)
    yield made
    made.close()


def launchers_spawner() -> int:
    """The pid of the spawner of the worker of this process."""
    [launcher] = launchers_of(os.getpid())
    found = spawner_of(launcher)
    assert found is not None
    return found


def do(*command: str) -> None:
    """Run a program as root on the host."""
    subprocess.run(command, check=True)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process not run meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- in the service


async def test_nobody_notices_that_it_was_killed(bench: Bench, worker: Worker) -> None:
    """Its jobs run on and can be stopped, inits that wait are taken, and the next one has another spawner."""
    job = await start(worker, ["sleep", "60"])
    wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    expected = waiting_inits(bench.state)[job.id + 1]
    killed = launchers_spawner()
    pidfd = os.pidfd_open(killed)
    os.kill(killed, signal.SIGKILL)
    wait_readable(pidfd, "the end of the spawner")
    os.close(pidfd)
    second = await start(worker, ["sleep", "60"])
    assert bench.init_pid(second.id) == expected
    for _ in range(WAITING_INITS + 1):
        assert (await run(worker, ["echo", "words"]))[1] == b"words\n"
    assert launchers_spawner() != killed
    assert (await worker.get(job.id)).state is JobState.RUNNING
    for job_id in (job.id, second.id):
        assert (await worker.stop(job_id, grace_seconds=0)).state is JobState.EXITED


async def test_one_that_is_stopped_holds_up_no_end(bench: Bench, worker: Worker) -> None:
    """Inits are the launcher's children: only who needs a new one waits until the spawner goes on."""
    job = await start(worker, ["sleep", "60"])
    with stopped(launchers_spawner()):
        # limits that nobody guessed: no init that waits will do
        waits = asyncio.ensure_future(start(worker, ["true"], pids_max=7))
        assert (await worker.stop(job.id, grace_seconds=0)).state is JobState.EXITED
        await asyncio.to_thread(wait_for, lambda: bench.cgroups(job.id) == [])
        assert not waits.done()
    await worker.wait((await waits).id)


async def test_an_init_has_nothing_of_its_spawner_s(bench: Bench, worker: Worker) -> None:
    """Neither the socket of its requests, nor what came for another init; and the spawner keeps nothing."""
    job = await start(worker, ["sleep", "60"])
    wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    spawner = launchers_spawner()
    requests = os.readlink(f"/proc/{spawner}/fd/3")
    wait_for(lambda: sorted(os.listdir(f"/proc/{spawner}/fd")) == ["0", "1", "2", "3"])
    sockets = {}
    for init in (bench.init_pid(job.id), *waiting_inits(bench.state).values()):
        links = [os.readlink(f"/proc/{init}/fd/{name}") for name in os.listdir(f"/proc/{init}/fd")]
        sockets[init] = {link for link in links if link.startswith("socket:")}
        assert requests not in links
        assert os.getsid(init) == os.getsid(spawner) == spawner
    # a report of its own, which closes with the exec of its command
    assert sorted(map(len, sockets.values())) == [0, *[1] * WAITING_INITS]
    assert len(set().union(*sockets.values())) == WAITING_INITS
    await worker.stop(job.id, grace_seconds=0)


async def test_it_has_the_mounts_that_jobs_are_shown(bench: Bench) -> None:
    """And no other disk of the host, which stays free to go; one that has gone it lets go of at once."""
    points = [bench.directory / name for name in ("shown", "other")]
    disks = []
    try:
        for point in points:
            point.mkdir()
            do("mount", "-t", "tmpfs", "-o", "size=64k", "pjw-test", str(point))
            device = point.stat().st_dev
            disks.append(f" {os.major(device)}:{os.minor(device)} ")
        worker = await bench.open(visible_paths=(str(points[0]),))
        await run(worker, ["true"])
        first = launchers_spawner()
        table = Path(f"/proc/{first}/mountinfo").read_text()
        assert disks[0] in table
        assert disks[1] not in table
        do("umount", str(points.pop(0)))
        wait_for(lambda: not Path(f"/proc/{first}").exists())
        await run(worker, ["true"])
        # not by its device: the next file system may have that number again
        assert " pjw-test " not in Path(f"/proc/{launchers_spawner()}/mountinfo").read_text()
        await bench.close(worker)
    finally:
        for point in points:
            do("umount", str(point))


async def test_it_ends_with_its_launcher(bench: Bench) -> None:
    """A launcher that ends, in whatever way, has its socket closed."""
    worker = await bench.open()
    await run(worker, ["true"])
    pidfd = os.pidfd_open(launchers_spawner())
    await bench.close(worker)
    wait_readable(pidfd, "the end of the spawner")
    os.close(pidfd)


# --- alone


def test_it_makes_one_init_after_another(spawner: Spawner) -> None:
    """They are our own children, in the place of the spawner's, and end when nobody wants them any more."""
    made = [spawner.init() for _ in range(3)]
    for report, (pidfd,) in made:
        report.close()
        assert collect(pidfd) == 0
    spawner.requests.close()
    assert spawner.end() == 0


def test_a_request_of_a_launcher_that_is_gone(spawner: Spawner) -> None:
    """Its successor may have looked for jobs already: none may come to be after that."""
    before = set(Path("/proc/thread-self/children").read_text().split())
    for _ in range(3):
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        report.close()
        with theirs:
            spawner.request(WAITING, [theirs.fileno()])
    report, (pidfd,) = spawner.init()
    new = set(Path("/proc/thread-self/children").read_text().split()) - before
    assert len(new) == 1
    report.close()
    assert collect(pidfd) == 0


@pytest.mark.parametrize(
    ("words", "descriptors"),
    [
        pytest.param(WAITING, 0, id="no descriptor"),
        pytest.param(WAITING[:-1], 1, id="cut short"),
        pytest.param(b"--report-fd\x004\x00", 1, id="an init that does not wait"),
        pytest.param(b"--report-fd\x004\x00--uid\x007\x00--gid\x007\x00true\x00", 1, id="a command"),
        pytest.param(b"--wait\x00", 1, id="no report"),
        pytest.param(WAITING + b"--spawner\x00", 1, id="another spawner"),
        pytest.param(WAITING + b"--no-such-option\x00", 1, id="an option that is none"),
        pytest.param(WAITING + b"--cgroup-fd\x0099\x00", 1, id="a descriptor that did not come"),
        pytest.param(WAITING + b"--wait\x00" * 1100, 1, id="too many words"),
        pytest.param(WAITING, 100, id="too many descriptors"),
    ],
)
def test_what_is_no_request_ends_it(spawner: Spawner, words: bytes, descriptors: int) -> None:
    """The launcher sends none such: it starts another spawner, which has seen nothing of this."""
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with report, theirs:
        spawner.request(words, [theirs.fileno()] * descriptors)
        assert spawner.end() == EXIT_SETUP
        theirs.close()
        # when it could be told on what: never that an init was cloned
        assert not report.recv(512).startswith(b"cloned")


def test_it_has_one_template(spawner: Spawner, tmp_path: Path) -> None:
    """Inits are made in what the first request says; for other mounts the launcher starts another spawner."""
    mounts = b"--mount\0/\0"
    for _ in range(2):
        report, (pidfd,) = spawner.init(mounts)
        report.close()
        assert collect(pidfd) == 0
    # the template's own root, and the host's in it
    points = [line.split()[4] for line in Path(f"/proc/{spawner.pid}/mountinfo").read_text().splitlines()]
    assert sorted(points) == ["/", "/host/0"]
    report, _ = spawner.init(mounts + b"--mount\0" + bytes(tmp_path) + b"\0")
    report.close()
    assert spawner.end() == EXIT_SETUP


@pytest.mark.parametrize("told", ["/etc", "etc"])
def test_the_root_of_a_template_comes_first(spawner: Spawner, told: str) -> None:
    """Without it no path of the host's could be found."""
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with report, theirs:
        spawner.request(WAITING + b"--mount\0" + told.encode() + b"\0", [theirs.fileno()])
        assert spawner.end() == EXIT_SETUP


def test_credentials_are_no_descriptors(binary: Path) -> None:
    """What else a socket may bring (SO_PASSCRED in unix(7)) is not read as their numbers."""
    spawner = Spawner(binary, with_credentials=True)
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with report, theirs:
        spawner.request(WAITING, [theirs.fileno()])
        assert spawner.end() == EXIT_SETUP
    spawner.close()


def test_what_it_cannot_do_is_told_to_the_first_request(binary: Path) -> None:
    """Without CAP_SETPCAP no init could be bounded: the launch that is refused says so."""
    less = ("setpriv", "--inh-caps", "-setpcap", "--bounding-set", "-setpcap", "--")
    spawner = Spawner(binary, less)
    try:
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with report, theirs:
            spawner.request(WAITING, [theirs.fileno()])
            assert spawner.end() == EXIT_SETUP
            assert report.recv(512).startswith(b"failed bounding-set %d " % errno.EPERM)
    finally:
        spawner.close()


def words() -> st.SearchStrategy[bytes]:
    """Words of a request, right ones among them; the last may be cut short."""
    option = st.sampled_from(OPTIONS).map(lambda name: f"--{name}".encode())
    value = st.sampled_from(
        (b"4", b"5", b"0", b"-1", b"/etc", b"/nonexistent", b"A=b", b"x" * 5000, b"--", b"")
    )
    word = st.one_of(option, option, value, st.binary(max_size=20))
    texts = st.lists(word, max_size=10).map(lambda some: b"".join(each + b"\0" for each in some))
    return st.one_of(texts, texts.map(lambda text: WAITING + text), st.binary(max_size=200))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=words().filter(bool), count=st.integers(0, 4))
def test_any_request(binary: Path, text: bytes, count: int) -> None:
    """It refuses, or an init is made, or says why not; nothing hangs, and no other end is there."""
    spawner = Spawner(binary)
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with report:
        with theirs:
            spawner.request(text, [theirs.fileno()] * count)
        spawner.requests.close()
        while True:
            wait_readable(report.fileno(), "a report")
            said, descriptors, _, _ = socket.recv_fds(report, 512, 1)
            if said == b"cloned":
                # an init that waits ends when nobody wants it any more
                report.shutdown(socket.SHUT_WR)
                assert collect(descriptors[0]) in (0, EXIT_SETUP)
                break
            if not said:
                break
            assert said.startswith(b"failed ")
    assert spawner.end() in (0, EXIT_SETUP)
    os.close(spawner.pidfd)
