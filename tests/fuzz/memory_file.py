"""A file in memory that is written anew for each input: on a disk that takes longer than all the rest."""

import os


class MemoryFile:
    """Never closed: it is kept for as long as the process fuzzes."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self._descriptor}"

    def write(self, data: bytes) -> None:
        """Replace what is in it."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
