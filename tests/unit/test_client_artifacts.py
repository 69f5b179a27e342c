"""What a client makes of artifacts that come in pieces: a list, or a part of them; whatever the job sends."""

import io
import tarfile
from pathlib import Path

import pytest

from pjw.client.artifacts import Listing, Selection
from pjw.client.copies import Unpacker
from pjw.errors import CopyError
from pjw.model import JOB_DIRECTORY
from tests.unit.test_archive_program import END, entry

LONG = "d" * 120 + "/" + "e" * 120
ARCHIVE = (
    entry("./", tarfile.DIRTYPE)
    + entry("./a", tarfile.DIRTYPE)
    + entry("./a/b", data=b"1" * 1000)
    + entry("./a/to-b", tarfile.SYMTYPE, linkname="b")
    + entry("./ab", data=b"2")
    + entry(f"./{LONG}", data=b"3" * 512)
    + END
)
SIZES = (1, 100, 511, 512, 513, 100_000)


def in_pieces(data: bytes, size: int) -> list[bytes]:
    """The same, as it may come."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def selected(path: str, data: bytes = ARCHIVE, size: int = 512) -> dict[str, bytes]:
    """The names in a selection, and what files contain."""
    selection = Selection(path, JOB_DIRECTORY, "cannot copy")
    given = b"".join(map(selection.feed, in_pieces(data, size))) + selection.finish()
    with tarfile.open(fileobj=io.BytesIO(given)) as archive:
        files = ((info, archive.extractfile(info) if info.isreg() else None) for info in archive)
        return {info.name: file.read() if file else b"" for info, file in files}


@pytest.mark.parametrize("size", SIZES)
def test_a_list(size: int) -> None:
    """Without the directory that all is in."""
    listing = Listing("cannot list")
    found = [each for piece in in_pieces(ARCHIVE, size) for each in listing.feed(piece)]
    listing.finish()
    assert [(each.path, each.kind, each.bytes, each.target) for each in found] == [
        ("a", "directory", 0, ""),
        ("a/b", "file", 1000, ""),
        ("a/to-b", "link", 0, "b"),
        ("ab", "file", 1, ""),
        (LONG, "file", 512, ""),
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a", {"a": b"", "a/b": b"1" * 1000, "a/to-b": b""}),
        ("./a/", {"a": b"", "a/b": b"1" * 1000, "a/to-b": b""}),
        ("a/.", {".": b"", "./b": b"1" * 1000, "./to-b": b""}),
        ("a/b", {"b": b"1" * 1000}),
        ("/run/job/ab", {"ab": b"2"}),
        (LONG, {"e" * 120: b"3" * 512}),
    ],
)
def test_a_part(path: str, names: dict[str, bytes], size: int) -> None:
    """As the archive of a copy of that path."""
    assert selected(path, size=size) == names


@pytest.mark.parametrize(("path", "prefix"), [(".", "."), ("/run/job/.", "."), ("/run/job", "job")])
def test_all(path: str, prefix: str) -> None:
    """The job's own directory, by its name or without one."""
    assert list(selected(path)) == [
        prefix,
        *(f"{prefix}/{name}" for name in ("a", "a/b", "a/to-b", "ab", LONG)),
    ]


@pytest.mark.parametrize("path", ["b", "a/b/c", "none"])
def test_what_is_not_there(path: str) -> None:
    """Nothing that begins in the same way is taken for it."""
    with pytest.raises(CopyError, match="not among its artifacts"):
        selected(path)


@pytest.mark.parametrize("path", ["/etc", "/run/jobs", "../x", "a/../b"])
def test_what_cannot_be_there(path: str) -> None:
    """Only the job's own directory."""
    with pytest.raises(CopyError, match="only what was kept"):
        Selection(path, JOB_DIRECTORY, "cannot copy")


@pytest.mark.parametrize("cut", [0, 100, 512, 1500, 2500, len(ARCHIVE) - 1024])
def test_it_is_never_short(cut: int) -> None:
    """An archive that ends early is an error of the list and of the copy."""
    listing = Listing("cannot list")
    list(listing.feed(ARCHIVE[:cut]))
    with pytest.raises(CopyError, match="ends early"):
        listing.finish()
    with pytest.raises(CopyError, match="ends early"):
        selected("a", ARCHIVE[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"no archive" * 100,
        entry("x", tarfile.LNKTYPE, linkname="/etc/passwd"),
        entry("x", tarfile.CHRTYPE),
        entry("x", tarfile.XHDTYPE, data=b"x" * 100),
        entry("x", tarfile.XHDTYPE, data=b"99 path=x\n"),
        entry("x", tarfile.XHDTYPE, data=b"13 size=-100\n"),
        entry("x", tarfile.DIRTYPE, data=b"x"),
    ],
)
def test_what_is_no_archive(data: bytes) -> None:
    """Only files, directories and links, with headers that are some."""
    for reader in (Listing("cannot list"), Selection(".", JOB_DIRECTORY, "cannot copy")):
        with pytest.raises(CopyError, match="they are no archive"):
            list(reader.feed(data + END))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "x\0y"])
def test_hostile_names_are_refused_where_files_are_made(name: str, tmp_path: Path) -> None:
    """A selection passes them on, and the unpacker makes nothing of them."""
    data = entry(name if "\0" not in name else "z", data=b"x", pax_headers={"path": name})
    selection = Selection(".", JOB_DIRECTORY, "cannot copy")
    unpacker = Unpacker(str(tmp_path / "out"), "", "cannot copy")
    with pytest.raises(CopyError):
        unpacker.feed(selection.feed(data + END) + selection.finish())
    unpacker.abandon()
    assert not list(tmp_path.iterdir())
