"""The artifacts of a job as they arrive: listed, or cut down to a part that is an archive of its own.

The job may have made up every byte, as of all that comes out of a job: names are shown with care, and
`copies.Unpacker` checks each one before it makes a file.
"""

import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from pjw.client.copies import EXTENDED_BYTES_MAX, extended_records, name_of, shown
from pjw.errors import CopyError

_BLOCK: Final = tarfile.BLOCKSIZE
_KINDS: Final = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "link",
}


class Artifact(NamedTuple):
    """A file, a directory or a link that was kept; `path` is as it was named in the job."""

    path: str
    kind: str
    bytes: int
    time: datetime
    executable: bool
    # of a link
    target: str


class _Entry(NamedTuple):
    parts: list[str]
    info: tarfile.TarInfo


class _Entries:
    """An archive that comes in pieces: its entries, each followed by the bytes it contains."""

    def __init__(self, what: str) -> None:
        """Begin an archive; *what* words errors, as in "cannot list the artifacts of job 7"."""
        self._what: Final = what
        self._pending = bytearray()
        # the bytes of an entry's contents, with their padding, that are still to come
        self._left = 0
        # the same of an extended header
        self._extended_bytes: int | None = None
        self._extended: dict[str, str] = {}
        self.ended = False

    def feed(self, data: bytes) -> Iterator[_Entry | bytes]:
        """Take the next bytes; yield entries and their contents. Raises CopyError for a broken archive."""
        self._pending += data
        while self._pending and not self.ended:
            if self._left:
                piece = bytes(self._pending[: self._left])
                del self._pending[: self._left]
                self._left -= len(piece)
                yield piece
                continue
            wanted = _BLOCK if self._extended_bytes is None else self._extended_bytes
            wanted += -wanted % _BLOCK
            if len(self._pending) < wanted:
                return
            block = bytes(self._pending[:wanted])
            del self._pending[:wanted]
            try:
                entry = self._take(block)
            except (tarfile.HeaderError, ValueError) as error:
                raise CopyError(f"{self._what}: they are no archive: {shown(str(error))}") from None
            if entry is not None:
                yield entry

    def _take(self, block: bytes) -> _Entry | None:
        if self._extended_bytes is not None:
            self._extended = extended_records(block[: self._extended_bytes])
            self._extended_bytes = None
            return None
        if not any(block):
            self.ended = True
            return None
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        more, self._extended = self._extended, {}
        info.size = int(more.get("size", info.size))
        if info.type == tarfile.XHDTYPE:
            if not 0 < info.size <= EXTENDED_BYTES_MAX:
                raise ValueError(f"a header in it has {info.size} bytes")
            self._extended_bytes = info.size
            return None
        if info.size < 0 or info.type not in _KINDS or (info.size and _KINDS[info.type] != "file"):
            raise ValueError(f"{info.name} is neither a file, nor a directory, nor a link")
        info.name = more.get("path", info.name)
        info.linkname = more.get("linkpath", info.linkname)
        self._left = info.size + -info.size % _BLOCK
        return _Entry([part for part in info.name.split("/") if part not in ("", ".")], info)

    def finish(self) -> None:
        """Note the end of the data. Raises CopyError when it is not a whole archive."""
        if not self.ended:
            raise CopyError(f"{self._what}: the archive ends early")


class Listing:
    """The list of the entries of an archive that comes in pieces."""

    def __init__(self, what: str) -> None:
        self._entries: Final = _Entries(what)

    def feed(self, data: bytes) -> Iterator[Artifact]:
        """Take the next bytes. Raises CopyError."""
        for entry in self._entries.feed(data):
            if isinstance(entry, _Entry) and entry.parts:
                info, kind = entry.info, _KINDS[entry.info.type]
                # as far as dates go
                time = datetime.fromtimestamp(min(max(0, int(info.mtime)), 2**37), UTC)
                target = info.linkname if kind == "link" else ""
                yield Artifact("/".join(entry.parts), kind, info.size, time, bool(info.mode & 0o100), target)

    def finish(self) -> None:
        """Note the end of the data. Raises CopyError when it is not a whole archive."""
        self._entries.finish()


class Selection:
    """A path of an archive that comes in pieces, as the archive that a copy of that path would be."""

    def __init__(self, path: str, base: str, what: str) -> None:
        """Select *path*, where *base* is the place in the job at which the archive begins.

        *what* words errors, as in "cannot copy x". Raises CopyError for a path that cannot be in the archive.
        """
        self._what: Final = what
        self._entries: Final = _Entries(what)
        own = path.removeprefix(base)
        inside = own if own != path and own[:1] in ("", "/") else path
        self._wanted: Final = [part for part in inside.split("/") if part not in ("", ".")]
        if ".." in self._wanted or (path.startswith("/") and inside is path):
            raise CopyError(
                f"{what}: only what was kept of {base} is there",
                hint="give a path that begins there, such as dist/report.txt",
            )
        self._prefix: Final = [name_of(path) or "."]
        self._taken = False
        self._found = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return those that belong to the selection. Raises CopyError."""
        given = bytearray()
        count = len(self._wanted)
        for entry in self._entries.feed(data):
            if not isinstance(entry, _Entry):
                given += entry if self._taken else b""
                continue
            self._taken = entry.parts[:count] == self._wanted
            if self._taken:
                self._found = True
                entry.info.name = "/".join(self._prefix + entry.parts[count:])
                given += entry.info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        return bytes(given)

    def finish(self) -> bytes:
        """Return the end of the selection. Raises CopyError when it is not there, or not whole."""
        self._entries.finish()
        if not self._found:
            raise CopyError(
                f"{self._what}: the job has ended, and this is not among its artifacts",
                hint="pjw artifacts JOB lists them",
            )
        return bytes(2 * _BLOCK)
