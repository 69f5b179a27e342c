"""pjwd drain and pjwd resume: whether this machine starts jobs, for an orderly reboot.

The mark is a file in the state directory, whether pjwd runs or not, and over a reboot. A pjwd that runs
hears of it (drain_port.py). Needs root on the host, and neither a certificate nor a role.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from pjw.errors import ConfigError, describe_errno
from pjw.launcher.lock import is_locked
from pjw.server.config import ServerConfig
from pjw.server.drain_port import DRAIN, EMPTY, MESSAGE_MAX, RESUME, SOCKET_NAME
from pjw.server.operator_socket import connection
from pjw.worker.launcher_process import require_root
from pjw.worker.state_dir import DRAINED

# A pjwd whose event loop hangs does not answer.
_ANSWER_SECONDS: Final = 30


def drain(config: ServerConfig, *, wait: bool) -> None:
    """Have this machine start no more jobs; with *wait*, return when no job is left. Raises ConfigError."""
    state_dir = _state_dir(config, "drain")
    with _told(state_dir, DRAIN) as (server, count):
        if server is None:
            print("drained; no pjwd serves this machine now")
            if wait:
                raise ConfigError(
                    f"cannot wait for the jobs of {state_dir}: no pjwd serves it",
                    hint="start pjwd, and wait again",
                )
            return
        print(f"drained; jobs that have not ended: {count}", flush=True)
        if wait:
            server.settimeout(None)
            if _received(server, state_dir) != EMPTY:
                raise ConfigError(
                    f"cannot wait for the jobs of {state_dir} any more: it was resumed",
                    hint="pjwd drain --wait",
                )
            print("no job is left")


def resume(config: ServerConfig) -> None:
    """Have this machine start jobs again. Raises ConfigError."""
    with _told(_state_dir(config, "resume"), RESUME) as (server, _):
        print("resumed" if server is not None else "resumed; no pjwd serves this machine now")


def _state_dir(config: ServerConfig, verb: str) -> str:
    require_root()
    if config.gateway.crt is not None:
        raise ConfigError(f"cannot {verb} a gateway: it runs no jobs", hint=f"pjw nodes {verb} NODE")
    state_dir = os.path.realpath(config.state_dir)
    if not os.path.isdir(state_dir):
        raise ConfigError(
            f"there is no state directory {state_dir}", hint="give it with --state-dir or --config"
        )
    return state_dir


@contextmanager
def _told(state_dir: str, word: bytes) -> Iterator[tuple[socket.socket | None, int]]:
    """Mark a state directory, and tell its pjwd; the connection to it, and the number of its jobs.

    There is no connection where no pjwd serves. Raises ConfigError.
    """
    with ExitStack() as stack:
        try:
            with _locked(state_dir) as directory:
                _mark(directory, drained=word == DRAIN)
                # after the mark, at which a pjwd looks when it has begun to listen
                server = stack.enter_context(connection(state_dir, SOCKET_NAME))
                count = _tell(server, state_dir, word)
        except OSError as error:
            raise ConfigError(
                f"cannot {word.decode()} {state_dir}: {describe_errno(error.errno or 0)}"
            ) from error
        yield server, count


@contextmanager
def _locked(state_dir: str) -> Iterator[int]:
    """Open a state directory. The process that marks it last is also the last one that pjwd hears."""
    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(directory)


def _mark(directory: int, *, drained: bool) -> None:
    if drained:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(DRAINED, flags, 0o600, dir_fd=directory))
    else:
        with suppress(FileNotFoundError):
            os.unlink(DRAINED, dir_fd=directory)
    os.fsync(directory)


def _tell(server: socket.socket | None, state_dir: str, word: bytes) -> int:
    if server is None:
        if is_locked(state_dir):
            raise ConfigError(
                f"cannot tell the pjwd that serves {state_dir} to {word.decode()}: it does not listen",
                hint="restart it (its jobs go on): the mark is there, and counts then",
            )
        return 0
    server.settimeout(_ANSWER_SECONDS)
    with suppress(ConnectionError):
        # if pjwd has gone, the answer is missing
        server.send(word)
    _, _, count = _received(server, state_dir).partition(b" ")
    return int(count)


def _received(server: socket.socket, state_dir: str) -> bytes:
    try:
        message = server.recv(MESSAGE_MAX)
    except TimeoutError:
        raise ConfigError(
            f"the pjwd of {state_dir} has not answered for {_ANSWER_SECONDS} s", hint="see the log of pjwd"
        ) from None
    except ConnectionError:
        message = b""
    if not message:
        raise ConfigError(
            f"the pjwd of {state_dir} has ended meanwhile; its jobs go on, and it stays as asked",
            hint="start pjwd, and ask again",
        )
    return message
