"""Spawns pjw-init, tells it what to start, and listens to its report.

The report is a few short datagrams in words: `cloned` with a pidfd of init, then
`execed NANOSECONDS` or `failed STEP ERRNO WORDS`. After `execed`, or at its end, the socket closes.
The other way goes one datagram: the order, in the words of init's own options.
"""

import array
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pjw.errors import ProtocolError
from pjw.launcher.cgroup import Cgroup
from pjw.launcher.policy import JOB_ENVIRONMENT, Policy
from pjw.launcher.protocol import Launch
from pjw.launcher.visible import Place

INIT_PROGRAM: Final = str(Path(__file__).with_name("pjw-init"))
_REPORT_MAX_BYTES: Final = 512  # as in init/report.c
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
class Failed:
    """A step before exec failed, by its name in init/init.h; "" when init vanished without a word.

    `operation` is what could not be done, as it follows "cannot" and precedes the job; a path may be in it.
    """

    step: str
    errno: int
    operation: str


def spawn_init(
    job_id: int, policy: Policy, places: Sequence[Place], cgroup: Cgroup, scratch: str
) -> tuple[int, socket.socket]:
    """Spawn an init that waits for its order; give its first stage's pid and the socket that it reports to.

    Raises OSError. posix_spawn(3) and not fork: a fork copies the interpreter's page tables,
    4 to 5 times the cost, and runs Python between fork and exec.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, cgroup.init_arguments() as cgroup_options:
            pid = os.posix_spawn(
                INIT_PROGRAM,
                [
                    # init changes this to "running" when it gets its job (init/main.c)
                    "pjw-init: waiting",
                    *("--report-fd", str(theirs.fileno()), "--wait"),
                    *cgroup_options,
                    *("--hostname", f"job-{job_id}", "--scratch", scratch),
                    *place_words(places),
                    *(word for path in policy.hidden_paths for word in ("--hide", path)),
                ],
                {**JOB_ENVIRONMENT, "PJW_JOB_ID": str(job_id)},
                # dup2 of a descriptor to itself only clears its close-on-exec flag (posix_spawn
                # in glibc since 2.29); every other descriptor of ours has that flag.
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno())],
            )
    except BaseException:
        ours.close()
        raise
    ours.setblocking(False)
    return pid, ours


def place_words(places: Sequence[Place]) -> Iterator[str]:
    """What init is told of places."""
    for place in places:
        yield f"--{place.view}"
        yield place.path


def send_order(report: socket.socket, request: Launch, descriptors: Sequence[int]) -> None:
    """Have an init start its job; *descriptors* are its files. Raises OSError."""
    limits = request.limits
    words = (
        *("--uid", str(request.uid), "--gid", str(request.uid)),
        # half of the memory, so that a full /tmp is ENOSPC before it is an OOM kill
        *("--tmp-bytes", str(limits.memory_max_bytes // 2)),
        *("--output-max", str(limits.output_max_bytes)),
        *("--time-max", str(min(limits.time_max_seconds, _TIME_MAX_SECONDS))),
        *("--grace", str(request.grace_seconds)),
        *(("--split-stderr",) if request.split_stderr else ()),
        *(("--input",) if request.input else ()),
    )
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    report.sendmsg([b"".join(word.encode() + b"\0" for word in words)], rights)


def read_report(report: socket.socket) -> Cloned | Execed | Failed:
    """Read the next report; the socket is ready. Raises ProtocolError for anything unknown."""
    try:
        data, ancillary, flags, _ = report.recvmsg(_REPORT_MAX_BYTES, socket.CMSG_SPACE(4))
    except ConnectionResetError:
        # It ended without having read its order. The kernel says so first, and once; its report is next.
        data, ancillary, flags, _ = report.recvmsg(_REPORT_MAX_BYTES, socket.CMSG_SPACE(4))
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload)
    match data.split(b" ", 3), list(fds):
        case [b"cloned"], [pidfd]:
            return Cloned(pidfd)
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
