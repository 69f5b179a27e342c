"""What becomes of an archive out of a job on the client's machine: whole, within its place, or not at all."""

import tarfile
from pathlib import Path
from typing import Final

import pytest

from pjw.client.copies import DEPTH_MAX, Packer, Unpacker, judge
from pjw.errors import ConfigError, CopyError
from tests.unit.test_archive_program import DATA, END, HOSTILE, entry

ROOT: Final = entry("x", tarfile.DIRTYPE)


def take(target: Path, data: bytes, name: str = "x", piece: int = 1000) -> list[str]:
    """Unpack an archive that comes in pieces; what was left out."""
    unpacker = Unpacker(str(target), name, "cannot copy")
    try:
        for start in range(0, len(data), piece):
            unpacker.feed(data[start : start + piece])
        unpacker.finish()
    finally:
        unpacker.abandon()
    return unpacker.notes.lines


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A canary, and a directory for what comes."""
    (tmp_path / "canary").write_text("alive")
    (tmp_path / "in").mkdir()
    return tmp_path


def require_nothing(scene: Path) -> None:
    """Neither what came, nor anything half made, is there."""
    assert sorted(path.name for path in scene.iterdir()) == ["canary", "in"]
    assert (scene / "canary").read_text() == "alive" and not list((scene / "in").iterdir())


MORE: Final = {
    "another name": entry("y", data=b"y"),
    "twice": ROOT + entry("x/a", data=b"1") + entry("x/a", data=b"2"),
    "a file in a file": entry("x", data=b"1") + entry("x/a", data=b"2"),
    "before its directory": entry("x/a", data=b"1"),
    "a file and a link": ROOT + entry("x/a", data=b"1") + entry("x/a", tarfile.SYMTYPE, linkname="b"),
    "through its own link": ROOT + entry("x/l", tarfile.SYMTYPE, linkname=".") + entry("x/l/f", data=b"f"),
    "a device": ROOT + entry("x/d", tarfile.CHRTYPE),
    "a hard link": ROOT + entry("x/h", tarfile.LNKTYPE, linkname="x"),
    "a global header": entry("x", tarfile.XGLTYPE, data=b"20 path=../canary\n"),
    "the root as a link": entry("x", tarfile.SYMTYPE, linkname=".."),
    "too deep": ROOT + b"".join(entry("x" + "/d" * n, tarfile.DIRTYPE) for n in range(1, DEPTH_MAX + 2)),
}


@pytest.mark.parametrize("what", [*HOSTILE, *MORE])
@pytest.mark.parametrize("name", ["x", ""])
def test_hostile_archives_out_of_a_job(scene: Path, what: str, name: str) -> None:
    """They are refused, and nothing is there of them: not outside, and not at their place."""
    if not name and what == "another name":
        pytest.skip("without a name there is no other")
    end = b"" if what.startswith(("cut", "nothing", "no archive")) else END
    data = {**HOSTILE, **MORE}[what]
    prefix = ROOT if name else entry(".", tarfile.DIRTYPE)
    if what in HOSTILE and not what.startswith(("cut", "nothing", "no archive")):
        data = prefix + data
    with pytest.raises((CopyError, ConfigError)):
        take(scene / "in" / ("x" if not name else ""), data + end, name)
    require_nothing(scene)


@pytest.mark.parametrize("piece", [1, 511, 512, 4096, 10**6])
def test_pieces_of_any_size(scene: Path, piece: int) -> None:
    """What comes is the same however it is cut."""
    data = ROOT + entry("x/" + "long" * 40, data=DATA[:5000]) + entry("x/e", data=b"", mode=0o755) + END
    take(scene / "in", data, piece=piece)
    assert (scene / "in/x" / ("long" * 40)).read_bytes() == DATA[:5000]
    assert (scene / "in/x/e").stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("a", True),
        ("d/b", True),
        ("../a", False),
        ("d/../../canary", False),
        ("d/..", False),
        ("/etc", False),
        ("", False),
        ("..", False),
    ],
)
def test_links_that_lead_out_are_left_out(scene: Path, target: str, kept: bool) -> None:
    """A link stays when it leads to what was copied, whatever other links there are."""
    notes = take(scene / "in", ROOT + entry("x/l", tarfile.SYMTYPE, linkname=target) + END)
    assert (scene / "in/x/l").is_symlink() == kept
    assert len(notes) == (not kept)


def test_links_by_other_links(scene: Path) -> None:
    """d/e/a leads to the root; x by way of it would lead out."""
    data = ROOT + entry("x/d", tarfile.DIRTYPE) + entry("x/d/e", tarfile.DIRTYPE)
    data += entry("x/d/e/a", tarfile.SYMTYPE, linkname="../..")
    data += entry("x/out", tarfile.SYMTYPE, linkname="d/e/a/../canary")
    assert take(scene / "in", data + END) == ["out: a link out of what is copied, to d/e/a/../canary"]


def test_a_directory_that_is_there_is_added_to(scene: Path) -> None:
    """By plain names: a link of the user's within it is not followed, since the job says its name."""
    (scene / "in/x/sub").mkdir(parents=True)
    (scene / "in/x/mine").write_text("mine")
    take(scene / "in", ROOT + entry("x/sub", tarfile.DIRTYPE) + entry("x/sub/f", data=b"f") + END)
    assert (scene / "in/x/mine").read_text() == "mine" and (scene / "in/x/sub/f").read_text() == "f"
    (scene / "in/x/l").symlink_to(scene)
    with pytest.raises(ConfigError, match="it is no directory"):
        take(scene / "in", ROOT + entry("x/l", tarfile.DIRTYPE) + entry("x/l/canary", data=b"dead") + END)
    assert (scene / "canary").read_text() == "alive"


def test_what_is_read_here(tmp_path: Path) -> None:
    """A file that is not there, or is none, is an error before anything is asked of a job."""
    with pytest.raises(ConfigError, match="cannot read"):
        Packer(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="neither a file nor a directory"):
        Packer("/dev/null")


def test_what_a_job_says_cannot_steer_a_terminal() -> None:
    """Its words are shown as text, and bounded."""
    notes, why = judge(b"note: left out \x1b[2J: a FIFO\nerror: cannot \x1b]0;x\x07" + b"y" * 9999 + b"\n", 1)
    assert notes == [r"\x1b[2J: a FIFO"]
    assert why is not None and why.isprintable() and len(why) == 500
    assert judge(b"", 0) == ([], None)
    assert judge(b"error: made up\n", 0) == ([], None)
    assert judge(b"", 137)[1] == "it ended with 137"
