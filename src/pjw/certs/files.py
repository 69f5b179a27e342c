"""Reading and writing of certificates, keys and PEM (RFC 7468). Standard library only.

This module judges no content beyond "is it there, is it PEM, is the key private".
"""

import binascii
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Self

from pjw.errors import ConfigError, describe_errno

# PEM (RFC 7468), read in one place. Standard library only.
#
# Readers of PEM differ in what they accept: text before a block, ends of lines, a byte order mark. So this
# module alone reads a file, and encodes anew what it understood. Then our checks (`cryptography`) and the
# handshake (gRPC's BoringSSL) understand the same.

CERTIFICATES: Final = ("CERTIFICATE",)
KEYS: Final = ("PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY")
ENCRYPTED: Final = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_BEGIN: Final = re.compile(rb"^[ \t]*-----BEGIN ([A-Z0-9 ]+)-----[ \t]*$", re.MULTILINE)
_SPACE: Final = re.compile(rb"\s+")
_LINE_CHARACTERS: Final = 64


def blocks(data: bytes, labels: Sequence[str]) -> list[bytes]:
    """Return each block with one of these labels, in order, encoded anew; ignore text between blocks.

    Raises ValueError for a block that has no end, or is not base64.
    """
    return [_encoded(label, body) for label, body in _found(data) if label in labels]


def _found(data: bytes) -> Iterator[tuple[str, bytes]]:
    data = data.removeprefix(_BYTE_ORDER_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    place = 0
    while (begin := _BEGIN.search(data, place)) is not None:
        label = begin[1].decode()
        place = data.find(b"-----END " + begin[1] + b"-----", begin.end())
        if place < 0:
            raise ValueError(f"it is cut short: its {label} has no end")
        yield label, data[begin.end() : place]


def _encoded(label: str, body: bytes) -> bytes:
    try:
        der = binascii.a2b_base64(_SPACE.sub(b"", body), strict_mode=True)
    except binascii.Error:
        raise ValueError(f"what is in its {label} is not base64") from None
    text = binascii.b2a_base64(der, newline=False)
    lines = [text[start : start + _LINE_CHARACTERS] for start in range(0, len(text), _LINE_CHARACTERS)]
    name = label.encode()
    return b"\n".join((b"-----BEGIN " + name + b"-----", *lines, b"-----END " + name + b"-----", b""))


# Far above any chain of certificates; a wrong path (a disk image, /dev/zero) ends here.
FILE_MAX_BYTES: Final = 1024 * 1024

# Windows has neither: it cannot open a directory, and its files have no owner and mode of this kind.
_OPENS_DIRECTORIES: Final = hasattr(os, "O_DIRECTORY")
_HAS_MODES: Final = hasattr(os, "getuid")

# between the client's own part of a bundle and the authority's
BUNDLE_MARK: Final = b"\nauthority:"


class InMemory(str):
    """Bytes that stand for a file at a path. As a string it is the name that errors give to the bytes."""

    __slots__ = ("data",)

    data: bytes

    def __new__(cls, name: str, data: bytes) -> Self:
        """Call *data* by a name."""
        found = super().__new__(cls, name)
        found.data = data
        return found


# Reads the contents of the file at a path; the second argument is its name in errors.
Read = Callable[[str, str], bytes]


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of one end of a connection, as PEM. The key stays out of repr()."""

    ca_pem: bytes
    crt_pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServerCredentials(Credentials):
    """The server's certificate and key, and the CA whose clients it accepts."""


@dataclass(frozen=True, slots=True)
class ClientCredentials(Credentials):
    """A client's certificate and key, and the CA whose servers it accepts."""


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """The operator's files that a running server reads again, by their absolute paths."""

    ca_crt: str
    server_crt: str
    server_key: str
    revoked: str | None
    config: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Each path once: a file may hold both a certificate and its key."""
        paths = (self.ca_crt, self.server_crt, self.server_key, self.revoked, self.config)
        return tuple(dict.fromkeys(path for path in paths if path is not None))


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its name within the directory, its bytes, its mode."""

    name: str
    data: bytes = field(repr=False)
    mode: int


def load_client_credentials(ca_crt: str, client_crt: str, client_key: str) -> ClientCredentials:
    """Read a client's credentials. Raises ConfigError, naming the file.

    Each file may be a bundle (`pjw.certs.bundle`): then the part for that purpose is taken. No check beyond
    that: `pjw.certs.credentials.diagnose_client` finds out why a server closes the connection, when it does.
    """
    return ClientCredentials(
        # a file without the mark is taken as a whole for its purpose
        ca_pem=read_certificates(ca_crt, lambda *file: _parted(*file)[1]),
        crt_pem=read_certificates(client_crt, lambda *file: _parted(*file)[0]),
        key_pem=read_key(client_key, lambda *file: _parted(*file)[0]),
    )


def _parted(path: str, what: str) -> tuple[bytes, bytes]:
    """Split a file into the client's own part and the authority's."""
    data = read_path(path, what)
    own, _, authority = data.partition(BUNDLE_MARK)
    return own, authority or data


def read_path(path: str, what: str) -> bytes:
    """Read the regular file at *path*; errors call it *what*. Raises ConfigError."""
    if isinstance(path, InMemory):
        return path.data
    try:
        # Windows lacks O_NONBLOCK, without which a FIFO in the file's place hangs us, and alone has O_BINARY
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {describe_errno(error.errno or 0)}") from error
    return read_descriptor(descriptor, path, what)


def read_descriptor(descriptor: int, path: str, what: str) -> bytes:
    """Read an open file and close it; errors call it *what*. Raises ConfigError."""
    try:
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"cannot read {what} {path}: it is not a regular file")
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {describe_errno(error.errno or 0)}") from error
    if len(data) > FILE_MAX_BYTES:
        raise ConfigError(f"cannot read {what} {path}: it is longer than {FILE_MAX_BYTES} bytes")
    return data


def read_certificates(path: str, read: Read = read_path) -> bytes:
    """Return the certificates of a file, one or more, encoded anew as PEM. Raises ConfigError."""
    found = _blocks(read(path, "certificate"), CERTIFICATES, f"certificate {path}")
    if not found:
        raise ConfigError(
            f"cannot read certificate {path}: it has no PEM certificate in it",
            hint="pjw reads PEM, which begins with -----BEGIN CERTIFICATE-----",
        )
    return b"".join(found)


def read_key(path: str, read: Read = read_path) -> bytes:
    """Return the first private key of a file, encoded anew as PEM. Raises ConfigError.

    key_exposure says which other users may read the file.
    """
    data = read(path, "private key")
    if any(mark in data for mark in ENCRYPTED):
        raise ConfigError(
            f"cannot use private key {path}: it is encrypted, and pjw asks for no passphrase",
            hint=f"openssl pkey -in {path} writes it unencrypted",
        )
    found = _blocks(data, KEYS, f"private key {path}")
    if not found:
        raise ConfigError(f"cannot read private key {path}: it has no PEM private key in it")
    return found[0]


def _blocks(data: bytes, labels: Sequence[str], subject: str) -> list[bytes]:
    try:
        return blocks(data, labels)
    except ValueError as error:
        raise ConfigError(f"cannot read {subject}: {error}") from None


def key_exposure(path: str, status: os.stat_result) -> str | None:
    """Describe a key that others than its owner may read; None when only the owner may.

    To warn and not to refuse: tools that deploy keys have their own ideas of modes, and a service that does
    not start teaches the operator nothing. A key of root may be readable by its group, which is how a service
    that is not root gets at a key that it cannot replace.
    """
    if not _HAS_MODES:
        return None
    if not status.st_mode & (0o027 if status.st_uid == 0 else 0o077):
        return None
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return f"others may read the private key {path} (its mode is {mode}): chmod 600 {path}"


def write_new(directory: str, files: Sequence[NewFile]) -> list[str]:
    """Write all of the files, or none; return their paths. Raises ConfigError.

    An existing file is never overwritten. Every file has its mode from its creation on: a
    key that is narrowed later could have been opened before. The directory is made, for
    its owner only, when it is not there.
    """
    with _directory(directory) as descriptor:
        made: list[str] = []
        try:
            for file in files:
                _write(directory, descriptor, file, made)
            if descriptor is not None:
                os.fsync(descriptor)
        except BaseException:
            # an interrupt too must leave no key without its certificate
            for name in made:
                with suppress(OSError):
                    os.unlink(name, dir_fd=descriptor)
            raise
    return [os.path.join(directory, file.name) for file in files]


def replace_file(path: str, data: bytes) -> None:
    """Replace an existing file, and keep its mode and owner. Raises ConfigError."""
    temporary = f"{path}.new"
    try:
        status = os.stat(path)
        # left by a killed replacement
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchown(descriptor, status.st_uid, status.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {describe_errno(error.errno or 0)}") from error


@contextmanager
def _directory(path: str) -> Iterator[int | None]:
    """Give a directory; if this function made it and the block fails, remove it again.

    It is open, so that no other process can put another in its place meanwhile; None on a system that cannot
    open one.
    """
    made = False
    try:
        try:
            os.mkdir(path, 0o700)
            made = True
        except FileExistsError:
            pass
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if _OPENS_DIRECTORIES else None
    except OSError as error:
        raise ConfigError(f"cannot use directory {path}: {describe_errno(error.errno or 0)}") from error
    try:
        yield descriptor
    except BaseException:
        if made:
            with suppress(OSError):
                os.rmdir(path)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _write(directory: str, descriptor: int | None, file: NewFile, made: list[str]) -> None:
    path = os.path.join(directory, file.name)
    name = path if descriptor is None else file.name
    try:
        # O_EXCL follows no link
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode, dir_fd=descriptor)
        made.append(name)
        with os.fdopen(target, "wb") as stream:
            stream.write(file.data)
            stream.flush()
            os.fsync(target)
    except OSError as error:
        hint = (
            "pjw overwrites no certificate and no key: move it away first"
            if error.errno == errno.EEXIST
            else None
        )
        raise ConfigError(f"cannot write {path}: {describe_errno(error.errno or 0)}", hint=hint) from error
