"""pjwd backup: copies the state directory of a running or stopped pjwd. A pjwd can start from the copy.

A backup is complete or absent: we write it next to its place, sync it, and rename it. First we copy the job
table as it is at one moment, and then the files of each job in it. The files of jobs belong to the server,
which is not root: we open them step by step, and follow no link.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from pjw.errors import ConfigError, describe_errno
from pjw.launcher.job_users import RECORD
from pjw.launcher.lock import hold_lock, is_locked
from pjw.launcher.root_files import require_root_s
from pjw.launcher.scratch import PLACES_NAME
from pjw.server.backup_port import COPIED, FAILED, MESSAGE_MAX, SOCKET_NAME
from pjw.server.operator_socket import connection
from pjw.worker.change_rows import BASE
from pjw.worker.launcher_process import require_root
from pjw.worker.state_dir import BACKED_UP, JOBS, TABLE

# After a restore the next job's id is this far above the last one in the backup. So pjwd gives no id again
# that it gave between the backup and the loss.
IDS_LEFT_OUT: Final = 1_000_000
# The same of the numbers of changes: a reader with a number from before the loss has to begin anew.
CHANGES_LEFT_OUT: Final = 1_000_000_000_000
# files of the launcher: which user ids jobs have, and where their scratch directories were
_LAUNCHERS: Final = (RECORD, PLACES_NAME)
# seconds that pjwd may take to copy its table, which is gigabytes at most
_COPY_SECONDS: Final = 300
_PIECE_BYTES: Final = 16 * 1024 * 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# the first version of the table with the number of bytes of an ended job's output
_VERSION_WITH_BYTES: Final = 2
_VERSION_WITH_QUEUE: Final = 5


@dataclass(frozen=True, slots=True)
class Backup:
    """The place of a backup, the number of jobs in it, and how many of them had not ended."""

    path: str
    jobs: int
    running: int


def back_up(state_dir: str, target: str) -> Backup:
    """Copy a state directory to *target*, a new or an empty directory. Needs root.

    Raises ConfigError; then *target* is as before. When no pjwd serves the state directory, none can start
    until this process ends.
    """
    require_root()
    # Real paths: a link on the way could lead elsewhere than to the checked place.
    state_dir, target = os.path.realpath(state_dir), os.path.realpath(target)
    if not os.path.exists(os.path.join(state_dir, TABLE)):
        raise ConfigError(
            f"cannot back up {state_dir}: it has no job table, {TABLE}",
            hint="name the state directory with --state-dir, or the configuration of pjwd with --config",
        )
    _require_free(target, state_dir)
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise ConfigError(f"cannot back up to {target}: there is no directory {parent}", hint="make it first")
    # a user that may exchange directories there could read the whole backup
    require_root_s(parent, "directory for backups", "give another directory")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # as an exception, so that we remove an unfinished backup
        signal.signal(number, signal.default_int_handler)
    try:
        with _unfinished(target) as directory:
            _copy_table(state_dir, directory)
            jobs, running = _copy_jobs(state_dir, directory)
            for name in _LAUNCHERS:
                source = os.open(state_dir, _DIRECTORY)
                with _closing(source):
                    _copy_file(source, directory, name)
            _sync(directory)
    except OSError as error:
        what = f": {error.filename}" if error.filename else ""
        raise ConfigError(
            f"cannot back up {state_dir} to {target}{what}: {describe_errno(error.errno or 0)}"
        ) from error
    except sqlite3.Error as error:
        raise ConfigError(f"cannot back up the job table of {state_dir} to {target}: {error}") from error
    return Backup(target, jobs, running)


def _require_free(target: str, state_dir: str) -> None:
    if os.path.commonpath((target, state_dir)) == state_dir:
        raise ConfigError(
            f"cannot back up to {target}: it lies in the state directory, and would be lost with it",
            hint="give a directory elsewhere, best on another disk",
        )
    try:
        there = os.listdir(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot back up to {target}: {describe_errno(error.errno or 0)}") from error
    if there:
        raise ConfigError(
            f"cannot back up to {target}: it is not empty", hint="give a new directory for each backup"
        )
    if os.path.ismount(target):
        raise ConfigError(
            f"cannot back up to {target}: it is a mount point, and no backup can be renamed onto one",
            hint=f"give a directory in it, such as {os.path.join(target, 'pjw')}",
        )


@contextmanager
def _unfinished(target: str) -> Iterator[int]:
    """Give an open, new directory next to *target*; rename it to *target* on success, else remove it."""
    path = f"{target}.partial"
    _remove_leftover(path, target)
    os.mkdir(path, 0o700)
    directory = os.open(path, _DIRECTORY)
    with _closing(directory):
        try:
            # the lock tells another backup that this is no leftover
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield directory
            os.rename(path, target)
            parent = os.open(os.path.dirname(target), _DIRECTORY)
            with _closing(parent):
                os.fsync(parent)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


def _remove_leftover(path: str, target: str) -> None:
    """Remove the leftovers of a killed backup."""
    try:
        directory = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    with _closing(directory):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"cannot back up to {target}: another `pjwd backup` is writing {path}"
            ) from None
        shutil.rmtree(path)


def _copy_table(state_dir: str, directory: int) -> None:
    """Copy the table as it is at one moment, as a file of mode 0600."""
    descriptor = os.open(TABLE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with _closing(descriptor), _connection(state_dir) as server:
        if server is not None:
            _send(_received(server, state_dir), descriptor)
            return
    hold_lock(state_dir)
    source = f"file:{quote(os.path.join(state_dir, TABLE))}?mode=rw"
    with (
        closing(sqlite3.connect(source, timeout=0, uri=True)) as table,
        closing(sqlite3.connect(_path(directory, TABLE))) as copy,
    ):
        # without a file of shared memory
        table.execute("PRAGMA locking_mode = EXCLUSIVE")
        table.backup(copy)


@contextmanager
def _connection(state_dir: str) -> Iterator[socket.socket | None]:
    """Connect to the pjwd that serves a state directory; None when none does. Raises ConfigError."""
    with connection(state_dir, SOCKET_NAME) as server:
        if server is None and is_locked(state_dir):
            raise ConfigError(
                f"cannot back up {state_dir}: the pjwd that serves it gives no copy of its job table",
                hint="restart pjwd if its version is older (its jobs go on), or stop it",
            )
        yield server


def _received(server: socket.socket, state_dir: str) -> int:
    """Return the descriptor that the server sends; the caller closes it."""
    server.settimeout(_COPY_SECONDS)
    try:
        message, descriptors, _, _ = socket.recv_fds(server, MESSAGE_MAX, 1)
    except TimeoutError:
        raise ConfigError(
            f"cannot back up {state_dir}: pjwd has sent no copy of its job table for {_COPY_SECONDS} s",
            hint="its disk or pjwd hangs: see the log of pjwd",
        ) from None
    if message == COPIED and len(descriptors) == 1:
        return descriptors[0]
    for each in descriptors:
        os.close(each)
    words = message.removeprefix(FAILED).decode(errors="replace")
    said = f"pjwd says: {words}" if words else "pjwd went away"
    raise ConfigError(f"cannot back up {state_dir}: {said}")


def _copy_jobs(state_dir: str, directory: int) -> tuple[int, int]:
    """Copy the files of each job in the copied table; return the numbers of jobs, and of unfinished ones."""
    source = os.open(os.path.join(state_dir, JOBS), _DIRECTORY)
    with _closing(source), closing(sqlite3.connect(_path(directory, TABLE))) as table:
        # an attacker in the server may have put any schema into the table that root reads here
        table.execute("PRAGMA trusted_schema = OFF")
        if (
            view := table.execute("SELECT name FROM sqlite_schema WHERE type = 'view'").fetchone()
        ) is not None:
            raise ConfigError(
                f"cannot back up {state_dir}: its job table is damaged: {view[0]!r} is a view,"
                " and pjwd makes none"
            )
        # keeps the copy one file, without a separate log
        table.execute("PRAGMA journal_mode = DELETE")
        if (found := table.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            raise ConfigError(f"cannot back up {state_dir}: its job table is damaged: {found[0]}")
        (version,) = table.execute("PRAGMA user_version").fetchone()
        rows = table.execute(
            "SELECT id, state IS NULL, output_bytes > 0 FROM jobs ORDER BY id"
            if version >= _VERSION_WITH_BYTES
            else "SELECT id, state IS NULL, NULL FROM jobs ORDER BY id"
        ).fetchall()
        # they become names of directories, and a server that was taken over can write to the table
        if not all(isinstance(job_id, int) for job_id, _, _ in rows):
            raise ConfigError(
                f"cannot back up {state_dir}: its job table is damaged: the id of a job is no number"
            )
        os.mkdir(JOBS, 0o700, dir_fd=directory)
        target = os.open(JOBS, _DIRECTORY, dir_fd=directory)
        with _closing(target):
            # pjwd keeps the output of a job that has written something as long as the job
            lacking = [
                job_id
                for job_id, _, has_output in rows
                if "output" not in _copy_job(source, target, str(job_id)) and has_output
            ]
            # pjwd has removed these since it copied the table; other files were missing before
            there = set(os.listdir(source))
            removed = [job_id for job_id in lacking if str(job_id) not in there]
            for job_id in removed:
                with suppress(FileNotFoundError):
                    shutil.rmtree(str(job_id), dir_fd=target)
            _as(source, target)
        with table:
            table.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in removed])
            if not table.execute(
                "UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'jobs'", (IDS_LEFT_OUT,)
            ).rowcount:
                table.execute("INSERT INTO sqlite_sequence VALUES ('jobs', ?)", (IDS_LEFT_OUT,))
            if version >= _VERSION_WITH_QUEUE:
                # A job that waits now may have run by the time of a restore: its client decides. A job that
                # has left the queue is like any other running job.
                table.execute("UPDATE jobs SET held = 1 WHERE state IS NULL AND start_ns = 0")
                table.execute(
                    "DELETE FROM specs WHERE id IN (SELECT id FROM jobs WHERE state IS NULL AND start_ns > 0)"
                )
            if table.execute("SELECT 1 FROM sqlite_schema WHERE name = 'change_floor'").fetchone():
                _leave_out_changes(table)
    return len(rows) - len(removed), sum(alive for _, alive, _ in rows)


def _leave_out_changes(table: sqlite3.Connection) -> None:
    """Have the numbers of changes go on far above the last one."""
    table.execute(
        "UPDATE change_floor SET seq = max(seq, (SELECT coalesce(max(seq), 0) FROM changes)) + ?",
        (CHANGES_LEFT_OUT,),
    )
    table.execute("DELETE FROM changes")
    table.execute(
        "INSERT INTO changes (seq, job_id, client_name, state) SELECT seq, 0, '', ? FROM change_floor",
        (BASE,),
    )


def _copy_job(source: int, target: int, name: str) -> set[str]:
    """Copy the files of a job; return the names of the files that existed."""
    copied: set[str] = set()
    with suppress(FileNotFoundError):
        there = os.open(name, _DIRECTORY, dir_fd=source)
        with _closing(there):
            os.mkdir(name, 0o700, dir_fd=target)
            here = os.open(name, _DIRECTORY, dir_fd=target)
            with _closing(here):
                copied.update(file for file in BACKED_UP if _copy_file(there, here, file))
                _as(there, here)
    return copied


def _copy_file(source: int, target: int, name: str) -> bool:
    """Copy a file as it is now, with its owner and mode; return whether it existed."""
    try:
        # O_NONBLOCK: a FIFO in the file's place must not hang us
        there = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    except FileNotFoundError:
        return False
    with _closing(there):
        here = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        with _closing(here):
            # first: a file whose mode says that it is whole must be so before it is read
            _as(there, here)
            _send(os.dup(there), here)
    return True


def _send(source: int, target: int) -> None:
    """Copy the open file *source* into *target*, and close *source*."""
    with _closing(source):
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"cannot copy {os.readlink(f'/proc/self/fd/{source}')}: it is not a regular file"
            )
        offset = 0
        try:
            while offset < status.st_size and (
                sent := os.sendfile(target, source, offset, min(_PIECE_BYTES, status.st_size - offset))
            ):
                offset += sent
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.readlink(f"/proc/self/fd/{target}")) from error


def _as(source: int, target: int) -> None:
    """Give *target* the owner and mode of *source*."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))


def _path(directory: int, name: str) -> str:
    """Return a path for SQLite, which takes no descriptors. Only root can replace the file at this path."""
    return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)


def _sync(directory: int) -> None:
    # one call for all files: with a call for each file, each would wait for the disk
    if ctypes.CDLL(None, use_errno=True).syncfs(directory) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
