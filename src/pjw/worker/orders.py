"""Files for an init or a session: its command, and the orders that it watches while it runs.

The orders outlive the server, and need no launcher (init/init.h, struct orders).
"""

import os
import struct
from collections.abc import Iterable
from typing import Final

from pjw.errors import JobStateError, KernelError
from pjw.model import WORKSPACE_DIRECTORY, Job, JobSpec, TerminalSize
from pjw.network import proxy_variables

# The command of a job or session, as its init reads it: docs/launcher-protocol.md has the format.


def command_file(spec: JobSpec, job: Job) -> int:
    """Make a file of memory with a job's command for init; the launcher never reads it.

    Strings, each ended by NUL: the working directory; the additions to the environment, secrets included; an
    empty one; the argv.
    """
    own = {"PJW_WORKSPACE": WORKSPACE_DIRECTORY} if spec.workspace else {}
    if job.allow:
        own |= proxy_variables(job.id, is_linked=bool(job.link))
    variables = {**own, **spec.env, **spec.secrets}
    # init knows the default
    workdir = spec.directory if spec.workspace else spec.workdir
    strings = (workdir, *(f"{name}={value}" for name, value in variables.items()), "", *spec.argv)
    return memory_file("pjw-command", strings)


def memory_file(name: str, strings: Iterable[str]) -> int:
    """Make a file of memory with strings, each ended by NUL; /proc shows its *name*."""
    left = memoryview(b"".join(string.encode() + b"\0" for string in strings))
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# rows, columns, width and height in pixels of a terminal; whether to hang up
_SIZE: Final = struct.Struct("=4H")
_HANG_UP: Final = struct.Struct("=I")


def create_orders(path: str, size: TerminalSize | None) -> int:
    """Make the file; return a descriptor for its reader. Raises OSError."""
    rows, columns = (size.rows, size.columns) if size is not None else (0, 0)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, _SIZE.pack(rows, columns, 0, 0) + _HANG_UP.pack(0))
    finally:
        os.close(descriptor)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def order_size(path: str, size: TerminalSize, subject: str) -> None:
    """Give a terminal another size. Raises JobStateError where there is none."""
    _write(path, 0, _SIZE.pack(size.rows, size.columns, 0, 0), subject)


def order_hang_up(path: str, subject: str) -> None:
    """Have a session end: SIGHUP, and SIGKILL after a grace period."""
    _write(path, _SIZE.size, _HANG_UP.pack(1), subject)


def _write(path: str, offset: int, data: bytes, subject: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise JobStateError(f"{subject} has no terminal, or has ended") from None
    except OSError as error:
        raise KernelError("tell something to", subject, error.errno or 0) from error
    try:
        os.pwrite(descriptor, data, offset)
    except OSError as error:
        raise KernelError("tell something to", subject, error.errno or 0) from error
    finally:
        os.close(descriptor)
