"""A file system that takes what it is asked and does not answer: who waits for it ends for no signal.

As NFS does with a server that has gone. A process that is killed waits all the same for the answer to a
request that the file system has read (fs/fuse/dev.c, request_wait_answer).
"""

import ctypes
import os
import struct
import threading
from pathlib import Path
from typing import Final

SUPPORTED: Final = os.access("/dev/fuse", os.R_OK | os.W_OK)
WHY_NOT: Final = "no /dev/fuse here"

_INIT: Final = 26
# FORGET, INTERRUPT, BATCH_FORGET
_NO_ANSWER: Final = (2, 36, 42)
# else all look-ups of a directory but one wait in the kernel
_PARALLEL_DIROPS: Final = 1 << 18
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_WRITE_MAX_BYTES: Final = 4096
# room for such a write and what stands before it: the kernel wants that (EINVAL)
_REQUEST_MAX_BYTES: Final = 64 * 1024
# of <linux/fuse.h>: fuse_in_header, fuse_out_header, fuse_init_out of version 7.31
_IN: Final = struct.Struct("=IIQQIIII")
_OUT: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHII36x")
_libc: Final = ctypes.CDLL(None, use_errno=True)


class DeadFileSystem:
    """Mounted on *directory*, until `release`."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"dead", os.fsencode(directory), b"fuse", 0, options.encode()) != 0:
            error = ctypes.get_errno()
            os.close(self._device)
            raise OSError(error, f"mount: {os.strerror(error)}")
        # requests that wait for an answer
        self.held = 0
        self._reader: Final = threading.Thread(target=self._take_all)
        self._reader.start()

    def release(self) -> None:
        """Unmount it: all who wait for it go on, with an error."""
        if self._device < 0:
            return
        # the first ends the connection, also where a job still has the mount (umount(2))
        _libc.umount2(os.fsencode(self.directory), _MNT_FORCE | _MNT_DETACH)
        self._reader.join()
        os.close(self._device)
        self._device = -1

    def _take_all(self) -> None:
        while True:
            try:
                request = os.read(self._device, _REQUEST_MAX_BYTES)
            except OSError:
                # unmounted
                return
            _, opcode, unique, *_ = _IN.unpack_from(request)
            if opcode == _INIT:
                answer = _INIT_OUT.pack(7, 31, 0, _PARALLEL_DIROPS, 12, 9, _WRITE_MAX_BYTES, 1)
                os.write(self._device, _OUT.pack(_OUT.size + len(answer), 0, unique) + answer)
            elif opcode not in _NO_ANSWER:
                self.held += 1
