"""The launcher's socket in the hands of a broken or hostile server: it refuses or ends, and never acts."""

import array
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

import pytest

from pjw.launcher import protocol
from pjw.launcher.phases import PERMITTED, InitPhase
from pjw.launcher.policy import JOB_ID_MAX
from pjw.launcher.protocol import (
    Account,
    Accounted,
    Adopt,
    Adopted,
    ClientMeasured,
    Connect,
    Departed,
    Done,
    Ended,
    Entered,
    Exec,
    Gpus,
    Hello,
    ImageTable,
    JobIdPage,
    JobIds,
    Kill,
    Launch,
    Launched,
    Measure,
    MeasureClient,
    Measured,
    OpenAuditLog,
    Opened,
    OpenFile,
    Ready,
    Refused,
    ReloadMounts,
    Remaining,
    Remains,
    Remove,
    RemoveWorkspace,
    Request,
    SetShare,
    ShareSet,
    Terminate,
)
from pjw.model import GroupUse, JobState, Share, Sums, Usage
from pjw.worker.settings import WAITING_INITS
from pjw.worker.status_record import RECORD_BYTES, parse_record
from tests.support.init_harness import command_file
from tests.support.service import instance_cgroups, wait_for, waiting_ids, waiting_inits
from tests.support.tracer import SUPPORTED, WHY_NOT, Tracer
from tests.support.worker_harness import DEADLINE_SECONDS, NO_LIMITS, Bench, start

Descriptors = list[int]
# as it is on the wire
SHARE: Final[dict[str, Any]] = {"weight": 1, "sums": dict(Sums().items())}


# the requests about a job, but for its launch: those that change it come last
ABOUT_JOB: Final[dict[str, Callable[[int], Request]]] = {
    "adopt": Adopt,
    "terminate": partial(Terminate, signal=signal.SIGWINCH),
    "remains": Remains,
    "account": Account,
    "departed": Departed,
    "kill": partial(Kill, init_too=True),
    "remove": Remove,
}


class Peer:
    """A launcher of our own, and the other end of its socket."""

    def __init__(self, bench: Bench, *, greet: bool = True, **policy: Any) -> None:
        self.bench: Final = bench
        self.uid: Final = bench.settings.uid_first
        self._errors: Final[IO[bytes]] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # as worker/launcher_process.py does it, but with its words kept
            self.pid: Final = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-B", "-m", "pjw.launcher"],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, self._errors.fileno(), 2),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                ],
            )
        self.socket.settimeout(DEADLINE_SECONDS)
        # what is stopped and removed at the end
        self.jobs: Final[list[int]] = []
        self._code: int | None = None
        bench.state.mkdir(exist_ok=True)
        self.hello: Final = replace(
            Hello(
                str(bench.state),
                self.uid,
                10,
                NO_LIMITS,
                floor=NO_LIMITS,
                waiting_inits=WAITING_INITS,
                hidden_paths=(),
                visible_paths=(),
                operator_files=(),
            ),
            **policy,
        )
        if greet:
            assert self.ask(self.hello) == Ready("", "", self.uid)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a datagram as it is."""
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        self.socket.sendmsg([data], ancillary)

    def ask(self, request: Request, descriptors: Sequence[int] = ()) -> protocol.Reply:
        """Send a request; the reply, whose descriptor is closed. Passes over ends that come meanwhile."""
        self.send(protocol.encode(7, request), descriptors)
        while isinstance(reply := self.hear(), Ended):
            pass
        return reply

    def hear(self) -> protocol.Reply:
        """What the launcher says next, to a request of ours."""
        data, received, _, _ = socket.recv_fds(self.socket, protocol.MAX_DATAGRAM_BYTES, 3)
        for descriptor in received:
            os.close(descriptor)
        assert data, self.words()
        seq, reply = protocol.decode_reply(data)
        assert seq == 7 or isinstance(reply, Ended)
        return reply

    def launch(self, job_id: int, argv: Sequence[str] = ("sleep", "60"), **changes: Any) -> protocol.Reply:
        """Ask for a launch with descriptors as they should be."""
        with ExitStack() as stack:
            launch = replace(Launch(job_id, self.uid, NO_LIMITS), **changes)
            reply = self.ask(launch, self.descriptors(stack, command_file(argv), count=len(launch.files)))
        if isinstance(reply, Launched):
            self.jobs.append(job_id)
        return reply

    def exec(self, job_id: int, argv: Sequence[str] = ("sleep", "60"), **changes: Any) -> protocol.Reply:
        """Ask for a session with descriptors as they should be."""
        with ExitStack() as stack:
            request = replace(Exec(job_id, self.uid), **changes)
            files = self.descriptors(stack, command_file(argv), count=len(request.files))
            return self.ask(request, files)

    def descriptors(self, stack: ExitStack, command: bytes = b"\0\0true\0", count: int = 4) -> Descriptors:
        """Those of a launch."""
        memory = os.memfd_create("command")
        os.write(memory, command)
        files = [os.open(self.bench.directory, os.O_TMPFILE | os.O_RDWR) for _ in range(count - 1)]
        if len(files) > 1:
            os.write(files[1], bytes(4096))
        for descriptor in (memory, *files):
            stack.callback(os.close, descriptor)
        return [memory, *files][:count]

    def words(self) -> str:
        """What the launcher has said."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def end(self) -> int:
        """Wait for the launcher's end; its exit code."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def ended_by_us(self) -> str:
        """The launcher must have ended by itself, with one line that says why and no traceback."""
        assert self.socket.recv(65_536) == b""
        assert self.end() == 1
        words = self.words()
        assert words.startswith("pjwd: launcher: ")
        assert words.count("\n") == 1
        return words

    def open_descriptors(self) -> int:
        """How many the launcher has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def hang_up(self) -> None:
        """Leave all that was launched to the next one."""
        self.jobs.clear()
        self.socket.close()
        assert self.end() == 0, self.words()

    def close(self) -> None:
        """End what was launched, and hang up."""
        if self._code is None:
            for job_id in self.jobs:
                self.ask(Kill(job_id, init_too=True))
                while self.ask(Remove(job_id)) != Done():
                    pass
        self.socket.close()
        with self._errors:
            assert self.end() in (0, 1), self.words()
            assert "Traceback" not in self.words()


@pytest.fixture
def connect(bench: Bench) -> Iterator[Callable[..., Peer]]:
    """Start launchers; each is ended."""
    with ExitStack() as stack:

        def connect(**how: Any) -> Peer:
            peer = Peer(bench, **how)
            stack.callback(peer.close)
            return peer

        yield connect


@pytest.fixture
def peer(connect: Callable[..., Peer]) -> Peer:
    """A launcher that was greeted."""
    return connect()


# --- no message of ours


def changed(request: Request, **changes: object) -> bytes:
    """A request with members replaced; None removes one."""
    message = {**json.loads(protocol.encode(1, request)), **changes}
    return json.dumps({name: value for name, value in message.items() if value is not None}).encode()


GARBAGE: Final = {
    "not JSON": b"{",
    "binary": bytes(range(256)),
    "not UTF-8": b'{"op":"\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "deep": b"[" * 60_000,
    "deep objects": b'{"a":' * 10_000,
    "a huge number": b'{"op":"adopt","seq":1,"job_id":' + b"9" * 60_000 + b"}",
    "no op": b'{"seq":1}',
    "no seq": b'{"op":"job_ids","after":0}',
    "an op that is a list": b'{"op":[],"seq":1}',
    "a reply": protocol.encode(1, Done()),
    "an unknown op": b'{"op":"shell","seq":1}',
    "an op of Python": b'{"op":"__class__","seq":1}',
    "a negative seq": changed(Adopt(1), seq=-1),
    "a seq that is true": changed(Adopt(1), seq=True),
    "a missing member": changed(Kill(1, init_too=True), init_too=None),
    "one member more": changed(Adopt(1), path="/etc"),
    "a negative id": changed(Adopt(1), job_id=-1),
    "an id of 2^63": changed(Adopt(1), job_id=2**63),
    "a fraction": changed(Adopt(1), job_id=1.0),
    "not a number": b'{"op":"adopt","seq":1,"job_id":NaN}',
    "a path as id": changed(Adopt(1), job_id="../../../etc"),
    "a text as truth": changed(Kill(1, init_too=True), init_too="yes"),
    "a limit more": changed(Launch(1, 1, NO_LIMITS), limits={"pids_max": 1}),
    "limits of nothing": changed(Launch(1, 1, NO_LIMITS), limits=[]),
    "a negative limit": changed(Launch(1, 1, NO_LIMITS), limits=dict(NO_LIMITS.items()) | {"pids_max": -1}),
    "a limit below the least": changed(
        Launch(1, 1, NO_LIMITS), limits=dict(NO_LIMITS.items()) | {"pids_max": 1}
    ),
    "a path as a place": changed(OpenFile(0), place="/etc/shadow"),
    "a path beside a place": changed(OpenFile(0), path="/etc/shadow"),
    "a negative place": changed(OpenFile(0), place=-1),
    "a weight of nothing": changed(SetShare(1, Share()), share=SHARE | {"weight": 0}),
    "a weight above all": changed(SetShare(1, Share()), share=SHARE | {"weight": 10_001}),
    "a sum below the least": changed(
        SetShare(1, Share()), share=SHARE | {"sums": SHARE["sums"] | {"pids_max": 1}}
    ),
    "a sum more": changed(SetShare(1, Share()), share=SHARE | {"sums": {}}),
    "a session without a user": changed(Exec(1, 1), uid=None),
    "a mount that is a path": changed(Launch(1, 1, NO_LIMITS), mounts="/etc:/mnt/etc"),
    "a launch with a mount's path": changed(Launch(1, 1, NO_LIMITS), mounts=[{"name": "a", "path": "/"}]),
    "mounts with a path": changed(ReloadMounts(), path="/etc"),
    "a GPU that is a node": changed(Launch(1, 1, NO_LIMITS), gpus=[{"path": "/dev/mem"}]),
    "GPUs with a directory": changed(Gpus(), cdi_dirs=["/tmp"]),
    "a workspace that is a list": changed(Launch(1, 1, NO_LIMITS), workspace=["work"]),
    "a workspace with a path": changed(RemoveWorkspace(1, "work"), path="/etc"),
    "a workspace without a user": changed(RemoveWorkspace(1, "work"), uid=None),
    "an image that is a list": changed(Launch(1, 1, NO_LIMITS), image=["/etc"]),
    "an image with a path": changed(Launch(1, 1, NO_LIMITS), image="@0123456789abcdef", root="/etc"),
    "a table of images with a path": changed(ImageTable(), path="/etc/shadow"),
    "a session with a path": changed(Exec(1, 1), workdir="/"),
    "a negative user": changed(Launch(1, 1, NO_LIMITS), uid=-1),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_the_launcher(bench: Bench, peer: Peer, data: bytes) -> None:
    """What is no request of the protocol, to the letter, ends the conversation in one line."""
    peer.send(data)
    peer.ended_by_us()
    assert bench.remains() == []


@pytest.mark.parametrize(
    ("size", "words"), [(protocol.MAX_DATAGRAM_BYTES + 1, "too large"), (150_000, "cut short")]
)
def test_an_oversized_request_ends_the_launcher(peer: Peer, size: int, words: str) -> None:
    """A datagram above the bound, be it cut short by the kernel or not."""
    peer.send(changed(Adopt(1)).ljust(size))
    assert words in peer.ended_by_us()


def test_an_empty_datagram_is_the_end(peer: Peer) -> None:
    """Zero bytes are how a conversation ends."""
    peer.send(b"")
    assert peer.end() == 0


# --- the wrong moment


@pytest.mark.parametrize(
    "request_",
    [Launch(1, 1, NO_LIMITS), Kill(1, init_too=True), Remove(1), JobIds(0), OpenFile(0), Exec(1, 1)],
    ids=str,
)
def test_before_the_greeting(connect: Callable[..., Peer], bench: Bench, request_: Request) -> None:
    """Nothing is answered before the policy is known."""
    peer = connect(greet=False)
    with ExitStack() as stack:
        peer.send(
            protocol.encode(1, request_),
            peer.descriptors(stack, count=protocol.descriptors_of(request_)),
        )
        assert "out of phase" in peer.ended_by_us()
    assert bench.remains() == []


def test_a_second_greeting(peer: Peer) -> None:
    """A policy is told once: a server that has become hostile cannot widen it."""
    peer.send(protocol.encode(1, replace(peer.hello, uid_first=1, uid_count=2**31)))
    assert "out of phase" in peer.ended_by_us()


@pytest.mark.parametrize(
    "changes",
    [
        {"uid_count": 0},
        {"uid_first": 2**32 - 5, "uid_count": 10},
        {"uid_first": 2**62, "uid_count": 2**62},
        {"state_dir": "state"},
        {"state_dir": ""},
        {"state_dir": "/nonexistent/state"},
        {"state_dir": "/dev/null"},
        {"hidden_paths": ("key",)},
        {"hidden_paths": ("",)},
        {"operator_files": ("/etc/passwd", "key")},
        {"operator_files": ("",)},
    ],
    ids=str,
)
def test_a_policy_that_cannot_be(connect: Callable[..., Peer], changes: dict[str, Any]) -> None:
    """Root among the users, a relative path, no directory: refused, and then nothing is served."""
    peer = connect(greet=False)
    assert isinstance(peer.ask(replace(peer.hello, **changes)), Refused)
    peer.send(protocol.encode(1, JobIds(0)))
    assert "out of phase" in peer.ended_by_us()


def test_a_range_of_before_that_is_too_long_now(connect: Callable[..., Peer], bench: Bench) -> None:
    """It is judged when its first user id is known: 2^32-1 would leave root (setresuid(2))."""
    peer = connect(greet=False)
    (bench.state / "job-users").write_text(f"{2**32 - 5} 4\n")
    assert isinstance(peer.ask(replace(peer.hello, uid_first=0, uid_count=10)), Refused)


@pytest.mark.parametrize("kind", ["link", "other owner", "writable", "file"])
def test_a_scratch_directory_of_somebody_else(connect: Callable[..., Peer], bench: Bench, kind: str) -> None:
    """The directory of scratch directories must be root's alone, whatever lies there."""
    scratch = bench.state / "scratch"
    bench.state.mkdir()
    match kind:
        case "link":
            scratch.symlink_to("/var/lib")
        case "file":
            scratch.write_text("")
        case "other owner":
            scratch.mkdir(0o711)
            os.chown(scratch, 65_534, 65_534)
        case "writable":
            scratch.mkdir()
            scratch.chmod(0o1777)
    peer = connect(greet=False)
    assert isinstance(peer.ask(peer.hello), Refused)
    peer.socket.close()
    assert peer.end() == 0
    scratch.rmdir() if scratch.is_dir() and not scratch.is_symlink() else scratch.unlink()


# --- descriptors


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        *((count, {}) for count in (0, 1, 3, 5, 6, 12)),
        *((count, {"split_stderr": True}) for count in (4, 5, 7)),
        *((count, {"input": True}) for count in (4, 6)),
        *((count, {"artifacts": True}) for count in (4, 5, 7)),
    ],
)
def test_a_launch_with_the_wrong_number_of_descriptors(
    bench: Bench, peer: Peer, count: int, changes: dict[str, Any]
) -> None:
    """Four, two more for a stderr of its own, one more for input, two more for artifacts; no others."""
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, count=12)[:count]
        peer.send(protocol.encode(1, Launch(1, peer.uid, NO_LIMITS, **changes)), descriptors)
        peer.ended_by_us()
    assert bench.remains() == []


@pytest.mark.parametrize(
    "request_",
    [
        Adopt(1),
        JobIds(0),
        Terminate(1),
        Kill(1, init_too=False),
        Measure((1,)),
        Account(1),
        Remove(1),
        OpenFile(0),
        OpenAuditLog(),
    ],
    ids=lambda request: request.op,
)
def test_descriptors_that_nobody_asked_for(peer: Peer, request_: Request) -> None:
    """Only a launch carries any."""
    peer.send(protocol.encode(1, request_), [0])
    assert "came with 1 descriptors" in peer.ended_by_us()


def _socket(stack: ExitStack, directory: Path) -> int:
    return stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()


def _opened(path: str, flags: int) -> Callable[[ExitStack, Path], int]:
    def opened(stack: ExitStack, directory: Path) -> int:
        (directory / "file").touch()
        descriptor = os.open(path.format(directory), flags)
        stack.callback(os.close, descriptor)
        return descriptor

    return opened


def _pipe(stack: ExitStack, directory: Path) -> int:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends[1]


# the places of what comes with a launch
EVERY: Final = tuple(range(protocol.MAX_DESCRIPTORS))
WRITTEN: Final = (*EVERY[1:6], EVERY[7])
READ: Final = (EVERY[0], EVERY[6], *EVERY[8:])
BAD: Final[dict[str, tuple[tuple[int, ...], Callable[[ExitStack, Path], int]]]] = {
    "socket": (EVERY, _socket),
    "pipe": (EVERY, _pipe),
    "directory": (EVERY, _opened("{}", os.O_RDONLY)),
    "device": (EVERY, _opened("/dev/zero", os.O_RDWR)),
    "null": (EVERY, _opened("/dev/null", os.O_RDWR)),
    "read only": (WRITTEN, _opened("{}/file", os.O_RDONLY)),
    "path": (WRITTEN, _opened("{}/file", os.O_PATH)),
    "path of a directory": (EVERY, _opened("/etc", os.O_PATH)),
    "write only": (READ, _opened("{}/file", os.O_WRONLY)),
    "passwd": (WRITTEN, _opened("/etc/passwd", os.O_RDONLY)),
}


@pytest.mark.parametrize(
    ("place", "kind"), [(place, kind) for kind, (places, _) in BAD.items() for place in places]
)
def test_a_launch_with_a_descriptor_of_the_wrong_kind(
    bench: Bench, peer: Peer, place: int, kind: str
) -> None:
    """init reads and writes them as root: only plain files with which the sender itself could do so."""
    before = Path("/etc/passwd").read_bytes()
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, count=protocol.MAX_DESCRIPTORS)
        descriptors[place] = BAD[kind][1](stack, bench.directory)
        launch = Launch(1, peer.uid, NO_LIMITS, split_stderr=True, input=True, upload=True, artifacts=True)
        reply = peer.ask(launch, descriptors)
    assert isinstance(reply, Refused)
    assert reply.kind == "invalid"
    assert bench.remains() == []
    assert Path("/etc/passwd").read_bytes() == before
    assert isinstance(peer.launch(1), Launched)


def test_refused_launches_leave_no_descriptor(bench: Bench, peer: Peer) -> None:
    """However many descriptors come with refused requests, the launcher keeps none."""
    # two for each init that will wait, and for the spawner
    before = peer.open_descriptors() + 2 * WAITING_INITS + 2
    for _ in range(20):
        assert isinstance(peer.launch(1, uid=0), Refused)
        assert isinstance(peer.launch(1, argv=["/nonexistent"]), Refused)
    # the last launch may still be ending; each request gives the launcher a turn
    deadline = time.monotonic() + DEADLINE_SECONDS
    while peer.open_descriptors() != before:
        assert time.monotonic() < deadline
        peer.ask(JobIds(after=0))
    assert bench.remains() == []


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (b"", None),
        (b"\0", None),
        (b"\0\0", None),
        (b"\0\0true", None),
        (b"\0\0true\0\0", 0),
        (b"relative\0\0true\0", None),
        (b"\0A=1\0true\0", None),
        (b"\0=1\0\0true\0", None),
        (b"\0\0" + b"x\0" * 600_000, None),
        (b"\0\0/bin/true\0" + b"x" * 1_048_000 + b"\0", errno.E2BIG),
    ],
    ids=[
        *("empty", "an empty word", "no argv", "no end", "empty argument", "a relative directory"),
        *("no end of the environment", "a variable without a name", "too many", "too long"),
    ],
)
def test_a_command_that_is_none(bench: Bench, peer: Peer, command: bytes, error: int | None) -> None:
    """The launcher never reads it; init does, and says so; nothing is left."""
    with ExitStack() as stack:
        reply = peer.ask(Launch(1, peer.uid, NO_LIMITS), peer.descriptors(stack, command))
    if error == 0:
        assert isinstance(reply, Launched)
        peer.jobs.append(1)
        return
    assert isinstance(reply, Refused)
    assert error is None or (reply.kind, reply.errno) == ("exec", error)
    assert bench.remains() == []


# --- sessions


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        *((count, {}) for count in (0, 1, 3, 5, 7)),
        *((count, {"split_stderr": True}) for count in (4, 6)),
        *((count, {"split_stderr": True, "input": True}) for count in (4, 5, 7)),
    ],
)
def test_a_session_with_the_wrong_number_of_descriptors(
    bench: Bench, peer: Peer, count: int, changes: dict[str, Any]
) -> None:
    """Four, one more where stderr is kept apart, one more for input."""
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, count=10)[:count]
        peer.send(protocol.encode(1, Exec(1, peer.uid, **changes)), descriptors)
        peer.ended_by_us()
    assert bench.remains() == []


@pytest.mark.parametrize(
    ("place", "kind"),
    [(place, kind) for kind, (places, _) in BAD.items() for place in range(6) if place in places],
)
def test_a_session_with_a_descriptor_of_the_wrong_kind(
    bench: Bench, peer: Peer, place: int, kind: str
) -> None:
    """As with a launch; what the session is told it reads alone."""
    if kind == "write only" or (place in (4, 5) and kind in ("read only", "path", "passwd")):
        place = 4 if kind == "write only" else 3
    assert isinstance(peer.launch(1), Launched)
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, count=6)
        descriptors[place] = BAD[kind][1](stack, bench.directory)
        reply = peer.ask(Exec(1, peer.uid, split_stderr=True, input=True), descriptors)
    assert isinstance(reply, Refused)
    assert reply.kind == "invalid"
    assert isinstance(peer.exec(1), Entered)


@pytest.mark.parametrize("offset", [1, 9, -1, 10, None])
def test_a_session_of_another_user(peer: Peer, offset: int | None) -> None:
    """Neither root, nor nobody's, nor another client's: only that of the user whose job it is."""
    assert isinstance(peer.launch(1), Launched)
    for uid in [0, 2**32, 2**32 + peer.uid] if offset is None else [peer.uid + offset]:
        reply = peer.exec(1, uid=uid)
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
    assert isinstance(peer.exec(1), Entered)


def test_a_session_in_no_running_job(bench: Bench, peer: Peer) -> None:
    """None that is waited for, none that has ended, none that was never there, no stray."""
    assert isinstance(peer.launch(1), Launched)
    wait_for(lambda: 2 in waiting_inits(bench.state))
    for job_id in (2, 5, JOB_ID_MAX):
        reply = peer.exec(job_id)
        assert isinstance(reply, Refused)
        assert reply.kind == "state"
    for job_id in (0, JOB_ID_MAX + 1):
        assert isinstance(peer.exec(job_id), Refused)
    # nor one whose init has its order, and has not executed the command yet
    init = waiting_inits(bench.state)[2]
    os.kill(init, signal.SIGSTOP)
    with ExitStack() as stack:
        launch = Launch(2, peer.uid, NO_LIMITS)
        peer.send(protocol.encode(7, launch), peer.descriptors(stack, command_file(["sleep", "60"])))
    peer.jobs.append(2)
    reply = peer.exec(2)
    assert isinstance(reply, Refused)
    assert reply.kind == "state"
    os.kill(init, signal.SIGCONT)
    assert isinstance(peer.hear(), Launched)
    assert isinstance(peer.exec(2), Entered)
    assert isinstance(peer.launch(3, ["sh", "-c", "echo >file"]), Launched)
    assert isinstance(peer.hear(), Ended)
    reply = peer.exec(3)
    assert isinstance(reply, Refused)
    assert reply.kind == "state"


def test_a_session_in_a_job_of_another_pjw(bench: Bench, connect: Callable[..., Peer]) -> None:
    """A launcher that has neither launched nor adopted a job has no session in it."""
    first = connect()
    assert isinstance(first.launch(1), Launched)
    first.hang_up()
    heir = connect()
    reply = heir.exec(1)
    assert isinstance(reply, Refused)
    assert reply.kind == "state"
    assert heir.ask(Adopt(1)) == Adopted(alive=True, known=True)
    assert isinstance(heir.exec(1), Entered)
    heir.ask(Kill(1, init_too=True))
    while heir.ask(Remove(1)) != Done():
        pass


def test_what_a_session_may_not_have(connect: Callable[..., Peer], bench: Bench) -> None:
    """More output than the ceiling, more sessions than there may be; and no descriptor stays behind."""
    peer = connect(ceiling=NO_LIMITS.with_overrides({"output_max_bytes": 1000}))
    assert isinstance(peer.launch(1, limits=NO_LIMITS.with_overrides({"output_max_bytes": 10})), Launched)
    for most in (0, 1001, 2**62):
        reply = peer.exec(1, output_max_bytes=most)
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
    for seconds in (0, 2**31):
        assert isinstance(peer.exec(1, output_max_bytes=10, grace_seconds=seconds), Refused)
    # a terminal has one output
    assert isinstance(peer.exec(1, output_max_bytes=10, terminal=True, split_stderr=True), Refused)
    assert isinstance(peer.launch(9, terminal=True, split_stderr=True), Refused)
    wait_for(lambda: len(waiting_ids(bench.state)) == WAITING_INITS)
    before = peer.open_descriptors()
    for _ in range(5):
        assert isinstance(peer.exec(1, ["/nonexistent"], output_max_bytes=10), Refused)
    for _ in range(16):
        assert isinstance(peer.exec(1, output_max_bytes=10), Entered)
    reply = peer.exec(1, output_max_bytes=10)
    assert isinstance(reply, Refused)
    assert reply.kind == "state"
    # an init that waits may have reported its pidfd since
    assert before + 16 <= peer.open_descriptors() <= before + 16 + WAITING_INITS
    # init and its command, a session's two processes each
    assert len((bench.cgroups(1)[0] / "cgroup.procs").read_text().split()) == 2 + 2 * 16


def test_a_connection_of_another_user(bench: Bench, peer: Peer) -> None:
    """As with a session: only that of the job's user, only in a job that runs; and only to what is a port."""
    listen = "import socket,time; s=socket.create_server(('127.0.0.1', 8080)); time.sleep(60)"
    assert isinstance(peer.launch(1, ["/usr/bin/python3", "-c", listen]), Launched)
    for uid in (0, peer.uid + 1, peer.uid - 1, 2**32 + peer.uid):
        reply = peer.ask(Connect(1, uid, 8080))
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
    for port in (0, 65_536, 2**32 + 8080):
        reply = peer.ask(Connect(1, peer.uid, port))
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
    wait_for(lambda: 2 in waiting_ids(bench.state))
    for job_id in (2, 5):
        reply = peer.ask(Connect(job_id, peer.uid, 8080))
        assert isinstance(reply, Refused)
        assert reply.kind == "state"
    wait_for(lambda: len(waiting_ids(bench.state)) == WAITING_INITS)
    before = peer.open_descriptors()
    for _ in range(20):
        reply = peer.ask(Connect(1, peer.uid, 9))
        assert isinstance(reply, Refused)
        assert (reply.kind, reply.errno) == ("connect", errno.ECONNREFUSED)
    wait_for(lambda: isinstance(peer.ask(Connect(1, peer.uid, 8080)), Opened))
    # an init that waits may have reported its pidfd since
    assert peer.open_descriptors() <= before + WAITING_INITS


# --- more than the policy


@pytest.mark.parametrize("offset", [-1, 10, 2**31, None])
def test_a_user_outside_of_the_range(bench: Bench, peer: Peer, offset: int | None) -> None:
    """Never root, never one beside the range, and no wrap-around to root either."""
    for uid in [0, 1000, 2**32 - 1, 2**32, 2**32 + peer.uid] if offset is None else [peer.uid + offset]:
        reply = peer.launch(1, uid=uid)
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
    assert bench.remains() == []


@pytest.mark.parametrize(("name", "_"), NO_LIMITS.items())
def test_a_limit_above_its_ceiling(connect: Callable[..., Peer], bench: Bench, name: str, _: int) -> None:
    """Neither a higher one nor none at all."""
    ceiling = NO_LIMITS.with_overrides({name: 4 * 1024**2})
    peer = connect(ceiling=ceiling)
    for value in (4 * 1024**2 + 1, 0, 2**62):
        reply = peer.launch(1, limits=NO_LIMITS.with_overrides({name: value}))
        assert isinstance(reply, Refused)
        assert reply.kind == "invalid"
        assert name in reply.operation
    assert bench.remains() == []


@pytest.mark.parametrize("job_id", [0, JOB_ID_MAX + 1, 2**63 - 1])
def test_an_id_that_cannot_be_one(bench: Bench, peer: Peer, job_id: int) -> None:
    """It is refused in every request; never does it become a name."""
    assert isinstance(peer.launch(job_id), Refused)
    for make in ABOUT_JOB.values():
        assert isinstance(peer.ask(make(job_id)), Refused)
    assert bench.cgroups() == []
    assert bench.scratch() == []


def test_the_greatest_id(bench: Bench, peer: Peer) -> None:
    """2^53 is one."""
    assert isinstance(peer.launch(JOB_ID_MAX), Launched)
    assert peer.ask(JobIds(0)) == JobIdPage((JOB_ID_MAX,))
    assert peer.ask(JobIds(JOB_ID_MAX)) == JobIdPage(())


# --- ends


def test_the_end_of_a_job_that_left_nothing(bench: Bench, peer: Peer) -> None:
    """It is told once, with what the job used, by the number of its launch; nothing is left, unasked."""
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, command_file(["sh", "-c", "echo words"]))
        assert isinstance(peer.ask(Launch(1, peer.uid, NO_LIMITS), descriptors), Launched)
        ended = peer.hear()
        assert isinstance(ended, Ended)
        assert (ended.known, ended.removed) == (True, True)
        assert ended.usage.cpu_usage_usec > 0
        record = parse_record(os.pread(descriptors[2], RECORD_BYTES, 0))
    assert (record.usage, record.end is not None) == (ended.usage, True)
    assert bench.cgroups(1) == bench.scratch_of(1) == []
    assert peer.ask(Account(1)) == Accounted(known=False, usage=Usage())
    assert peer.ask(Remove(1)) == Done()
    assert peer.ask(JobIds(0)) == JobIdPage(())


def test_the_end_of_a_job_that_left_files(bench: Bench, peer: Peer) -> None:
    """All of it stays until it is asked for, and the accounts are the same twice."""
    assert isinstance(peer.launch(1, ["sh", "-c", "echo words >file"]), Launched)
    ended = peer.hear()
    assert isinstance(ended, Ended)
    assert (ended.known, ended.removed) == (True, False)
    assert peer.ask(Adopt(1)) == Adopted(alive=False, known=True)
    assert peer.ask(Account(1)) == Accounted(known=True, usage=ended.usage)
    assert bench.cgroups(1) != []
    assert peer.ask(Remove(1)) == Done()
    assert bench.cgroups(1) == bench.scratch_of(1) == []


def test_accounts_that_cannot_be_kept(bench: Bench, peer: Peer) -> None:
    """A status file that takes nothing: then they stay in the cgroup."""
    with ExitStack() as stack:
        descriptors = peer.descriptors(stack, command_file(["cat"]), count=5)
        input_file = bench.directory / "input"
        input_file.touch()
        descriptors[4] = os.open(input_file, os.O_RDONLY)
        stack.callback(os.close, descriptors[4])
        status = os.memfd_create("status", os.MFD_ALLOW_SEALING)
        stack.callback(os.close, status)
        os.write(status, bytes(RECORD_BYTES))
        descriptors[2] = status
        assert isinstance(peer.ask(Launch(1, peer.uid, NO_LIMITS, input=True), descriptors), Launched)
        fcntl.fcntl(status, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert peer.ask(Terminate(1)) == Done()
        ended = peer.hear()
    assert isinstance(ended, Ended)
    assert (ended.known, ended.removed) == (True, False)
    assert peer.ask(Account(1)) == Accounted(known=True, usage=ended.usage)
    assert peer.ask(Remove(1)) == Done()


def test_the_end_of_an_adopted_job(bench: Bench, connect: Callable[..., Peer]) -> None:
    """It is told by the number of its adoption, and all stays: this launcher has no status file of it."""
    first = connect()
    assert isinstance(first.launch(1), Launched)
    first.hang_up()
    heir = connect()
    assert heir.ask(Adopt(1)) == Adopted(alive=True, known=True)
    assert heir.ask(Terminate(1)) == Done()
    ended = heir.hear()
    assert isinstance(ended, Ended)
    assert (ended.known, ended.removed) == (True, False)
    assert heir.ask(Remove(1)) == Done()
    assert bench.cgroups(1) == bench.scratch_of(1) == []


# --- other jobs


def test_a_launch_that_is_played_again(bench: Bench, peer: Peer) -> None:
    """An id that has a cgroup is refused, and the running job keeps all that it has."""
    assert isinstance(peer.launch(1), Launched)
    init = bench.init_pid(1)
    (scratch,) = bench.scratch()
    (scratch / "file").write_text("kept")
    for _ in range(3):
        reply = peer.launch(1, uid=peer.uid + 1)
        assert isinstance(reply, Refused)
        assert reply.kind == "state"
    assert bench.init_pid(1) == init
    assert (scratch / "file").read_text() == "kept"
    assert scratch.stat().st_uid == peer.uid


def test_a_running_job_is_neither_accounted_nor_removed(bench: Bench, peer: Peer) -> None:
    """Both are for jobs that have ended."""
    assert isinstance(peer.launch(1), Launched)
    for request in (Account(1), Remove(1)):
        reply = peer.ask(request)
        assert isinstance(reply, Refused)
        assert reply.kind == "state"
    assert bench.init_pid(1)
    assert bench.scratch() != []


def test_requests_for_what_is_not_there(peer: Peer) -> None:
    """An id that nobody has is nothing to signal, to account, to remove."""
    assert peer.ask(Adopt(5)) == Adopted(alive=False, known=False)
    assert peer.ask(Terminate(5)) == Done()
    assert peer.ask(Kill(5, init_too=False)) == Done()
    assert peer.ask(Kill(5, init_too=True)) == Done()
    assert peer.ask(Account(5)) == Accounted(known=False, usage=Usage())
    assert peer.ask(Measure((0, 5, 2**63 - 1))) == Measured(())
    assert peer.ask(Remains(5)) == Remaining("", killed=False)
    assert peer.ask(Remove(5)) == Done()
    assert peer.ask(JobIds(0)) == JobIdPage(())


async def test_the_jobs_of_another_pjw_are_out_of_reach(bench: Bench, tmp_path: Path) -> None:
    """The same id in another state directory: nothing that is asked here reaches it."""
    worker = await bench.open()
    job = await start(worker, ["sleep", "60"])
    other = Bench(tmp_path)
    peer = Peer(other)
    try:
        for request in (
            Terminate(job.id),
            Kill(job.id, init_too=False),
            Kill(job.id, init_too=True),
            Remove(job.id),
        ):
            assert peer.ask(request) == Done()
        assert peer.ask(Measure((job.id,))) == Measured(())
        assert peer.ask(Remains(job.id)) == Remaining("", killed=False)
        assert peer.ask(Adopt(job.id)) == Adopted(alive=False, known=False)
        assert peer.ask(JobIds(0)) == JobIdPage(())
        assert isinstance(peer.launch(job.id), Launched)
        assert peer.ask(Kill(job.id, init_too=True)) == Done()
    finally:
        peer.close()
    assert (await worker.get(job.id)).state is JobState.RUNNING
    assert len(bench.processes()) == 1
    assert bench.scratch() != []


def test_a_process_in_a_job_s_cgroup_that_is_no_init(bench: Bench, peer: Peer) -> None:
    """A cgroup of ours with a process that is not PID 1 of a namespace: not adopted, so never signalled."""
    assert isinstance(peer.launch(1), Launched)
    parents = instance_cgroups(bench.state)
    cgroups = [parent / "job-20" for parent in parents]
    process = subprocess.Popen(["sleep", "60"])
    try:
        for cgroup in cgroups:
            cgroup.mkdir()
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        assert peer.ask(Adopt(20)) == Adopted(alive=False, known=True)
        assert peer.ask(Terminate(20)) == Done()
        assert peer.ask(Kill(20, init_too=False)) == Done()
        assert process.poll() is None
        assert isinstance(peer.ask(Remove(20)), Refused)
    finally:
        process.kill()
        process.wait()
    assert peer.ask(Remove(20)) == Done()


# --- what fails for one request


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
def test_a_file_that_its_file_system_says_nothing_of(peer: Peer) -> None:
    """A descriptor of a launch may be of a file system that fails (ESTALE): only that start is refused."""
    for place, name in enumerate(("command", "output", "status", "times"), start=1):
        subject = f"the {name} descriptor of a launch"
        with Tracer(peer.pid, place, errno.ESTALE, calls=("fstat", "newfstatat")) as tracer:
            reply = peer.launch(1, ["true"])
        assert tracer.hit
        assert reply == Refused("kernel", "look at", subject, errno.ESTALE, "")
    assert isinstance(peer.launch(1, ["true"]), Launched)


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
def test_an_adoption_without_a_descriptor(peer: Peer) -> None:
    """An init that no pidfd can be had for now (EMFILE): that is refused, and later not."""
    cgroups = [parent / "job-20" for parent in instance_cgroups(peer.bench.state)]
    with subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "60"]) as process:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_for(children.read_text)
            for cgroup in cgroups:
                cgroup.mkdir()
                (cgroup / "cgroup.procs").write_text(children.read_text().strip())
            with Tracer(peer.pid, 1, errno.EMFILE, calls=("pidfd_open",)) as tracer:
                reply = peer.ask(Adopt(20))
            assert tracer.hit == "pidfd_open"
            assert reply == Refused("kernel", "answer", "a request adopt", errno.EMFILE, "")
        finally:
            process.kill()
    wait_for(lambda: not any((cgroup / "cgroup.procs").read_text() for cgroup in cgroups))
    assert peer.ask(Adopt(20)) == Adopted(alive=False, known=True)
    assert peer.ask(Remove(20)) == Done()


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
def test_a_table_of_mounts_that_cannot_be_read(bench: Bench, peer: Peer) -> None:
    """When the host mounts something and no descriptor is left: the launcher goes on, and looks again."""
    point = bench.directory / "point"
    point.mkdir()
    assert isinstance(peer.launch(1, ["true"]), Launched)
    wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    with Tracer(peer.pid, 1, errno.EMFILE, calls=("openat",)) as tracer:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "pjw-test", point], check=True)
        try:
            # a turn of the launcher's, in which it opens nothing else
            assert peer.ask(Terminate(99)) == Done()
        finally:
            subprocess.run(["umount", point], check=True)
    assert tracer.hit == "openat"
    assert isinstance(peer.launch(2, ["true"]), Launched)


# --- shares


def test_a_share_for_whom_no_job_can_be(peer: Peer) -> None:
    """Neither root's nor another instance's users have a place here to be given a share of."""
    for uid in (0, peer.uid - 1, peer.uid + 10):
        for request in (SetShare(uid, Share()), MeasureClient(uid)):
            reply = peer.ask(request)
            assert isinstance(reply, Refused)
            assert reply.kind == "invalid"
    # one that can have jobs, and has none: there is nothing to do, and nothing is made
    assert peer.ask(SetShare(peer.uid, Share(200))) == ShareSet(())
    assert peer.ask(MeasureClient(peer.uid)) == ClientMeasured(GroupUse())


# --- inits that wait


def test_requests_for_a_job_that_has_not_been_launched(bench: Bench, peer: Peer) -> None:
    """An init waits for it, and nothing but its launch reaches that."""
    assert isinstance(peer.launch(1), Launched)
    wait_for(lambda: len(waiting_ids(bench.state)) == WAITING_INITS)
    assert_permitted(peer, 2, InitPhase.WAITING)
    assert peer.ask(Measure((2,))) == Measured(())
    assert peer.ask(JobIds(after=0)) == JobIdPage((1,))
    assert isinstance(peer.launch(2), Launched)


def test_requests_in_each_phase(bench: Bench, peer: Peer) -> None:
    """What the table of phases permits is answered, and nothing else is."""
    assert isinstance(peer.launch(1), Launched)
    assert_permitted(peer, 50, InitPhase.ABSENT)
    # it leaves a file, so its cgroup stays
    assert isinstance(peer.launch(60, ["sh", "-c", "echo words >file"]), Launched)
    assert isinstance(peer.hear(), Ended)
    assert_permitted(peer, 60, InitPhase.ENDED)
    assert_permitted(peer, 1, InitPhase.RUNNING)


def assert_permitted(peer: Peer, job_id: int, phase: InitPhase) -> None:
    """Ask all that may be asked about a job."""
    # a kill changes what runs, and a removal what has ended
    last = "kill" if phase is InitPhase.RUNNING else "remove"
    for op in sorted(ABOUT_JOB, key=lambda op: op == last):
        reply = peer.ask(ABOUT_JOB[op](job_id))
        if phase in PERMITTED[op]:
            assert not isinstance(reply, Refused), reply
        else:
            words = f"cannot answer the request {op}: the init of job {job_id} is {phase}"
            assert reply == Refused("state", words, "", 0, "")


def test_ids_that_are_left_out(bench: Bench, peer: Peer) -> None:
    """Those who wait for them are not kept: never more of them than the pool has place for."""
    for first in (1, 100, 3, JOB_ID_MAX):
        assert isinstance(peer.launch(first), Launched)
        ahead = {job_id for job_id in range(first + 1, first + WAITING_INITS + 1) if job_id <= JOB_ID_MAX}
        wait_for(lambda: waiting_ids(bench.state) >= ahead)  # noqa: B023  called at once
        assert len(waiting_ids(bench.state)) <= 2 * WAITING_INITS


# --- the operator's files


@pytest.fixture
def own(bench: Bench) -> Path:
    """A directory that is root's, where the operator keeps a file."""
    own = bench.directory / "own"
    own.mkdir()
    (own / "key").write_text("key")
    (own / "key").chmod(0o600)
    return own


def opened(peer: Peer, place: int = 0) -> tuple[str, int]:
    """What a file has in it, and with which flags it is open here."""
    peer.send(protocol.encode(7, OpenFile(place)))
    data, [descriptor], _, _ = socket.recv_fds(peer.socket, protocol.MAX_DATAGRAM_BYTES, 3)
    with open(descriptor, encoding="utf-8") as file:
        assert protocol.decode_reply(data) == (7, Opened())
        return file.read(), fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)


def test_a_file_is_opened_as_it_is_now(connect: Callable[..., Peer], own: Path) -> None:
    """For reading alone, the one that is there when it is asked for, through links; and nothing is kept."""
    (own / "live").symlink_to("archive/1")
    (own / "archive").mkdir()
    (own / "archive/1").symlink_to(own / "archive" / ".." / "key")
    peer = connect(operator_files=(str(own / "key"), f"{own}//./live"))
    assert opened(peer) == opened(peer, 1) == ("key", os.O_RDONLY)
    peer.ask(JobIds(0))  # it closes its own descriptor behind the answer
    before = peer.open_descriptors()
    (own / "new").write_text("new key")
    (own / "new").rename(own / "key")
    for _ in range(20):
        assert opened(peer) == opened(peer, 1) == ("new key", os.O_RDONLY)
    peer.ask(JobIds(0))
    assert peer.open_descriptors() == before


@pytest.mark.parametrize("place", [1, 2, 2**63 - 1])
def test_a_file_that_root_did_not_name(connect: Callable[..., Peer], own: Path, place: int) -> None:
    """There is no place beyond the list of the greeting."""
    peer = connect(operator_files=(str(own / "key"),))
    reply = peer.ask(OpenFile(place))
    assert isinstance(reply, Refused)
    assert reply.kind == "invalid"
    assert opened(peer) == ("key", os.O_RDONLY)


def test_the_library_has_no_files_to_open(peer: Peer) -> None:
    """Without a list nothing is ever opened, and without an audit log none is made."""
    assert isinstance(peer.ask(OpenFile(0)), Refused)
    assert isinstance(peer.ask(OpenAuditLog()), Refused)


@pytest.mark.parametrize("place", ["own/log", "link/log", "others/log", "own/link", "own/fifo"])
def test_an_audit_log_is_made_where_root_alone_may(
    connect: Callable[..., Peer], own: Path, place: str
) -> None:
    """Nowhere that the server's user could have prepared; for appending, and for root alone."""
    base = own.parent
    (base / "link").symlink_to(own)
    (base / "others").mkdir()
    (base / "others").chmod(0o777)
    (own / "link").symlink_to(own / "elsewhere")
    os.mkfifo(own / "fifo")
    peer = connect(audit_log=str(base / place))
    peer.send(protocol.encode(7, OpenAuditLog()))
    data, descriptors, _, _ = socket.recv_fds(peer.socket, protocol.MAX_DATAGRAM_BYTES, 3)
    _, reply = protocol.decode_reply(data)
    if place.endswith("/log") and not place.startswith("others"):
        with open(descriptors[0], "ab") as file:
            flags = fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
            assert flags == os.O_WRONLY | os.O_APPEND
        assert stat.S_IMODE((own / "log").stat().st_mode) == 0o600
    else:
        assert (isinstance(reply, Refused), descriptors) == (True, [])
        assert not (base / "others/log").exists()
        assert not (own / "elsewhere").exists()


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "socket", "device", "loop", "below a file"])
def test_what_is_not_a_regular_file(connect: Callable[..., Peer], own: Path, kind: str) -> None:
    """Refused at once, and not waited for."""
    path, words = own / "key", "it is not a regular file"
    path.unlink()
    match kind:
        case "missing":
            words = "open"
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            words = "open"
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        case "loop":
            words = "open"
            path.symlink_to(path)
        case "below a file":
            words = "open"
            path.write_text("")
            path /= "x"
    peer = connect(operator_files=(str(path),))
    before = peer.open_descriptors()
    reply = peer.ask(OpenFile(0))
    assert isinstance(reply, Refused)
    assert words in reply.operation
    if words == "open":
        assert reply.subject == str(path)
    assert peer.open_descriptors() == before


@pytest.mark.parametrize(
    "kind",
    ["the server's", "writable", "group", "list", "above", "behind a link", "sticky", "a link in sticky"],
)
def test_a_directory_where_others_may_write(connect: Callable[..., Peer], own: Path, kind: str) -> None:
    """Whoever may exchange a link or a directory on the way could be handed any file of the host."""
    path = own / "key"
    match kind:
        case "the server's":
            os.chown(own, 65_534, 65_534)
        case "writable":
            own.chmod(0o707)
        case "sticky":
            own.chmod(0o1777)
        case "a link in sticky":
            # whoever makes it where it is missing, it may lead to a directory of root's
            own.chmod(0o1777)
            (own / "link").symlink_to("/etc")
            path = own / "link" / "shadow"
        case "group":
            own.chmod(0o770)
        case "list":
            # user::rwx user:65534:rwx group::--- mask::rwx other::---, as setfacl(1) writes it
            entries = [(0x01, 7, -1), (0x02, 7, 65_534), (0x04, 0, -1), (0x10, 7, -1), (0x20, 0, -1)]
            packed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
            os.setxattr(own, "system.posix_acl_access", struct.pack("<I", 2) + packed)
        case "above":
            (own / "below").mkdir(mode=0o700)
            path = path.rename(own / "below/key")
            own.chmod(0o777)
        case "behind a link":
            other = own.with_name("other")
            other.mkdir()
            other.chmod(0o777)
            (other / "link").symlink_to("/etc/shadow")
            path.unlink()
            path.symlink_to(other / "link")
    peer = connect(operator_files=(str(path),))
    reply = peer.ask(OpenFile(0))
    assert isinstance(reply, Refused)
    assert reply.kind == "config"
    assert reply.operation.startswith(f"cannot open {path} again: others than root may change what is in ")


def test_a_directory_of_root_s_in_a_sticky_one(connect: Callable[..., Peer], own: Path) -> None:
    """As below /tmp: nobody else can move it, or put another one in its place (U6)."""
    (own / "below").mkdir(mode=0o700)
    path = (own / "key").rename(own / "below/key")
    own.chmod(0o1777)
    assert opened(connect(operator_files=(str(path),))) == ("key", os.O_RDONLY)


# --- too much


def test_a_flood_that_reads_no_answers(bench: Bench, peer: Peer) -> None:
    """A peer that never reads holds up only itself; when it hangs up, answers unread, the launcher ends."""
    peer.socket.setblocking(False)
    data = protocol.encode(1, JobIds(0))

    def flood() -> None:
        for _ in range(100_000):
            peer.send(data)

    with pytest.raises(BlockingIOError):
        flood()
    peer.socket.close()
    assert peer.end() == 0


def test_hanging_up_in_mid_launch(bench: Bench, peer: Peer) -> None:
    """Launches under way are left to themselves; the next launcher finds them and ends them."""
    with ExitStack() as stack:
        for job_id in range(1, 9):
            descriptors = peer.descriptors(stack, command_file(["sleep", "60"]))
            peer.send(protocol.encode(job_id, Launch(job_id, peer.uid, NO_LIMITS)), descriptors)
        peer.socket.close()
    assert peer.end() == 0
    heir = Peer(bench)
    found = heir.ask(JobIds(0))
    assert isinstance(found, JobIdPage)
    for job_id in found.job_ids:
        heir.ask(Adopt(job_id))
        heir.jobs.append(job_id)
    heir.close()
    assert bench.cgroups() == []


def test_the_launcher_s_own_files_are_root_s(bench: Bench, peer: Peer) -> None:
    """What it makes lies where only root may write, up to the root directory; nobody else reads its lock."""
    assert isinstance(peer.launch(1), Launched)
    scratch = bench.state / "scratch"
    (own,) = bench.scratch()
    assert scratch.stat().st_uid == 0
    assert stat.S_IMODE(scratch.stat().st_mode) & ~0o711 == 0
    assert (own.stat().st_uid, stat.S_IMODE(own.stat().st_mode)) == (peer.uid, 0o700)
    assert stat.S_IMODE((bench.state / "launcher.lock").stat().st_mode) == 0o600
    made = [own, *bench.cgroups(1)]
    assert len(made) > 1
    for parent in {parent for path in made for parent in path.parents}:
        status = parent.lstat()
        open_to_others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        assert (status.st_uid, open_to_others) == (0, False), parent
    for cgroup in bench.cgroups(1):
        assert [path for path in (cgroup, *cgroup.iterdir()) if path.stat().st_uid != 0] == []


def test_a_launcher_whose_server_lives_is_not_ended(
    connect: Callable[..., Peer], peer: Peer, bench: Bench
) -> None:
    """However long it does not answer: the next one says who has the state directory, and ends itself."""
    assert (bench.state / "launcher.lock").read_text() == f"{peer.pid} {os.getpid()}\n"
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        second = connect(greet=False)
        refused = second.ask(second.hello)
        who = f"in use by another pjwd (its launcher is process {peer.pid})"
        assert isinstance(refused, Refused)
        assert refused.operation == f"the state directory {bench.state} is {who}"
    finally:
        os.kill(peer.pid, signal.SIGCONT)
    assert isinstance(peer.launch(1), Launched)


def test_requests_in_mid_launch(bench: Bench, peer: Peer) -> None:
    """A job that is being launched is neither removed, nor adopted, nor accounted, nor launched again."""
    later: list[Request] = [
        Kill(1, init_too=True),
        Remove(1),
        Adopt(1),
        Account(1),
        Measure((1,)),
        Terminate(1),
        Launch(1, peer.uid + 1, NO_LIMITS),
    ]
    # two for each init that will wait, and for the spawner
    before = peer.open_descriptors() + 2 * WAITING_INITS + 2
    for turn in range(40):
        # from one that comes right after the launch to one that comes when it is nearly over
        requests: list[Request] = [Launch(1, peer.uid, NO_LIMITS), *[JobIds(0)] * turn, *later]
        with ExitStack() as stack:
            for seq, request in enumerate(requests):
                descriptors = peer.descriptors(stack) if isinstance(request, Launch) else ()
                peer.send(protocol.encode(seq, request), descriptors)
        answered: set[int] = set()
        while len(answered) < len(requests):
            data, received, _, _ = socket.recv_fds(peer.socket, protocol.MAX_DATAGRAM_BYTES, 3)
            for descriptor in received:
                os.close(descriptor)
            assert data, peer.words()
            answered.add(protocol.decode_reply(data)[0])
        assert answered == set(range(len(requests)))
        while peer.ask(Remove(1)) != Done():
            peer.ask(Kill(1, init_too=True))
        assert bench.cgroups() == bench.scratch() == []
    # the last launch may still be ending; each request gives the launcher a turn
    deadline = time.monotonic() + DEADLINE_SECONDS
    while peer.open_descriptors() != before:
        assert time.monotonic() < deadline
        peer.ask(JobIds(after=0))
