"""The program that packs and unpacks archives in jobs: `pjw-archive`, as a file of memory.

A job sees neither the directory that pjw is installed in nor, perhaps, any file at all; and its user may not
be allowed to execute a program that root has installed with a narrow umask. So sessions get a descriptor of
a sealed copy.
"""

import fcntl
import os
from pathlib import Path
from typing import Final

from pjw.errors import KernelError

ARCHIVE_PROGRAM: Final = str(Path(__file__).with_name("pjw-archive"))
# linux/memfd.h; older than Linux 6.3 the kernel does not know it, and then every such file can be executed
_MFD_EXEC: Final = 0x10
_COPIED_AT_ONCE: Final = 1 << 20


class ArchiveProgram:
    """Our copy of it, made when it is first asked for: most services copy no files."""

    def __init__(self) -> None:
        self._descriptor = -1

    def descriptor(self) -> int:
        """Return a descriptor of it, which stays ours. Raises KernelError."""
        if self._descriptor < 0:
            try:
                self._descriptor = _sealed_copy(ARCHIVE_PROGRAM)
            except OSError as error:
                raise KernelError("make a copy of", ARCHIVE_PROGRAM, error.errno or 0) from error
        return self._descriptor

    def close(self) -> None:
        """Close it; processes that execute it go on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sealed_copy(path: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        copy = os.memfd_create("pjw-archive", flags | _MFD_EXEC)
    except OSError:
        copy = os.memfd_create("pjw-archive", flags)
    try:
        program = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while os.sendfile(copy, program, None, _COPIED_AT_ONCE):
                pass
        finally:
            os.close(program)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(copy)
        raise
    return copy
