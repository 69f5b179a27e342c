"""Files between this machine and a job, as a tar archive: packed here to send, unpacked here with care.

An archive out of a job is hostile: every process of the job could have made it up. So only plain files,
directories and links are taken, by names that are relative and plain. They are made in a new directory that
no other process uses, and links are made after everything else; nothing has its own name before the whole
archive came and was found sound.
"""

import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple, TypeVar

from pjw.client.input import PIECE_BYTES
from pjw.errors import ConfigError, CopyError, InvalidJobError, describe_errno

_BLOCK: Final = tarfile.BLOCKSIZE
_ZEROS: Final = bytes(_BLOCK)
# a name has 4095 bytes at most, and there are two of them
EXTENDED_BYTES_MAX: Final = 64 * 1024
# Far deeper than real trees are. Python cannot remove much deeper ones.
DEPTH_MAX: Final = 256
# they are kept in memory until the end
LINKS_MAX: Final = 200_000
NOTES_MAX: Final = 100
# as far as file systems go: 2242
_TIME_MAX: Final = 2**33
# characters and names that have a special meaning on Windows
_OF_WINDOWS: Final = re.compile(
    r'[<>:"|?*\\\x00-\x1f]|[. ]\Z|\A(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)', re.IGNORECASE
)

Looked = TypeVar("Looked")


class _RefusedError(Exception):
    """An entry out of a job is refused; the text says why."""


class Copied(NamedTuple):
    """The result of a copy: the number of bytes of the archive, and the files left out, in words."""

    bytes: int
    left_out: list[str]


class Notes:
    """The notes about files left out, up to a bounded number."""

    def __init__(self) -> None:
        self.lines: Final[list[str]] = []

    def add(self, name: str, why: str) -> None:
        """Note that something was left out."""
        if len(self.lines) < NOTES_MAX:
            self.lines.append(f"{shown(name)}: {why}")


def shown(text: str) -> str:
    """Return a name fit to show: on one line, and without characters that would steer a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def name_of(path: str) -> str:
    """Return the name of a copy of a path in a job; "" for its contents alone, of `.`, `..` and `/`."""
    base = path.rstrip("/").rpartition("/")[2]
    return "" if base in ("", ".", "..") else base


# --- packing, for a job


class Packer:
    """A file or directory of this machine, as an archive."""

    def __init__(self, source: str, below: str | None = None) -> None:
        """Open *source*; one that ends with `/.` stands for its contents alone.

        With *below*, a path that may be empty, the names in the archive begin with that alone. Raises
        ConfigError when the source is not there.
        """
        self._source: Final = source
        self.notes: Final = Notes()
        base = os.path.basename(source.rstrip(os.sep + (os.altsep or "")))
        # the first part of every name in the archive; "" for none
        self.name = "" if base in ("", ".", "..") else base
        mode = _looked(os.stat, source).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise ConfigError(f"cannot read {shown(source)}: it is neither a file nor a directory")
        if below is not None:
            parts = [below] if stat.S_ISDIR(mode) else [below, base]
            self.name = "/".join(filter(None, parts))

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive. Raises ConfigError for a file that cannot be read, or changes meanwhile."""
        return _archive(self.entries())

    def entries(self) -> Iterator[bytes]:
        """Yield the headers and contents of the archive, without its end. Raises as `pieces`."""
        waiting = [(self._source, self.name or ".")]
        follow = True
        while waiting:
            path, name = waiting.pop()
            status = _looked(os.stat if follow else os.lstat, path)
            follow = False
            if stat.S_ISDIR(status.st_mode):
                yield _header(name, tarfile.DIRTYPE, status)
                # the first of them is taken first
                entries = sorted(_looked(os.listdir, path), reverse=True)
                waiting += [(os.path.join(path, entry), f"{name}/{entry}") for entry in entries]
            elif stat.S_ISREG(status.st_mode):
                yield from self._contents(path, name)
            elif stat.S_ISLNK(status.st_mode):
                yield _header(name, tarfile.SYMTYPE, status, _looked(os.readlink, path))
            else:
                self.notes.add(name, "it is neither a file, nor a directory, nor a link")

    @staticmethod
    def _contents(path: str, name: str) -> Iterator[bytes]:
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                yield _header(name, tarfile.REGTYPE, status)
                left = status.st_size
                while left:
                    data = file.read(min(left, PIECE_BYTES))
                    if not data:
                        raise ConfigError(f"cannot read {shown(path)}: it has become shorter meanwhile")
                    left -= len(data)
                    yield data
                yield bytes(-status.st_size % _BLOCK)
        except OSError as error:
            raise _unreadable(path, error) from error


class UploadPacker:
    """Files and directories of this machine for the start of a job, as one archive."""

    def __init__(self, sources: Iterable[str | tuple[str, str]]) -> None:
        """Open every source. Raises ConfigError for a missing one, InvalidJobError for a bad place."""
        self._packers: Final[list[Packer]] = []
        for each in sources:
            source, path = (each, "") if isinstance(each, str) else each
            self._packers.append(Packer(source, upload_place(path)))

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive. Raises ConfigError for a file that cannot be read, or changes meanwhile."""
        return _archive(entry for packer in self._packers for entry in packer.entries())

    @property
    def left_out(self) -> list[str]:
        """The files left out, in words."""
        return [line for packer in self._packers for line in packer.notes.lines]


def upload_place(path: str) -> str:
    """Return a path in the job's own directory, normalized. Raises InvalidJobError for another path."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise InvalidJobError(
            f"cannot upload to {shown(path)}: it is not in the job's own directory",
            hint="give a path such as lib/data, which begins there",
        )
    return "/".join(parts)


def _archive(entries: Iterable[bytes]) -> Iterator[bytes]:
    """Yield headers and contents in pieces of some size, with the end of an archive."""
    held = bytearray()
    for entry in entries:
        held += entry
        if len(held) >= PIECE_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held) + bytes(2 * _BLOCK)


async def in_threads(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield pieces that are made in threads, one after the other."""
    import asyncio

    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _looked(look: Callable[[str], Looked], path: str) -> Looked:
    try:
        return look(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"cannot read {shown(path)}: {describe_errno(error.errno or 0)}")


def _header(name: str, kind: bytes, status: os.stat_result, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = stat.S_IMODE(status.st_mode) & 0o777
    info.mtime = max(0, int(status.st_mtime))
    info.size = status.st_size if kind == tarfile.REGTYPE else 0
    info.linkname = target
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# --- unpacking, from a job


class Unpacker:
    """An archive out of a job, which comes in pieces, as a file or directory of this machine."""

    def __init__(self, target: str, name: str, what: str) -> None:
        """Take the entry called *name* in the archive: into *target* if that is a directory, else as it.

        Without a name, the contents of a directory go into *target*. *what* words errors, as in "cannot copy
        x". Raises ConfigError.
        """
        self._what: Final = what
        self.notes: Final = Notes()
        self._prefix: Final = name or "."
        ends_as_directory = target.endswith(("/", os.sep))
        self._final: Final = os.path.join(target, name) if name and os.path.isdir(target) else target
        if not os.path.isdir(target) and ends_as_directory and name:
            raise ConfigError(f"cannot write to {shown(target)}: it is no directory")
        parent = os.path.dirname(os.path.abspath(self._final))
        try:
            self._made: Final = tempfile.mkdtemp(prefix=".pjw-copy-", dir=parent)
        except OSError as error:
            raise _unwritable(parent, error) from error
        self._item: Final = os.path.join(self._made, "item")
        self._pending = bytearray()
        # of the file that is being written: its descriptor, and how many bytes and how much padding are left
        self._file = -1
        self._left = 0
        self._padding = 0
        self._time = 0
        self._extended: dict[str, str] = {}
        # the bytes of the extended header still to come; None: no such header is being read
        self._extended_bytes: int | None = None
        self._ended = False
        self._links: Final[list[tuple[list[str], str]]] = []

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises CopyError for a broken or a hostile archive, and ConfigError."""
        try:
            self._feed(data)
        except _RefusedError as error:
            raise CopyError(f"{self._what}: {error}") from None
        except OSError as error:
            raise _unwritable(self._final, error) from error

    def _feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._left:
                written = os.write(self._file, view[: self._left])
                self._left -= written
                view = view[written:]
                if not self._left:
                    self._end_file()
                continue
            if self._padding:
                skipped = min(self._padding, len(view))
                self._padding -= skipped
                view = view[skipped:]
                continue
            wanted = _BLOCK if self._extended_bytes is None else self._extended_bytes
            some = view[: wanted - len(self._pending)]
            self._pending += some
            view = view[len(some) :]
            if len(self._pending) == wanted:
                block = bytes(self._pending)
                self._pending.clear()
                self._take(block)

    def _take(self, block: bytes) -> None:
        if self._ended:
            if block.strip(b"\0"):
                raise _hostile("something comes behind its end")
        elif self._extended_bytes is not None:
            self._padding = -len(block) % _BLOCK
            self._extended_bytes = None
            self._extended = _records(block)
        elif block == _ZEROS:
            if self._extended:
                raise _hostile("a header in it is about nothing")
            self._ended = True
        else:
            self._take_header(block)

    def _take_header(self, block: bytes) -> None:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _hostile(str(error)) from None
        more, self._extended = self._extended, {}
        size = int(more.get("size", info.size))
        if size < 0:
            raise _hostile("a size in it is below 0")
        if info.type == tarfile.XHDTYPE:
            if not 0 < size <= EXTENDED_BYTES_MAX:
                raise _hostile(f"a header in it has {size} bytes")
            self._extended_bytes = size
            return
        name = more.get("path", info.name)
        parts = self._parts(name)
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            self._begin_file(name, parts, info, size)
        elif info.type == tarfile.DIRTYPE:
            self._make(os.mkdir, name, parts)
        elif info.type == tarfile.SYMTYPE and parts:
            if len(self._links) == LINKS_MAX:
                raise _RefusedError(f"it has more than {LINKS_MAX} links")
            self._links.append((parts, more.get("linkpath", info.linkname)))
        else:
            raise _hostile(f"{shown(name)} is neither a file, nor a directory, nor a link")

    def _parts(self, name: str) -> list[str]:
        """Return the path of an entry below the copied one; empty for the copied one itself."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if self._prefix != ".":
            if not parts or parts[0] != self._prefix:
                raise _hostile(f"{shown(name)} is not what was asked for")
            del parts[0]
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise _hostile(f"{shown(name)} leads elsewhere")
        if len(parts) > DEPTH_MAX:
            raise _RefusedError(f"{shown(name)[:80]}... is more than {DEPTH_MAX} directories deep")
        return [_local(part) for part in parts]

    def _path(self, parts: list[str]) -> str:
        return os.path.join(self._item, *parts)

    def _make(self, make: Callable[[str], Looked], name: str, parts: list[str]) -> Looked:
        try:
            return make(self._path(parts))
        except FileExistsError:
            raise _hostile(f"{shown(name)} is in it twice") from None
        except (FileNotFoundError, NotADirectoryError):
            raise _hostile(f"{shown(name)} comes before its directory") from None

    def _begin_file(self, name: str, parts: list[str], info: tarfile.TarInfo, size: int) -> None:
        # of its mode only whether it can be executed; the umask is ours
        mode = 0o777 if info.mode & 0o100 else 0o666
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._file = self._make(lambda path: os.open(path, flags, mode), name, parts)
        self._left, self._padding = size, -size % _BLOCK
        self._time = min(max(0, int(info.mtime)), _TIME_MAX)
        if not size:
            self._end_file()

    def _end_file(self) -> None:
        if os.utime in os.supports_fd:
            os.utime(self._file, (self._time, self._time))
        os.close(self._file)
        self._file = -1

    def finish(self) -> None:
        """Put the whole copy at its place. Raises CopyError when it is not whole, and ConfigError."""
        if not self._ended or self._file >= 0 or not os.path.lexists(self._item):
            raise CopyError(f"{self._what}: the archive ends early")
        try:
            for parts, target in self._links:
                self._link(parts, target)
            _check_place(self._item, self._final)
            _place(self._item, self._final)
        except _RefusedError as error:
            raise CopyError(f"{self._what}: {error}") from None
        except OSError as error:
            raise _unwritable(error.filename2 or error.filename or self._final, error) from error
        self.abandon()

    def _link(self, parts: list[str], target: str) -> None:
        name = "/".join(parts)
        if os.path.lexists(self._path(parts)):
            raise _hostile(f"{shown(name)} is in it twice")
        if not _stays_within(len(parts) - 1, target):
            self.notes.add(name, f"a link out of what is copied, to {shown(target)}")
            return
        try:
            os.symlink(target, self._path(parts))
        except (FileNotFoundError, NotADirectoryError):
            raise _hostile(f"{shown(name)} comes before its directory") from None
        except (OSError, NotImplementedError):
            self.notes.add(name, "this system makes no links")

    def abandon(self) -> None:
        """Remove everything that has not reached its final place."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        shutil.rmtree(self._made, ignore_errors=True)


def _hostile(why: str) -> _RefusedError:
    return _RefusedError(f"what it sent is no archive of that: {why}")


def _unwritable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write {shown(path)}: {describe_errno(error.errno or 0)}")


def _local(part: str) -> str:
    """Return a name if this system allows it. Raises _RefusedError."""
    if os.name == "nt" and _OF_WINDOWS.search(part):
        raise _RefusedError(f"{shown(part)} cannot be the name of a file on this system")
    return part


def _records(block: bytes) -> dict[str, str]:
    try:
        return extended_records(block)
    except ValueError as error:
        raise _hostile(str(error)) from None


def extended_records(block: bytes) -> dict[str, str]:
    """Parse the records of an extended header: `LENGTH KEY=VALUE` and a newline. Raises ValueError."""
    found: dict[str, str] = {}
    while block:
        digits, space, _ = block.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = block[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 2 < length <= len(block) or not equals or block[length - 1] != 0x0A:
            raise ValueError("a header in it is none")
        text = value.decode("utf-8", "surrogateescape")
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise ValueError("a size in it is none")
        found[key.decode("utf-8", "surrogateescape")] = text
        block = block[length:]
    return found


def _stays_within(depth: int, target: str) -> bool:
    """Return whether a link stays in its tree, *depth* directories below the root.

    Upwards only to begin with: from there on the way may be by other links, of which the same holds.
    """
    if not target or "\0" in target or target.startswith("/") or os.path.isabs(target):
        return False
    if os.name == "nt" and ("\\" in target or ":" in target):
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    return ups <= depth and ".." not in parts[ups:]


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _check_place(item: str, final: str, *, below: bool = False) -> None:
    """Check that no directory is in the way of a file, nor the other way round. Raises ConfigError.

    The directory that the caller named may be a link; *below* it no link is followed, as the job says its
    name.
    """
    if not os.path.lexists(final):
        return
    if not _is_directory(item):
        if _is_directory(final):
            raise ConfigError(f"cannot write {shown(final)}: it is a directory")
        return
    if not os.path.isdir(final) or (below and os.path.islink(final)):
        raise ConfigError(f"cannot write to {shown(final)}: it is no directory")
    for entry in os.listdir(item):
        _check_place(os.path.join(item, entry), os.path.join(final, entry), below=True)


def _place(item: str, final: str) -> None:
    if not _is_directory(item) or not os.path.lexists(final):
        os.replace(item, final)
        return
    for entry in os.listdir(item):
        _place(os.path.join(item, entry), os.path.join(final, entry))
    with suppress(OSError):
        os.rmdir(item)


# --- the report of the program in the job


def judge(stderr: bytes, code: int | None) -> tuple[list[str], str | None]:
    """Return the files left out, and the failure (None: none), from the program's stderr and exit code.

    The job may have said anything.
    """
    lines = stderr.decode("utf-8", "backslashreplace").split("\n")
    notes = [shown(line.removeprefix("note: left out ")) for line in lines if line.startswith("note: ")]
    if code == 0:
        return notes[:NOTES_MAX], None
    errors = [shown(line.removeprefix("error: "))[:500] for line in lines if line.startswith("error: ")]
    if errors:
        return notes, errors[-1]
    return notes, "nobody knows how it ended" if code is None else f"it ended with {code}"
