"""Files of a running job, for agents: a part of one, and one that is put whole.

All that agents.py has of how files are carried is `put` and `get`. They go as archives, as those of `pjw cp`
do, so the job needs no program for them.
"""

import io
import tarfile
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

from pjw.errors import CopyError, PjwError

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient

# The bytes before a file in an archive: its header, and before that one for a name of up to 4095 bytes.
_HEADERS_BYTES: Final = 16 * 1024


async def put(client: "AsyncClient", job_id: int, path: str, data: bytes, *, executable: bool) -> None:
    """Make a file of a running job, or replace it, with the directories above it. Raises PjwError."""
    words = f"cannot put {path} into job {job_id}"
    there = await _entry(client, job_id, path)
    if there is not None and there.isdir():
        raise PjwError(f"{words}: it is a directory")
    # one that is replaced keeps its permissions
    mode = 0o644 if there is None else there.mode & 0o777
    info = tarfile.TarInfo(path.lstrip("/"))
    info.size, info.mode = len(data), mode | (0o111 if executable else 0)
    archive = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data
    archive += bytes(-len(data) % tarfile.BLOCKSIZE) + bytes(2 * tarfile.BLOCKSIZE)
    try:
        await client.write_archive(job_id, _whole(archive), "/" if path.startswith("/") else ".")
    except CopyError as error:
        raise PjwError(f"{words}: {_why(error)}") from None


async def _whole(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data


async def _entry(client: "AsyncClient", job_id: int, path: str) -> tarfile.TarInfo | None:
    """Return the entry at that path; None where it cannot be read."""
    with suppress(CopyError):
        async with aclosing(client.read_archive(job_id, path)) as pieces:
            return _first_entry(await _headers(pieces))
    return None


async def get(
    client: "AsyncClient", job_id: int, path: str, offset: int, bytes_max: int
) -> tuple[bytes, int]:
    """Return a part of a running job's file, and the size of the file in bytes. Raises PjwError."""
    words = f"cannot get {path} from job {job_id}"
    found = bytearray()
    try:
        async with aclosing(client.read_archive(job_id, path)) as pieces:
            held = await _headers(pieces)
            entry = _first_entry(held)
            if entry is None or not entry.isreg():
                kind = "a directory" if entry is not None and entry.isdir() else "no plain file"
                raise PjwError(f"{words}: it is {kind}")
            first = entry.offset_data + min(offset, entry.size)
            last = min(first + bytes_max, entry.offset_data + entry.size)
            position = 0
            while held:
                found += held[max(0, first - position) : max(0, last - position)]
                position += len(held)
                # the bytes behind the part are not fetched
                held = await anext(pieces, b"") if position < last else b""
    except CopyError as error:
        raise PjwError(f"{words}: {_why(error)}") from None
    return bytes(found), entry.size


async def _headers(pieces: AsyncGenerator[bytes, None]) -> bytes:
    held = b""
    while len(held) < _HEADERS_BYTES and (piece := await anext(pieces, b"")):
        held += piece
    return held


def _first_entry(held: bytes) -> tarfile.TarInfo | None:
    """Return the first entry of an archive's beginning; None for none. The job may have sent anything."""
    try:
        with tarfile.open(fileobj=io.BytesIO(held), mode="r:") as archive:
            return archive.next()
    except (tarfile.TarError, ValueError, OverflowError):
        return None


def _why(error: CopyError) -> str:
    """Return the reason given by the program in the job, without the request it repeats."""
    _, _, why = str(error).rpartition(": cannot ")
    if why.endswith(": no such file or directory"):
        return "there is no such file"
    return f"cannot {why}" if why else str(error)
