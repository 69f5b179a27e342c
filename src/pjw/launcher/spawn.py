"""Has inits spawned, tells each what to start, and listens to its report.

The spawner is pjw-init in another role: a process that clones inits on request.

The report of an init is a few short datagrams in words: `cloned` with a pidfd of init, then
`execed NANOSECONDS` or `failed STEP ERRNO WORDS`. After `execed`, or at its end, the socket closes.
The other way goes one datagram: the order, in the words of init's own options.
"""

import array
import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pjw.errors import KernelError, ProtocolError
from pjw.launcher.cdi import Edit
from pjw.launcher.cgroup import Cgroup
from pjw.launcher.policy import JOB_ENVIRONMENT, JOB_ID_MAX, Policy, still_offered
from pjw.launcher.processes import Watcher
from pjw.launcher.protocol import Adopt, Exec, Launch
from pjw.launcher.visible import Place
from pjw.model import MountSource, split_mount
from pjw.network import NAMED_MAX, Allowed, Listener, listeners_of

INIT_PROGRAM: Final = str(Path(__file__).with_name("pjw-init"))
_REPORT_MAX_BYTES: Final = 512  # as in init/report.c
_REPORT_RIGHTS_BYTES: Final = socket.CMSG_SPACE(4 * (NAMED_MAX + 1))
# as in init/spawner.c: where it hears us, and the number that the first descriptor of a request has there
_REQUESTS_FD: Final = 3
_FIRST_FD: Final = 4
# Room for requests that wait while the spawner has no processor; by default there is room for some hundred.
_REQUESTS_BYTES: Final = 1 << 20
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h, which x86-64 and AArch64 use
# 68 years, the most that init takes: a job with a longer limit has that one
_TIME_MAX_SECONDS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Cloned:
    """init exists; `pidfd` names it for good."""

    pidfd: int


@dataclass(frozen=True, slots=True)
class Execed:
    """The command was executed, at `started_ns` of CLOCK_REALTIME."""

    started_ns: int


@dataclass(frozen=True, slots=True)
class Connected:
    """A socket that is connected within a job."""

    socket: int


@dataclass(frozen=True, slots=True)
class OpenedTree:
    """A mount of a directory, which is mounted nowhere yet, by its descriptor."""

    tree: int


@dataclass(frozen=True, slots=True)
class Listening:
    """The sockets that listen within a job, in the order of the requested listeners."""

    sockets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A step before exec failed, by its name in init/init.h; "" when init vanished without a report.

    `operation` names the failed step, as it follows "cannot" and precedes the job; a path may be in it.
    """

    step: str
    errno: int
    operation: str


class Spawner:
    """The process that clones inits, our child: started when the first init is wanted, or when it was killed.

    It decides nothing. An init is our own child, and does not notice the end of the spawner. Of the host's
    mounts it has those alone that inits need, as they were when it began (init/template.c): when they change,
    another takes its place.
    """

    def __init__(self, watcher: Watcher, policy: Policy, scratch: str) -> None:
        """Begin without a spawner; *scratch* is the directory of all scratch directories."""
        self._watcher: Final = watcher
        self._hidden: Final = policy.hidden_paths
        # init looks paths up in a template, where a link leads nowhere
        self.scratch: Final = os.path.realpath(scratch)
        self._requests: socket.socket | None = None
        # the options that all inits have in common, encoded
        self._places = b""

    def show(self, places: Sequence[Place]) -> None:
        """Have inits show the host's file systems so from now on, and be made in a template of its mounts."""
        hide = (word for path in self._hidden for word in ("--hide", path))
        self._places = b"".join(map(_encoded, (*place_words(places), *hide)))
        self.close()

    def spawn(
        self, job_id: int, cgroup: Cgroup, trees: Sequence[int] = (), *, read_only: bool = False
    ) -> socket.socket:
        """Spawn an init that waits for its order; return the socket that it reports to.

        *trees* are mounts of an image, which is the job's root instead of the host's (Images.trees). Failures
        from here on are reported. Raises OSError.
        """
        own = f"{self.scratch}/{job_id}"
        words: list[str | int] = ["--hostname", f"job-{job_id}", "--scratch", f"{own}/job" if trees else own]
        words += [word for tree in trees for word in ("--image-fd", tree)]
        words += ["--image-read-only"] if trees and read_only else []
        return self._spawn(job_id, cgroup.init_arguments(), words, self._places)

    def enter(self, job_id: int, init: int, cgroup: Cgroup, tool: int | None) -> socket.socket:
        """Spawn a session in a job that runs, whose *init* is known by its pidfd; it waits for its order.

        A *tool* is a descriptor of the program that it executes instead of one that its command names.
        Returns the socket that it reports to. Raises KernelError.
        """
        more: list[str | int] = [] if tool is None else ["--tool-fd", tool]
        return self._enter(f"a session of job {job_id}", job_id, init, cgroup, more)

    def connect(self, job_id: int, init: int, cgroup: Cgroup, uid: int, port: int) -> socket.socket:
        """Have a process connect to a port within a job, and hand the socket over by its report.

        Raises KernelError.
        """
        more: list[str | int] = ["--uid", str(uid), "--gid", str(uid), "--connect", str(port)]
        return self._enter(f"a connection of job {job_id}", job_id, init, cgroup, more)

    def listen(self, job_id: int, init: int, cgroup: Cgroup, listeners: Sequence[Listener]) -> socket.socket:
        """Have a process listen within a job, and hand the sockets over by its report. Raises KernelError."""
        more: list[str | int] = [word for each in listeners for word in ("--listen", str(each))]
        return self._enter(f"listeners of job {job_id}", job_id, init, cgroup, more)

    def _enter(
        self, subject: str, job_id: int, init: int, cgroup: Cgroup, more: Sequence[str | int]
    ) -> socket.socket:
        try:
            return self._spawn(job_id, cgroup.session_arguments(), ["--enter-fd", init, *more])
        except OSError as error:
            raise KernelError("spawn", subject, error.errno or 0) from error

    def _spawn(
        self,
        job_id: int,
        enter: AbstractContextManager[list[str | int]],
        more: Sequence[str | int],
        shown: bytes = b"",
    ) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, enter as cgroup_options:
                words: list[str | int] = [
                    *("--report-fd", theirs.fileno(), "--wait"),
                    *cgroup_options,
                    *("--variable", f"PJW_JOB_ID={job_id}"),
                    *more,
                ]
                self._request(words, shown)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return ours

    def _request(self, words: Sequence[str | int], shown: bytes) -> None:
        """Send a request; a number is a descriptor, which has another number in the spawner.

        *shown* are further options, encoded.
        """
        descriptors = [word for word in words if isinstance(word, int)]
        numbers = itertools.count(_FIRST_FD)
        texts = [str(next(numbers)) if isinstance(word, int) else word for word in words]
        data = b"".join(map(_encoded, texts)) + shown
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._started().sendmsg([data], rights)
        except (BrokenPipeError, ConnectionResetError):
            # it was killed, and we have not heard of its end yet
            self.close()
            self._started().sendmsg([data], rights)

    def _started(self) -> socket.socket:
        if self._requests is None:
            self._requests = self._start()
        return self._requests

    def _start(self) -> socket.socket:
        # posix_spawn(3) and not fork: a fork copies the interpreter's page tables, 4 to 5 times the cost, and
        # runs Python between fork and exec
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                pid = os.posix_spawn(
                    INIT_PROGRAM,
                    # an init shows itself in the place of this command line, so it is as long as any of them
                    [
                        *("pjw-init: spawner", "--spawner", "--hostname", f"job-{JOB_ID_MAX}"),
                        *("--scratch", f"{self.scratch}/{JOB_ID_MAX}/job"),
                    ],
                    JOB_ENVIRONMENT,
                    file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _REQUESTS_FD)],
                )
            try:
                self._watcher.reap_helper(pid, lambda: self._on_end(ours))
            except OSError:
                # it ends with its requests
                ours.close()
                os.waitpid(pid, 0)
                raise
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        # it takes CAP_NET_ADMIN, which a container may lack
        with suppress(PermissionError):
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _REQUESTS_BYTES)
        return ours

    def _on_end(self, requests: socket.socket) -> None:
        if self._requests is requests:
            self.close()

    def close(self) -> None:
        """Have the spawner end; the processes that it has made go on."""
        if self._requests is not None:
            self._requests.close()
            self._requests = None


def _encoded(word: str) -> bytes:
    return os.fsencode(word) + b"\0"


def place_words(places: Sequence[Place]) -> Iterator[str]:
    """Yield the options of init for places."""
    for place in places:
        yield f"--{place.view}"
        yield place.path


def _option_of(source: MountSource | Edit) -> tuple[str, str]:
    if isinstance(source, Edit):
        return "--open-device" if source.is_device else "--open-file", source.host_path
    return "--open" if source.read_only else "--open-writable", source.path


def spawn_opener(sources: Sequence[MountSource | Edit]) -> tuple[int, socket.socket]:
    """Have a process open directories and devices of the host's; its pid, and the socket that it reports to.

    For each, in their order, comes `OpenedTree`, or `Failed` for the first that cannot be. Raises OSError.
    """
    paths = map(_option_of, sources)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            pid = os.posix_spawn(
                INIT_PROGRAM,
                ["pjw-init: opener", "--report-fd", str(_REQUESTS_FD), *itertools.chain(*paths)],
                JOB_ENVIRONMENT,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _REQUESTS_FD)],
            )
    except BaseException:
        ours.close()
        raise
    return pid, ours


def send_order(
    report: socket.socket,
    request: Launch | Exec,
    descriptors: Sequence[int],
    *,
    workspace: Sequence[int] = (),
    mounts: Sequence[int] = (),
    link: Sequence[int] = (),
    edits: Sequence[Edit] = (),
) -> None:
    """Have an init start its job, or a session its command; *descriptors* are its files. Raises OSError.

    Behind the files of a launch that needs it comes the program for archives.
    *workspace* has the descriptor of a mount, or none; *mounts* are those of the operator's directories, and
    of *edits*. *link* has the network namespace that the job shares with another one, or none. They follow
    the files in this order.
    """
    own = _words_of_launch(request) if isinstance(request, Launch) else _words_of_session(request)
    words = (
        *("--uid", str(request.uid), "--gid", str(request.uid)),
        *own,
        *("--grace", str(request.grace_seconds)),
        *(("--split-stderr",) if request.split_stderr else ()),
        *(("--terminal",) if request.terminal else ()),
        *(("--control",) if "control" in request.files else ()),
        *(("--input",) if request.input else ()),
        *(("--upload",) if isinstance(request, Launch) and request.upload else ()),
        *(("--workspace",) if workspace else ()),
        *(("--keep",) if isinstance(request, Launch) and request.artifacts else ()),
        *(("--tool",) if isinstance(request, Launch) and request.archive else ()),
        *(_words_of_mounts(request, edits) if isinstance(request, Launch) else ()),
        *(("--link",) if link else ()),
    )
    passed = [*descriptors, *workspace, *mounts, *link]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed))]
    report.sendmsg([b"".join(word.encode() + b"\0" for word in words)], rights)


def _words_of_launch(request: Launch) -> tuple[str, ...]:
    limits = request.limits
    return (
        # half of the memory, so that a full /tmp is ENOSPC before it is an OOM kill
        *("--tmp-bytes", str(limits.memory_max_bytes // 2)),
        *("--output-max", str(limits.output_max_bytes)),
        *("--time-max", str(min(limits.time_max_seconds, _TIME_MAX_SECONDS))),
        *(word for listener in listeners_for(request) for word in ("--listen", str(listener))),
    )


def _words_of_mounts(request: Launch, edits: Sequence[Edit]) -> Iterator[str]:
    for _, path in map(split_mount, request.mounts):
        yield "--mount-at"
        yield path
    for edit in edits:
        yield "--device-at"
        yield edit.path


def listeners_for(request: Launch | Adopt) -> Sequence[Listener]:
    """Return the listeners for a job's connections to names on the network; none without names."""
    if not request.allow:
        return ()
    found = listeners_of(request.job_id, request.allow, is_linked=bool(request.link))
    given = list(map(Allowed.of, still_offered(request)))
    # without those of other names, and at the addresses that the job knows them by
    return [each for each in found if not each.host or any(name.has(each.host, each.port) for name in given)]


def _words_of_session(request: Exec) -> tuple[str, ...]:
    return ("--output-max", str(request.output_max_bytes))


def read_report(report: socket.socket) -> Cloned | Execed | Connected | OpenedTree | Listening | Failed:
    """Read the next report; the socket is ready. Raises ProtocolError for anything unknown."""
    try:
        data, ancillary, flags, _ = report.recvmsg(_REPORT_MAX_BYTES, _REPORT_RIGHTS_BYTES)
    except ConnectionResetError:
        # It ended without having read its order. The kernel says so first, and once; its report is next.
        data, ancillary, flags, _ = report.recvmsg(_REPORT_MAX_BYTES, _REPORT_RIGHTS_BYTES)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    match data.split(b" ", 3), list(fds):
        case [b"cloned"], [pidfd]:
            return Cloned(pidfd)
        case [b"connected"], [connected]:
            return Connected(connected)
        case [b"opened"], [tree]:
            return OpenedTree(tree)
        case [b"listening"], [_, *_] as sockets:
            return Listening(tuple(sockets))
        case [b"execed", ns], [] if ns.isdigit():
            return Execed(int(ns))
        case [b"failed", step, error, words], [] if error.isdigit():
            # a path is any bytes, and may have been cut in the middle of a character
            operation = words.decode(errors="backslashreplace")
            return Failed(step.decode("ascii", "replace"), int(error), f"{operation} for")
        case [b""], []:
            return Failed("", 0, "hear from the init of")
    for fd in fds:
        os.close(fd)
    raise ProtocolError(f"init sent an unknown report (flags {flags:#x})")
