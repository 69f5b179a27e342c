"""The launcher's routes, in-process: the kernel is asked for nothing but what the policy allows.

An input is a conversation: a line for each datagram, after a digit that says which descriptors come along.
The cgroups are stand-ins that check what they are asked for; scratch directories are real, in a directory of
their own; an audit hook sees every file that is opened, made or removed, and every process that is started.
"""

import array
import contextlib
import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

from pjw.errors import JobStateError, ProtocolError
from pjw.launcher import dispatch, protocol
from pjw.launcher.dispatch import Launcher
from pjw.launcher.policy import JOB_ID_MAX
from pjw.model import LIMIT_MINIMUM, WEIGHT_MAXIMUM, GroupUse, Limits, Share, Sums, Usage, UsageSample
from tests.fuzz import protocol as messages

UID_FIRST, UID_COUNT = 1_900_000_000, 10
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


class Hierarchy:
    """Jobs 1 and 2 are there, and have ended."""

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
        return Cgroup() if job_id <= 2 else None

    def job_ids(self) -> list[int]:
        """Both."""
        return [1, 2]

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
    ]
    later = [line for line in lines if b'"hello"' not in line]
    return [*lines, b"\n".join(later), b"3" + later[0], b"5" + lines[-2], b"7" + lines[-2]]


def one_input(data: bytes) -> None:
    """Play a conversation to its end, which may be early; its descriptors are all closed again."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _stand_ins():
        launcher = Launcher(theirs)
        with contextlib.closing(launcher), contextlib.suppress(ProtocolError):
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
            )
            _say(ours, launcher, protocol.encode(0, hello), ())
            for line in data.split(b"\n"):
                with _descriptors(line[:1]) as descriptors:
                    _say(ours, launcher, line[1:], descriptors)
    assert len(os.listdir("/proc/self/fd")) == before


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
    }
    real = {name: getattr(dispatch, name) for name in names}
    for name, stand_in in names.items():
        setattr(dispatch, name, stand_in)
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(dispatch, name, function)
