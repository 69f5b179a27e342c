"""Starts the launcher, and greets it while still root."""

import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from pjw.errors import ConfigError, KernelError, ProtocolError
from pjw.launcher import protocol
from pjw.model import Limits
from pjw.worker.settings import WorkerSettings

_REQUESTS_FD: Final = 3
# Set-up takes milliseconds; the wait for a predecessor's lock at most 5 s.
_GREETING_SECONDS: Final = 20

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LauncherProcess:
    """A launcher that is ready: its end of the conversation, and itself, our child."""

    requests: socket.socket
    pidfd: int
    ready: protocol.Ready
    # the directory of scratch directories, to ask how full its file system is
    scratch: int


def require_root() -> None:
    """Check that this process is root. Raises ConfigError."""
    if os.geteuid() != 0:
        raise ConfigError(
            "starting jobs needs root: namespaces, cgroups and user ids are set up by it",
            hint="run it with sudo, or as a systemd service; see pjwd check",
        )


def start_launcher(
    state_dir: str,
    settings: WorkerSettings,
    operator_files: tuple[str, ...] = (),
    audit_log: str = "",
    configuration: str = "",
) -> LauncherProcess:
    """Start the launcher and tell it its policy, and the files it may open again for an unprivileged server.

    Must run as root and before gRPC is imported, whose threads make children die before exec. Raises
    ConfigError or KernelError when this host does not allow it.
    """
    require_root()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # -I: neither the environment nor the current directory nor the user's site-packages
        # can slip code into the process that stays root. The empty environment is its own.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-m", "pjw.launcher"],
            {},
            file_actions=[
                # first, as without standard descriptors the socket may have one of their numbers
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), _REQUESTS_FD),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            ],
        )
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        ours.close()
        raise ProtocolError("the launcher ended before it was ready") from None
    scratch = -1
    try:
        ready, scratch = _greet(ours, hello_of(state_dir, settings, operator_files, audit_log, configuration))
        check_limits(ready, settings.default_limits)
        for words in ready.not_set:
            log.warning("%s", words)
    except BaseException:
        ours.close()
        if scratch >= 0:
            os.close(scratch)
        collect(pidfd)  # the launcher ends when our socket closes
        raise
    return LauncherProcess(ours, pidfd, ready, scratch)


def collect(pidfd: int) -> None:
    """Wait for the end of the launcher, and close its pidfd."""
    # A program that ignores SIGCHLD, or waits for any child in some thread, may have collected it already.
    with suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def check_limits(ready: protocol.Ready, limits: Limits) -> None:
    """Check limits of disk IO: they need a disk that the launcher has found. Raises ConfigError."""
    if ready.no_disk and any(value for name, value in limits.items() if name.startswith("io_")):
        raise ConfigError(ready.no_disk, hint=ready.hint)


def hello_of(
    state_dir: str,
    settings: WorkerSettings,
    operator_files: tuple[str, ...],
    audit_log: str = "",
    configuration: str = "",
) -> protocol.Hello:
    """Return the first message to a launcher, with its policy."""
    return protocol.Hello(
        state_dir=state_dir,
        uid_first=settings.uid_first,
        uid_count=settings.uid_count,
        ceiling=settings.ceiling,
        floor=settings.floor,
        waiting_inits=settings.waiting_inits,
        hidden_paths=settings.hidden_paths,
        visible_paths=settings.visible_paths,
        operator_files=operator_files,
        scratch_dir=os.path.realpath(settings.scratch_dir) if settings.scratch_dir else "",
        scratch_bytes_max=settings.scratch_bytes_max,
        scratch_inodes_max=settings.scratch_inodes_max,
        sums=settings.sums,
        audit_log=audit_log,
        workspace_bytes_max=settings.quotas.workspace_bytes_max,
        mounts=settings.mounts,
        configuration=configuration,
        egress_uid=settings.network.uid,
        egress_hosts=settings.network.offered,
        egress_private=tuple(settings.network.private),
        egress_connections_max=settings.network.connections_max,
        egress_connections_total_max=settings.network.connections_total_max,
        gpus=settings.gpus,
    )


def _greet(requests: socket.socket, hello: protocol.Hello) -> tuple[protocol.Ready, int]:
    requests.settimeout(_GREETING_SECONDS)
    requests.send(protocol.encode(0, hello))
    try:
        data, descriptors, _, _ = socket.recv_fds(
            requests, protocol.MAX_DATAGRAM_BYTES, 1, socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError:
        raise ProtocolError(f"the launcher did not answer within {_GREETING_SECONDS} s") from None
    if not data:
        raise ProtocolError("the launcher ended before it was ready")
    _, reply = protocol.decode_reply(data)
    match reply:
        case protocol.Ready() if len(descriptors) == 1:
            return reply, descriptors[0]
        case protocol.Refused(kind="kernel"):
            raise KernelError(reply.operation, reply.subject, reply.errno, hint=reply.hint or None)
        case protocol.Refused():
            raise ConfigError(reply.operation, hint=reply.hint or None)
        case _:
            raise ProtocolError("the launcher answered the greeting with something else")
