"""Makes one tar archive, of the root of a job, from an image that another tool has written.

This module merges layers in memory, without the contents of files, and leaves out all that a later layer
removes or replaces. So the program that unpacks an image needs to know nothing of layers: each name of the
archive is plain, in a directory that came before it. The archive has no owners, set-id bits, devices or
extended attributes, since in a job all files belong to its user.

An image is untrusted. This module resolves names and links in the tree in memory, and never on a disk.
"""

import errno
import gzip
import hashlib
import json
import lzma
import os
import platform
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, Final, Self

from pjw.errors import ConfigError, InvalidJobError, describe_errno
from pjw.model import ImageConfig, is_variable

PIECE_BYTES: Final = 256 * 1024
ENTRIES_MAX: Final = 2_000_000
_DOCUMENT_BYTES_MAX: Final = 16 * 1024**2
_LINKS_MAX: Final = 40
# as the program that unpacks images has them
_NAME_CHARACTERS_MAX: Final = 4095
_EXTENDED_BYTES_MAX: Final = 1024**2
# A file of this size is in no image; tarfile would look for its end where there is none.
_FILE_BYTES_MAX: Final = 2**44
_EMPTY_READS_MAX: Final = 100
# A FIFO in the place of a file does not block the open. Windows has only the last of these.
_FLAGS: Final = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
_FILE: Final = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in _FLAGS)
_DIRECTORY: Final = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_DIRECTORY", "O_CLOEXEC"))
# an entry of these types describes the entry that follows, and is read into memory
_EXTENDED: Final = (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
NOTES_MAX: Final = 100
_BLOCK: Final = tarfile.BLOCKSIZE
# pjw mounts on these: the archive has empty directories here, whatever the image has
_POINTS: Final = ("dev", "proc", "run", "sys", "tmp")
# pjw mounts the job's own files on these, so the archive must have them
_FILES: Final = ("etc/group", "etc/hosts", "etc/passwd")
# the names of processors in images
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
FORMS: Final = "oci:DIR[:TAG], docker-archive:FILE[:TAG], tar:FILE or dir:DIR"


class _WrongError(Exception):
    """The fault of a source that is no image, or not one that pjw can take."""


# errors of the modules that read and decompress archives, for some damaged or malicious ones
_DAMAGED: Final = (
    tarfile.TarError,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)


class _Entry(tarfile.TarInfo):
    """A header that has us read no more into memory than fits there."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Check each header that tarfile reads. Raises _WrongError."""
        if self.size < 0 or (self.type in _EXTENDED and self.size > _EXTENDED_BYTES_MAX):
            raise _WrongError("a size in it is none")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def _entries_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the entries of an archive, which keeps none of them. Raises _WrongError."""
    while (info := tar.next()) is not None:
        # the entries read so far may be millions
        tar.members.clear()  # type: ignore[attr-defined]
        # an extended header may have said another one
        if not 0 <= info.size <= _FILE_BYTES_MAX:
            raise _WrongError("a size in it is none")
        if max(len(info.name), len(info.linkname)) > _NAME_CHARACTERS_MAX:
            raise _WrongError(f"a name in it is longer than {_NAME_CHARACTERS_MAX} characters")
        yield info


@dataclass(slots=True, eq=False)
class _Node:
    """An entry of the tree; for a file, `place` is the layer and the member with its contents."""

    kind: bytes
    mode: int
    mtime: int
    size: int = 0
    target: str = ""
    place: tuple[int, int] | None = None
    # each child with the last layer that has named it
    children: dict[str, tuple["_Node", int]] = field(default_factory=dict)
    # the last layer that has hidden what older ones have here: nothing of those is left to look for
    opaque: int = -1


@dataclass(frozen=True, slots=True)
class _Member:
    """An entry of a layer: its header in tar, and its contents."""

    info: tarfile.TarInfo
    data: IO[bytes] | None


class _Layer:
    """A layer; each call of `members` reads its entries once more."""

    def members(self) -> Iterator[_Member]:
        raise NotImplementedError


class _TarLayer(_Layer):
    def __init__(self, blobs: "_Blobs", name: str, digest: str = "") -> None:
        self._blobs: Final = blobs
        self._name: Final = name
        self._digest: Final = digest

    def members(self) -> Iterator[_Member]:
        with self._blobs.open(self._name) as raw:
            counted = _Hashed(raw)
            try:
                with tarfile.open(fileobj=counted, mode="r|*", errorlevel=2, tarinfo=_Entry) as tar:  # type: ignore[call-overload]
                    for info in _entries_of(tar):
                        yield _Member(info, tar.extractfile(info) if info.isreg() else None)
            except (*_DAMAGED, gzip.BadGzipFile) as error:
                if counted.begins_with(b"\x28\xb5\x2f\xfd"):
                    raise _WrongError("a layer is compressed with zstd, which pjw does not read") from None
                raise _WrongError(f"a layer is no tar archive, or is damaged ({error})") from None
            if self._digest and counted.digest_of_all() != self._digest:
                raise _WrongError(f"a layer is not what the image says: {self._digest}")


class _Hashed:
    """A file that hashes its bytes as it reads them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Final = file
        self._sum: Final = hashlib.sha256()
        self._first = b""
        self._empty = 0

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        # tarfile skips missing bytes piece by piece, and would for years
        self._empty = 0 if data else self._empty + 1
        if self._empty > _EMPTY_READS_MAX:
            raise EOFError("it ends early")
        self._sum.update(data)
        self._first = self._first or data[:16]
        return data

    def begins_with(self, magic: bytes) -> bool:
        return self._first.startswith(magic)

    def digest_of_all(self) -> str:
        while self.read(PIECE_BYTES):
            pass
        return f"sha256:{self._sum.hexdigest()}"


class _DirectoryLayer(_Layer):
    """A directory of this machine. It follows no link in it."""

    def __init__(self, path: str) -> None:
        self._path: Final = path

    def members(self) -> Iterator[_Member]:
        first: dict[tuple[int, int], str] = {}
        # by descriptors: whose directory it is may put a link in the place of one that is being read
        for where, directories, files, here in _walked(self._path):
            directories.sort()
            for entry in sorted([*directories, *files]):
                path = os.path.join(where, entry)
                name = path if here is None else entry
                info = tarfile.TarInfo(os.path.relpath(path, self._path).replace(os.sep, "/"))
                status = os.lstat(name, dir_fd=here)
                info.mode, info.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
                info.type = tarfile.CHRTYPE
                if stat.S_ISDIR(status.st_mode):
                    info.type = tarfile.DIRTYPE
                elif stat.S_ISLNK(status.st_mode):
                    info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=here)
                elif stat.S_ISREG(status.st_mode):
                    inode = (status.st_dev, status.st_ino)
                    if status.st_nlink > 1 and inode in first:
                        info.type, info.linkname = tarfile.LNKTYPE, first[inode]
                    else:
                        first[inode] = info.name
                        info.type = tarfile.REGTYPE
                        with open(os.open(name, _FILE, dir_fd=here), "rb") as file:
                            now = os.fstat(file.fileno())
                            if not stat.S_ISREG(now.st_mode):
                                raise _WrongError("it has changed meanwhile")
                            info.size = now.st_size
                            yield _Member(info, file)
                        continue
                yield _Member(info, None)


def _walked(path: str) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    """Walk a tree as os.fwalk does; the descriptor is None where directories have none, as on Windows."""
    if hasattr(os, "fwalk"):
        yield from os.fwalk(path, onerror=_raise)
    else:
        yield from ((*found, None) for found in os.walk(path, onerror=_raise))


def _raise(error: OSError) -> None:
    raise error


class _Blobs:
    """The files of an image by their names, in a directory or a tar archive."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file. Raises _WrongError when it is missing."""
        raise NotImplementedError

    def document(self, name: str, digest: str = "") -> Any:  # noqa: ANN401  JSON
        """Return the value of a JSON file. Raises _WrongError."""
        with self.open(name) as file:
            data = file.read(_DOCUMENT_BYTES_MAX)
        if digest and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise _WrongError(f"{name} is not what the image says: {digest}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise _WrongError(f"{name} is no JSON") from None


class _DirectoryBlobs(_Blobs):
    """Files of a directory. It follows no link in it, and waits for nobody who writes to a FIFO."""

    def __init__(self, path: str) -> None:
        self._path: Final = path

    def open(self, name: str) -> IO[bytes]:
        try:
            descriptor = _opened_within(self._path, _plain(name))
        except FileNotFoundError:
            raise _WrongError(f"it has no {_shown(name)}") from None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise
            raise _WrongError(f"{_shown(name)} is no file but a link, or lies behind one") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _WrongError(f"{_shown(name)} is no file")
        return open(descriptor, "rb")


def _opened_within(directory: str, name: str) -> int:
    """Open a file below a directory, by no link; its descriptor. Raises OSError."""
    if os.open not in os.supports_dir_fd:
        # as on Windows, where links take privilege
        return os.open(os.path.join(directory, name), _FILE)
    *above, last = [part for part in name.split("/") if part not in ("", ".")]
    here = os.open(directory, _DIRECTORY)
    try:
        for part in above:
            below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        return os.open(last, _FILE, dir_fd=here)
    finally:
        os.close(here)


class _ArchiveBlobs(_Blobs):
    """A tar archive, maybe compressed."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar: Final = tar
        self._members: Final[dict[str, tarfile.TarInfo]] = {}
        for info in _entries_of(tar):
            # an archive of an image has few members; an archive of a root may have a million
            if len(self._members) < 10_000 and not info.isdir():
                self._members[_relative(info.name)] = info

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str) -> IO[bytes]:
        info = self._members.get(_relative(name))
        # older archives of docker save have each layer once, and links to it
        if info is not None and info.issym():
            info = self._members.get(os.path.normpath(os.path.join(os.path.dirname(name), info.linkname)))
        data = self._tar.extractfile(info) if info is not None and info.isreg() else None
        if data is None:
            raise _WrongError(f"it has no {_shown(name)}")
        return data


def _shown(text: str) -> str:
    """Return a text of an image in a form fit for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _relative(name: str) -> str:
    return os.path.normpath(name).lstrip("/")


def _plain(name: str) -> str:
    """Return the name of a file within an image. Raises _WrongError for a name that leads out of it."""
    if name.startswith("/") or ".." in name.split("/"):
        raise _WrongError(f"it names a file that is not its own: {name!r:.80}")
    return name


class ImageArchive:
    """An open image on this machine; a context manager. `left_out` names the entries that it leaves out."""

    def __init__(self, layers: list[_Layer], config: ImageConfig, *, layered: bool) -> None:
        self._layers: Final = layers
        self._stack = ExitStack()
        self.config: Final = config
        self.left_out: Final[list[str]] = []
        # of all bytes that `pieces` has given
        self.digest = ""
        self.bytes = 0
        self._tree: Final = Tree(layered=layered, notes=self.left_out)
        for number, layer in enumerate(layers):
            for place, member in enumerate(layer.members()):
                self._tree.add(member.info, (number, place))
        self._tree.finish(config.workdir)

    @classmethod
    def open(cls, source: str) -> Self:
        """Open an image: `oci:DIR[:TAG]`, `docker-archive:FILE[:TAG]`, `tar:FILE`, `dir:DIR`, or a FILE.

        Raises ConfigError for a source that is missing or no image.
        """
        with ExitStack() as stack:
            try:
                layers, config, layered = _opened(source, stack)
                archive = cls(layers, config, layered=layered)
            except (_WrongError, InvalidJobError, *_DAMAGED) as error:
                hint = f"an image is given as {FORMS}"
                raise ConfigError(f"cannot use the image {source}: {error}", hint=hint) from None
            except OSError as error:
                what = f"cannot read the image {source}"
                raise ConfigError(f"{what}: {describe_errno(error.errno or 0)}") from None
            archive._stack = stack.pop_all()
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def inodes(self) -> int:
        """The number of its files, directories and links."""
        return self._tree.entries

    @property
    def file_bytes(self) -> int:
        """The number of bytes of its files."""
        files = {id(node): node.size for _, node in self._tree.walk()}
        return sum(files.values())

    def pieces(self) -> Iterator[bytes]:
        """Yield the tar archive. Raises ConfigError when its sources cannot be read, or have changed."""
        total = hashlib.sha256(json.dumps(_members(self.config), sort_keys=True).encode())
        held = bytearray()
        try:
            for entry in self._entries():
                held += entry
                if len(held) >= PIECE_BYTES:
                    total.update(held)
                    self.bytes += len(held)
                    yield bytes(held)
                    held.clear()
        except (_WrongError, *_DAMAGED) as error:
            raise ConfigError(f"cannot read the image: {error}") from None
        except OSError as error:
            raise ConfigError(f"cannot read the image: {describe_errno(error.errno or 0)}") from None
        held += bytes(2 * _BLOCK)
        total.update(held)
        self.bytes += len(held)
        self.digest = f"sha256-{total.hexdigest()}"
        yield bytes(held)

    def _entries(self) -> Iterator[bytes]:
        wanted: dict[tuple[int, int], list[str]] = {}
        empty: list[tuple[str, _Node]] = []
        links: list[tuple[str, _Node]] = []
        for name, node in self._tree.walk():
            if node.kind == tarfile.DIRTYPE:
                yield _header(name, node)
            elif node.kind == tarfile.SYMTYPE:
                links.append((name, node))
            elif node.place is None:
                empty.append((name, node))
            else:
                wanted.setdefault(node.place, []).append(name)
        for name, node in empty:
            yield _header(name, node)
        for number, layer in enumerate(self._layers):
            for place, member in enumerate(layer.members()):
                if names := wanted.pop((number, place), None):
                    yield from self._file(names, member)
        if wanted:
            raise _WrongError("it has changed meanwhile")
        # links come last, so that no name of the archive leads through one
        for name, node in links:
            yield _header(name, node)

    def _file(self, names: list[str], member: _Member) -> Iterator[bytes]:
        first, *others = names
        node = self._tree.find(first)
        if member.data is None or member.info.size != node.size:
            raise _WrongError("it has changed meanwhile")
        yield _header(first, node)
        left = node.size
        while left:
            data = member.data.read(min(left, PIECE_BYTES))
            if not data:
                raise _WrongError("it has changed meanwhile")
            left -= len(data)
            yield data
        yield bytes(-node.size % _BLOCK)
        for name in others:
            yield _header(name, _Node(tarfile.LNKTYPE, node.mode, node.mtime, target=first))


def _members(config: ImageConfig) -> dict[str, object]:
    return {
        "env": dict(config.env),
        "workdir": config.workdir,
        "entrypoint": list(config.entrypoint),
        "command": list(config.command),
    }


def _header(name: str, node: _Node) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.linkname = node.kind, node.mode, node.mtime, node.target
    info.size = node.size if node.kind == tarfile.REGTYPE else 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class Tree:
    """The tree that the layers make, one upon the other."""

    def __init__(self, *, layered: bool, notes: list[str]) -> None:
        self._root: Final = _Node(tarfile.DIRTYPE, 0o755, 0)
        self._layered: Final = layered
        self._notes: Final = notes
        self._count = 0

    def add(self, info: tarfile.TarInfo, place: tuple[int, int]) -> None:
        """Take an entry of a layer. Raises _WrongError for an entry that no image may have."""
        parts = _parts(info.name)
        layer = place[0]
        self._count_one()
        if not parts:
            return
        if any("\0" in part for part in parts) or "\0" in info.linkname:
            raise _WrongError("a name in it has a NUL")
        *above, name = parts
        parent = self._directory(above, layer)
        if self._layered and name.startswith(".wh."):
            self._white_out(parent, name, layer)
        elif info.isdir():
            self._add_directory(parent, name, info, layer)
        elif info.isreg():
            node = _Node(tarfile.REGTYPE, _mode(info, 0o600), _time(info), info.size, place=place)
            parent.children[name] = (node, layer)
        elif info.issym():
            node = _Node(tarfile.SYMTYPE, 0o777, _time(info), target=info.linkname)
            parent.children[name] = (node, layer)
        elif info.islnk():
            parent.children[name] = (self._linked(info, layer), layer)
        elif len(self._notes) < NOTES_MAX:
            self._notes.append(f"{_shown(info.name)}: it is neither a file, nor a directory, nor a link")

    def _count_one(self) -> None:
        self._count += 1
        if self._count > ENTRIES_MAX:
            raise _WrongError(f"it has more than {ENTRIES_MAX} entries")

    def _add_directory(self, parent: _Node, name: str, info: tarfile.TarInfo, layer: int) -> None:
        found = parent.children.get(name)
        node = found[0] if found and found[0].kind == tarfile.DIRTYPE else _Node(tarfile.DIRTYPE, 0, 0)
        # the program that unpacks it must be able to make files in it
        node.mode, node.mtime = _mode(info, 0o700), _time(info)
        parent.children[name] = (node, layer)

    def _linked(self, info: tarfile.TarInfo, layer: int) -> _Node:
        *above, name = _parts(info.linkname) or [""]
        found = self._directory(above, layer).children.get(name)
        if found is None or found[0].kind == tarfile.DIRTYPE:
            raise _WrongError(f"{info.name!r:.80} is a link to a file that it does not have")
        return found[0]

    @staticmethod
    def _white_out(parent: _Node, name: str, layer: int) -> None:
        if name == ".wh..wh..opq":
            _drop_older(parent, layer)
        elif not name.startswith(".wh..wh."):
            hidden = name.removeprefix(".wh.")
            found = parent.children.get(hidden)
            if found is None:
                return
            if found[1] != layer:
                del parent.children[hidden]
            elif found[0].kind == tarfile.DIRTYPE:
                _drop_older(found[0], layer)

    def _directory(self, parts: Iterable[str], layer: int) -> _Node:
        """Return the directory of this name; make it if it is missing, and follow links within the tree."""
        trail = [self._root]
        waiting = list(reversed(list(parts)))
        links = 0
        while waiting:
            part = waiting.pop()
            if part == "..":
                trail = trail[:-1] or trail
                continue
            found = trail[-1].children.get(part)
            if found is not None and found[0].kind == tarfile.SYMTYPE:
                links += 1
                if links > _LINKS_MAX:
                    raise _WrongError("links in it lead nowhere")
                target = found[0].target
                waiting += reversed([each for each in target.split("/") if each not in ("", ".")])
                trail = [self._root] if target.startswith("/") else trail
                continue
            if found is None or found[0].kind != tarfile.DIRTYPE:
                self._count_one()
                found = (_Node(tarfile.DIRTYPE, 0o755, 0), layer)
            trail[-1].children[part] = (found[0], layer)
            trail.append(found[0])
        return trail[-1]

    def finish(self, workdir: str) -> None:
        """Add the paths that jobs need: the places of their own mounts, and their working directory."""
        for name in _POINTS:
            self._root.children[name] = (_Node(tarfile.DIRTYPE, 0o755, 0), -1)
        for path in ("var/tmp", workdir):
            self._directory(_parts(path), -1)
        for path in _FILES:
            *above, name = _parts(path)
            directory = self._directory(above, -1)
            if name not in directory.children:
                directory.children[name] = (_Node(tarfile.REGTYPE, 0o644, 0), -1)

    def walk(self) -> Iterator[tuple[str, _Node]]:
        """Yield all entries, each directory before its content."""
        waiting = [("", self._root)]
        while waiting:
            path, node = waiting.pop()
            for name, (child, _) in sorted(node.children.items(), reverse=True):
                waiting.append((f"{path}/{name}" if path else name, child))
            if path:
                yield path, node

    def find(self, path: str) -> _Node:
        """Return the entry of this name, which leads through no link."""
        node = self._root
        for part in path.split("/"):
            node = node.children[part][0]
        return node

    @property
    def entries(self) -> int:
        """The number of entries."""
        return sum(1 for _ in self.walk())


def _drop_older(directory: _Node, layer: int) -> None:
    """Forget the content of a directory that is from lower layers.

    Looks into each directory once for each layer, however many entries of the layer ask for that.
    """
    waiting = [directory]
    while waiting:
        node = waiting.pop()
        if node.opaque == layer:
            continue
        node.opaque = layer
        for name, (child, of) in list(node.children.items()):
            if of != layer:
                del node.children[name]
            elif child.kind == tarfile.DIRTYPE:
                waiting.append(child)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _WrongError(f"the name {name!r:.80} leads out of it")
    return parts


def _mode(info: tarfile.TarInfo, least: int) -> int:
    return (info.mode & 0o777) | least


def _time(info: tarfile.TarInfo) -> int:
    # an extended header may say "inf", or "nan", which is less than nothing here
    return int(min(max(0, info.mtime), 2**33))


def _opened(source: str, stack: ExitStack) -> tuple[list[_Layer], ImageConfig, bool]:
    kind, colon, rest = source.partition(":")
    if not colon or kind not in ("oci", "docker-archive", "oci-archive", "dir", "tar"):
        kind, rest = "", source
    if not rest:
        raise _WrongError("it has no path")
    if kind == "dir":
        os.stat(os.path.join(rest, "."))
        return [_DirectoryLayer(rest)], ImageConfig(), False
    path, tag = (rest, "") if kind in ("", "tar") or os.path.exists(rest) else _with_tag(rest)
    if kind == "oci":
        return _oci(_DirectoryBlobs(path), tag)
    if kind == "" and os.path.isdir(path):
        raise _WrongError("it is a directory")
    if kind != "tar":
        archive = _ArchiveBlobs(stack.enter_context(_opened_archive(path)))
        if "index.json" in archive and "oci-layout" in archive:
            return _oci(archive, tag)
        if "manifest.json" in archive:
            return _docker(archive, tag)
        if kind:
            raise _WrongError("it has no manifest of an image")
    # the link that a person names is theirs to follow
    directory, name = os.path.split(os.path.realpath(path))
    return [_TarLayer(_DirectoryBlobs(directory or "."), name)], ImageConfig(), False


def _opened_archive(path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:*", tarinfo=_Entry)
    except tarfile.ReadError:
        # its words are a list of all that was tried
        raise _WrongError("it is no tar archive, or is damaged") from None


def _with_tag(rest: str) -> tuple[str, str]:
    path, colon, tag = rest.rpartition(":")
    return (path, tag) if colon else (rest, "")


def _oci(blobs: _Blobs, tag: str) -> tuple[list[_Layer], ImageConfig, bool]:
    """Read an OCI image layout (opencontainers/image-spec, image-layout.md)."""
    found = _of(blobs.document("index.json"), "manifests", list)
    if tag:
        found = [each for each in found if _annotated(each, tag)]
    if len(found) != 1:
        names = ", ".join(_shown(name) for name in map(_name_of, found) if name)
        what = f"no image {tag}" if tag and not found else f"{len(found)} images: {names}"
        raise _WrongError(f"it has {what}; name one of them as :TAG")
    manifest = _blob(blobs, found[0])
    # an index has one image for several kinds of machine
    while "manifests" in manifest:
        ours = ("linux", _MACHINES.get(platform.machine(), platform.machine()))
        fit = [each for each in _of(manifest, "manifests", list) if _platform_of(each) == ours]
        if not fit:
            raise _WrongError(f"it has nothing for this kind of machine, {'/'.join(ours)}")
        manifest = _blob(blobs, fit[0])
    layers: list[_Layer] = []
    for layer in _of(manifest, "layers", list):
        digest = _of(layer, "digest", str)
        layers.append(_TarLayer(blobs, _blob_name(digest), digest))
    return layers, _config(_blob(blobs, _of(manifest, "config", dict))), True


def _annotated(descriptor: object, tag: str) -> bool:
    name = _name_of(descriptor)
    return name == tag or name.endswith(f":{tag}")


def _name_of(descriptor: object) -> str:
    annotations = descriptor.get("annotations") if isinstance(descriptor, dict) else None
    name = annotations.get("org.opencontainers.image.ref.name") if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else ""


def _platform_of(descriptor: object) -> tuple[object, object]:
    machine = _of(descriptor, "platform", dict)
    return machine.get("os"), machine.get("architecture")


def _blob(blobs: _Blobs, descriptor: object) -> Any:  # noqa: ANN401  JSON
    digest = _of(descriptor, "digest", str)
    found = blobs.document(_blob_name(digest), digest)
    if not isinstance(found, dict):
        raise _WrongError(f"{_blob_name(digest)} is not what an image has there")
    return found


def _blob_name(digest: str) -> str:
    kind, _, number = digest.partition(":")
    if kind != "sha256" or len(number) != 64 or not number.isalnum():
        raise _WrongError(f"it has a digest that pjw does not know: {digest!r:.100}")
    return f"blobs/sha256/{number}"


def _docker(blobs: _Blobs, tag: str) -> tuple[list[_Layer], ImageConfig, bool]:
    """Read the archive that `docker save` writes."""
    images = blobs.document("manifest.json")
    if not isinstance(images, list) or not images:
        raise _WrongError("its manifest names no image")
    if tag:
        images = [each for each in images if any(map(_tagged(tag), _of(each, "RepoTags", list)))]
    if len(images) != 1:
        raise _WrongError(f"it has {len(images)} images{f' {tag}' if tag else ''}; name one of them as :TAG")
    layers: list[_Layer] = [_TarLayer(blobs, _plain(str(each))) for each in _of(images[0], "Layers", list)]
    return layers, _config(blobs.document(_plain(_of(images[0], "Config", str)))), True


def _tagged(tag: str) -> Any:  # noqa: ANN401  a predicate
    return lambda name: name == tag or str(name).endswith((f":{tag}", f"/{tag}"))


def _of(value: object, key: str, kind: type) -> Any:  # noqa: ANN401  JSON
    found = value.get(key) if isinstance(value, dict) else None
    if found is None and kind in (list, dict):
        return kind()
    if not isinstance(found, kind):
        raise _WrongError(f"it lacks {key} where there must be one")
    return found


def _config(document: object) -> ImageConfig:
    """Read how jobs begin in the image, without USER: a job always runs as its client's user."""
    found = _of(document, "config", dict)
    env: dict[str, str] = {}
    for each in _of(found, "Env", list):
        name, equals, value = str(each).partition("=")
        if equals and is_variable(name):
            env[name] = value
    words: Mapping[str, list[Any]] = {key: _of(found, key, list) for key in ("Entrypoint", "Cmd")}
    return ImageConfig(
        env,
        str(found.get("WorkingDir") or ""),
        tuple(map(str, words["Entrypoint"])),
        tuple(map(str, words["Cmd"])),
    )
