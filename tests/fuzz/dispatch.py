"""The launcher's routes, in-process: the kernel is asked for nothing but what the policy allows.

An input is a conversation: a line for each datagram, after a digit that says which descriptors come along.
The cgroups are stand-ins that check what they are asked for; scratch directories are real, in a directory of
their own; an audit hook sees every file that is opened, made or removed, and every process that is started.
Jobs 1 and 2 have ended. Job 3 runs, and is the first user's: what would enter it checks who may, and refuses.
"""

import array
import contextlib
import errno
import os
import signal
import socket
import sys
import tempfile
import tomllib  # noqa: F401  which the launcher imports late, and that opens files
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from pjw.errors import JobStateError, MountError, ProtocolError
from pjw.launcher import dispatch, jobs, launches, protocol, sessions
from pjw.launcher.cdi import Device, Edit, Edits
from pjw.launcher.dispatch import Launcher
from pjw.launcher.jobs import Running
from pjw.launcher.mounts import Mounts, Source, Then
from pjw.launcher.phases import InitPhase
from pjw.launcher.policy import JOB_ID_MAX
from pjw.launcher.processes import ENTERED_SIGNAL, INIT_SIGNAL_FIRST
from pjw.launcher.workspaces import Workspaces
from pjw.model import (
    LIMIT_MINIMUM,
    PORT_MAX,
    WEIGHT_MAXIMUM,
    GpuOffer,
    GroupUse,
    Limits,
    MountSource,
    Share,
    Sums,
    Usage,
    UsageSample,
    is_image_key,
    is_workspace,
)
from tests.fuzz import protocol as messages

UID_FIRST, UID_COUNT = 1_900_000_000, 10
RUNNING_JOB = 3
# what the launcher may send to the init of a job, besides the signals that a client names
SIGNALS = {ENTERED_SIGNAL, signal.SIGQUIT, signal.SIGKILL}
OPERATOR_FILES = ("/operator/crt", "/operator/key")
CEILING = Limits(**{f.name: max(1000, LIMIT_MINIMUM.get(f.name, 0)) for f in fields(Limits)})
CHANGING = frozenset({"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink"})
STARTING = frozenset({"os.posix_spawn", "os.exec", "os.fork", "os.system", "subprocess.Popen", "os.kill"})


class Cgroup:
    """The cgroup of an ended job."""

    def make_equal(self) -> None:
        """No job has been launched here."""
        raise AssertionError("a job that was not launched has got its weight")

    def pids(self) -> list[int]:
        """Nothing runs in it."""
        return []

    def kill(self) -> None:
        """So there is nobody to kill."""

    def usage(self) -> Usage:
        """It used something."""
        return Usage(1, 2, 3, 4, 5)

    def measure(self) -> UsageSample:
        """No job has been launched here, so there is none to measure."""
        raise AssertionError("a job that was not launched was measured")

    def try_remove(self) -> bool:
        """It may be removed."""
        return True


class RunningCgroup(Cgroup):
    """The cgroup of the job that runs."""

    def pids(self) -> list[int]:
        """It has none to look into."""
        return []

    def measure(self) -> UsageSample:
        """It uses something."""
        return UsageSample(datetime.now(UTC), 1, 2, 3, 4, 5)

    def lift_throttles(self) -> None:
        """It has none."""

    def try_remove(self) -> bool:
        """Nothing removes what runs."""
        raise AssertionError("the cgroup of a job that runs was to be removed")


class Entries:
    """A stand-in for the spawner: only a job's own client enters it, and only while it runs."""

    def enter(self, job_id: int, init: int, cgroup: Cgroup, tool: int | None) -> socket.socket:
        """No session is ever made."""
        assert (job_id, type(cgroup)) == (RUNNING_JOB, RunningCgroup)
        raise JobStateError("this far and no further")

    def connect(self, job_id: int, init: int, cgroup: Cgroup, uid: int, port: int) -> socket.socket:
        """Nor a connection."""
        assert (job_id, uid, type(cgroup)) == (RUNNING_JOB, UID_FIRST, RunningCgroup)
        assert 1 <= port <= PORT_MAX
        raise JobStateError("this far and no further")


class Hierarchy:
    """Jobs 1 and 2 are there, and have ended."""

    shown: Final = ()

    def create(self, job_id: int, limits: Limits, uid: int, share: Share) -> Cgroup:
        """What comes this far is what the policy allows, and is refused here: no job is ever started."""
        assert 1 <= job_id <= JOB_ID_MAX
        assert UID_FIRST <= uid < UID_FIRST + UID_COUNT
        assert 1 <= share.weight <= WEIGHT_MAXIMUM
        # without those that init keeps by itself
        assert limits.first_above(replace(CEILING, output_max_bytes=0, time_max_seconds=0)) is None
        raise JobStateError("this far and no further")

    def find(self, job_id: int) -> Cgroup | None:
        """Only an id that can be one may become a name."""
        assert 1 <= job_id <= JOB_ID_MAX
        return RunningCgroup() if job_id == RUNNING_JOB else Cgroup() if job_id < RUNNING_JOB else None

    def job_ids(self) -> list[int]:
        """All of them."""
        return [1, 2, RUNNING_JOB]

    def set_sums(self, sums: Sums) -> list[str]:
        """Those of the greeting."""
        assert sums == Sums()
        return []

    def set_share(self, uid: int, share: Share) -> list[str]:
        """Only of one who can be a client."""
        assert UID_FIRST <= uid < UID_FIRST + UID_COUNT
        assert 1 <= share.weight <= WEIGHT_MAXIMUM
        return []

    def share_of(self, uid: int) -> Share | None:
        """None has a job."""
        assert UID_FIRST <= uid < UID_FIRST + UID_COUNT
        return None

    def use_of(self, uid: int) -> GroupUse:
        """So none uses anything."""
        assert UID_FIRST <= uid < UID_FIRST + UID_COUNT
        return GroupUse()

    def release(self) -> None:
        """Nothing was made."""


class Watch:
    """Sees what is asked of the kernel while a request is answered."""

    def __init__(self) -> None:
        self.watched = ""
        sys.addaudithook(self._on_event)

    @contextlib.contextmanager
    def within(self, directory: str) -> Iterator[None]:
        """From here on only what lies in a directory may be touched."""
        self.watched = directory
        try:
            yield
        finally:
            self.watched = ""

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watched:
            return
        assert event not in STARTING, (event, arguments)
        if event in CHANGING:
            if isinstance(arguments[0], int):
                # a file object of a descriptor, which was opened by a path that was seen here
                return
            path = os.fsdecode(arguments[0])
            if (event, path) == ("open", "/proc/self/mountinfo"):
                return
            # a bare name is relative to a descriptor, which was opened by a path that was seen here
            assert path.startswith(self.watched + "/") or "/" not in path, (event, path)
            assert ".." not in path.split("/"), (event, path)


@cache
def _watch() -> Watch:
    # a hook is never removed: one for the process
    return Watch()


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pjw-fuzz-")


def seeds() -> list[bytes]:
    """Each request with its descriptors, all of them in a row, and the wrong number."""
    lines = []
    for data in messages.seeds():
        with contextlib.suppress(ProtocolError):
            count = protocol.descriptors_of(protocol.decode_request(data)[1])
            lines.append(b"%d%s" % (count, data))
    launch = protocol.Launch(3, UID_FIRST, CEILING)
    lines += [
        b"6" + protocol.encode(1, replace(launch, split_stderr=True)),
        b"7" + protocol.encode(1, replace(launch, split_stderr=True, input=True)),
        b"5" + protocol.encode(1, replace(launch, input=True)),
        b"4" + protocol.encode(1, launch),
        b"4" + protocol.encode(2, replace(launch, uid=0)),
        b"4" + protocol.encode(3, replace(launch, workspace="work")),
        b"4" + protocol.encode(3, replace(launch, workspace="../work")),
        b"4" + protocol.encode(3, replace(launch, image="@0123456789abcdef", read_only=True)),
        b"4" + protocol.encode(3, replace(launch, image="../images", workspace="@0123456789abcdef")),
        b"5" + protocol.encode(3, replace(launch, input=True, workspace="@0123456789abcdef", archive=True)),
        b"4" + protocol.encode(3, replace(launch, mounts=("data:/mnt/data",), client_name="alice")),
        b"4" + protocol.encode(3, replace(launch, mounts=("data:/mnt/../x",), client_name="alice")),
        b"0" + protocol.encode(3, protocol.ReloadMounts()),
        b"4" + protocol.encode(3, replace(launch, gpus=("0",), client_name="alice")),
        b"0" + protocol.encode(3, protocol.Gpus(("0",))),
    ]
    later = [line for line in lines if b'"hello"' not in line]
    odd = [b"3" + later[0], b"5" + lines[-2], b"7" + lines[-2]]
    return [*lines, b"\n".join(later), *odd, *_entries()]


def _entries() -> Iterator[bytes]:
    """Sessions and connections in the job that runs: with each option, and as who may not have them."""
    session = protocol.Exec(RUNNING_JOB, UID_FIRST, 1000)
    for request in (
        session,
        replace(session, split_stderr=True, input=True),
        replace(session, input=True, terminal=True),
        replace(session, split_stderr=True, terminal=True),
        replace(session, uid=UID_FIRST + 1),
        replace(session, output_max_bytes=0),
        replace(session, grace_seconds=0),
        replace(session, job_id=1),
        protocol.Connect(RUNNING_JOB, UID_FIRST, 80),
        protocol.Connect(RUNNING_JOB, UID_FIRST, 0),
        protocol.Connect(RUNNING_JOB, UID_FIRST + 1, 80),
        protocol.Connect(RUNNING_JOB + 1, UID_FIRST, 80),
    ):
        yield b"%d%s" % (protocol.descriptors_of(request), protocol.encode(1, request))


def one_input(data: bytes) -> None:
    """Play a conversation to its end, which may be early; its descriptors are all closed again."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _stand_ins():
        launcher = Launcher(theirs)
        with (
            contextlib.closing(launcher),
            contextlib.ExitStack() as stack,
            contextlib.suppress(ProtocolError),
        ):
            hello = protocol.Hello(
                _directory().name,
                UID_FIRST,
                UID_COUNT,
                CEILING,
                floor=Limits(**dict.fromkeys((name for name, _ in CEILING.items()), 0)),
                waiting_inits=4,
                hidden_paths=(),
                visible_paths=(),
                operator_files=OPERATOR_FILES,
                mounts=(MountSource("data", "/data", clients=("alice",)),),
                configuration=OPERATOR_FILES[0],
                gpus=GpuOffer("a.example/gpu", ("/a",), ("alice",)),
            )
            _say(ours, launcher, protocol.encode(0, hello), ())
            stack.enter_context(_running_job(launcher))
            for line in data.split(b"\n"):
                with _descriptors(line[:1]) as descriptors:
                    _say(ours, launcher, line[1:], descriptors)
    assert len(os.listdir("/proc/self/fd")) == before


@contextlib.contextmanager
def _running_job(launcher: Launcher) -> Iterator[None]:
    """Have the launcher know a job that runs; nobody may send anything to the process that stands for it."""
    pidfd = os.pidfd_open(os.getpid())
    launcher.jobs.add(RUNNING_JOB, Running(pidfd, RunningCgroup(), 0))  # type: ignore[arg-type]
    parts, entries = launcher.parts, Entries()
    parts.phases.move(RUNNING_JOB, InitPhase.RUNNING)
    parts.spawner.enter, parts.spawner.connect = entries.enter, entries.connect  # type: ignore[assignment,method-assign]
    parts.scratch.owner = lambda job_id: UID_FIRST if job_id == RUNNING_JOB else 0  # type: ignore[method-assign]
    try:
        yield
    finally:
        # no request lets go of a job that runs
        assert launcher.jobs[RUNNING_JOB].pidfd == pidfd
        launcher.jobs.forget(RUNNING_JOB)
        os.close(pidfd)


def _send_signal(pidfd: int, number: int) -> None:
    """What the launcher would send, and never does."""
    assert "pidfd" in os.readlink(f"/proc/self/fd/{pidfd}")
    assert number in SIGNALS or 1 <= number - INIT_SIGNAL_FIRST <= 31


def _say(ours: socket.socket, launcher: Launcher, data: bytes, descriptors: tuple[int, ...]) -> None:
    if not data or len(data) > 100_000:
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    ours.sendmsg([data], rights)
    with _watch().within(_directory().name):
        launcher._on_request()
    answer = ours.recv(protocol.MAX_DATAGRAM_BYTES, socket.MSG_DONTWAIT)
    assert protocol.decode_reply(answer)[0] == protocol.decode_request(data)[0]


@contextlib.contextmanager
def _descriptors(digit: bytes) -> Iterator[tuple[int, ...]]:
    with contextlib.ExitStack() as stack:
        if digit in (b"1", b"2", b"3", b"4", b"5", b"6"):
            made = [os.memfd_create("fuzz") for _ in range(int(digit))]
        elif digit == b"7":
            made = [os.open(os.devnull, os.O_RDWR), *os.pipe(), os.memfd_create("fuzz")]
        else:
            made = []
        for descriptor in made:
            stack.callback(os.close, descriptor)
        yield tuple(made)


def _open_operator_file(path: str) -> int:
    # Only what root named in the greeting comes this far.
    assert path in OPERATOR_FILES
    return os.memfd_create("fuzz")


def _spawn_count(instance: str, places: tuple[str, ...]) -> tuple[int, int]:
    """As on a host without room for another process: here none may be started."""
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class _Workspaces(Workspaces):
    """Real directories; but what comes this far is a word and a client's user."""

    def path(self, uid: int, name: str) -> str:
        assert UID_FIRST <= uid < UID_FIRST + UID_COUNT
        assert is_workspace(name) or is_image_key(name)
        return super().path(uid, name)

    def spawn_removal(self, uid: int, name: str) -> int:
        raise AssertionError("there is none to remove")

    def spawn_count(self, uid: int, name: str) -> tuple[int, int]:
        self.path(uid, name)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


DEVICE: Final = Device("0", Edits((Edit("/dev/a", "/dev/b", is_device=True),)), Edits())


def _read_devices(_kind: str, directories: Sequence[str]) -> tuple[Device, ...]:
    assert directories == ("/a",)
    return (DEVICE,)


class _Mounts(Mounts):
    """What comes this far is the operator's."""

    def open(self, sources: Sequence[Source], then: Then) -> None:
        assert sources[-1] == DEVICE.own.edits[0] or [source.path for source in sources] == ["/data"]
        then(MountError.of_source("data", errno.EAGAIN))


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    # what takes privilege, or lasts as long as the process
    names: dict[str, Any] = {
        "open_hierarchy": lambda *_, **__: Hierarchy(),
        "disks_under": lambda _: [],
        "hold_lock": lambda _: None,
        "claim_users": lambda *_: (UID_FIRST, ""),
        "open_operator_file": _open_operator_file,
        "open_audit_log": _open_operator_file,
        "spawn_count": _spawn_count,
        "Workspaces": _Workspaces,
        "Mounts": _Mounts,
        "read_devices": _read_devices,
        "send_signal": _send_signal,
    }
    rooms = (dispatch, jobs, launches, sessions)
    real = [(room, name, getattr(room, name)) for room in rooms for name in names if hasattr(room, name)]
    assert {name for _, name, _ in real} == names.keys()
    for room, name, _ in real:
        setattr(room, name, names[name])
    try:
        yield
    finally:
        for room, name, function in real:
            setattr(room, name, function)
