"""pjw-archive: what it packs and unpacks, and that no archive has it touch what is not in its directory."""

import io
import os
import signal
import socket
import stat
import subprocess
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from pjw.launcher.archive_program import ARCHIVE_PROGRAM

SECONDS: Final = 60
# another build of it, such as one with sanitizers
PROGRAM: Final = os.environ.get("PJW_ARCHIVE", ARCHIVE_PROGRAM)
DATA: Final = bytes(range(256)) * 1000


def program(*arguments: str, cwd: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run it to its end."""
    command = [PROGRAM, *arguments]
    return subprocess.run(command, cwd=cwd, input=data, capture_output=True, timeout=SECONDS, check=False)


def unpacked(cwd: Path, data: bytes, name: str = "", path: str = "in") -> str:
    """Unpack an archive; what it said. It must not fail."""
    done = program("unpack", name, path, cwd=cwd, data=data)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    return done.stderr.decode()


def refused(cwd: Path, data: bytes, name: str = "", path: str = "in") -> str:
    """Why an archive is refused."""
    done = program("unpack", name, path, cwd=cwd, data=data)
    assert (done.returncode, done.stdout) == (1, b"")
    *notes, error = done.stderr.decode("utf-8", "backslashreplace").splitlines()
    assert all(note.startswith("note: ") for note in notes)
    return error


def packed(cwd: Path, path: str) -> tuple[list[tarfile.TarInfo], str]:
    """What is in the archive of a path, and what was said."""
    done = program("pack", path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return archive.getmembers(), done.stderr.decode()


def entry(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", *, gnu: bool = False, **members: object
) -> bytes:
    """One entry, in the format of POSIX, with nothing behind it."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o644
    for key, value in members.items():
        setattr(info, key, value)
    header = info.tobuf(tarfile.GNU_FORMAT) if gnu else info.tobuf(tarfile.PAX_FORMAT)
    return header + data + bytes(-len(data) % 512)


END: Final = bytes(1024)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A directory with `in`, and canaries beside it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "canary").write_text("alive")
    (tmp_path / "out").mkdir()
    return tmp_path


def require_canaries(scene: Path) -> None:
    """Nothing but what is below `in` was touched."""
    assert sorted(path.name for path in scene.iterdir()) == ["canary", "in", "out"]
    assert (scene / "canary").read_text() == "alive"
    assert not list((scene / "out").iterdir())


def collected(cwd: Path, *patterns: str) -> tuple[list[str], str]:
    """The names in the archive of what patterns match, and what was said; no name where nothing does."""
    done = program("collect", cwd=cwd, data=b"".join(pattern.encode() + b"\0" for pattern in patterns))
    if done.returncode == 3:
        assert not done.stdout
        return [], done.stderr.decode()
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return sorted(name.removeprefix("./") for name in archive.getnames()), done.stderr.decode()


# --- what patterns match


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["dist/**"], ["dist", "dist/a", "dist/a/b.o", "dist/empty"]),
        (["dist"], ["dist", "dist/a", "dist/a/b.o", "dist/empty"]),
        (["dist/*"], ["dist", "dist/a", "dist/a/b.o", "dist/empty"]),
        (["dist/a/*.o"], ["dist", "dist/a", "dist/a/b.o"]),
        (["**/*.o"], ["dist", "dist/a", "dist/a/b.o", "top.o"]),
        (["**/a/**/b.o"], ["dist", "dist/a", "dist/a/b.o"]),
        (["*.o"], ["top.o"]),
        (["?op.[no]", "*.txt"], [".hidden.txt", "top.o"]),
        (["dist/empty", "top.o"], ["dist", "dist/empty", "top.o"]),
        # links are taken as links, and nothing is looked for behind them
        (["to-dist"], ["to-dist"]),
        (["to-dist/**"], []),
        (["none", "dist/none", "top.o/x"], []),
        (["**"], [*(".hidden.txt", "dist", "dist/a", "dist/a/b.o", "dist/empty"), "to-dist", "top.o"]),
    ],
)
def test_what_patterns_match(tmp_path: Path, patterns: list[str], names: list[str]) -> None:
    """With the directories that are on the way, and no others."""
    (tmp_path / "dist/a").mkdir(parents=True)
    (tmp_path / "dist/empty").mkdir()
    for path in ("dist/a/b.o", "top.o", ".hidden.txt"):
        (tmp_path / path).write_text(path)
    (tmp_path / "to-dist").symlink_to("dist")
    assert collected(tmp_path, *patterns) == (sorted({".", *names}) if names else [], "")


def test_nothing_short_is_collected(tmp_path: Path) -> None:
    """Beyond a limit of the size of files it is an error, in words, and so is a file that cannot be read."""
    (tmp_path / "f").write_bytes(bytes(100_000))
    with (tmp_path / "archive").open("wb") as archive:
        done = subprocess.run(
            ["prlimit", "--fsize=50000", PROGRAM, "collect"],
            cwd=tmp_path,
            input=b"f\0",
            stdout=archive,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
    words = b"error: cannot write the archive: it is larger than the job's output may be\n"
    assert (done.returncode, done.stderr) == (1, words)
    # not even begun, with a file that has no end to speak of
    os.truncate(tmp_path / "f", 1 << 40)
    limited = ["prlimit", f"--fsize={1 << 30}", PROGRAM, "collect"]
    with (tmp_path / "archive").open("wb") as archive:
        done = subprocess.run(
            limited,
            cwd=tmp_path,
            input=b"f\0",
            stdout=archive,
            stderr=subprocess.PIPE,
            timeout=5,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, words)
    for patterns in (b"", b"not ended"):
        assert program("collect", cwd=tmp_path, data=patterns).returncode == 1


# --- there and back


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    """Contents, modes, times, links, empty directories, odd and long names."""
    source = tmp_path / "source"
    deep = source / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    (deep / ("f" * 200)).write_bytes(DATA)
    (source / "empty").mkdir()
    (source / "nothing").write_bytes(b"")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    os.utime(source / "run", (1_000_000_000, 1_000_000_000))
    (source / "link").symlink_to("run")
    (source / "far").symlink_to("/" + "x/" * 200)
    odd = os.fsencode(source) + b"/odd \xff\n\t name"
    with open(odd, "wb") as file:
        file.write(b"odd")
    done = program("pack", "source", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    (tmp_path / "in").mkdir()
    assert not unpacked(tmp_path, done.stdout)
    back = tmp_path / "in/source"
    assert (back / ("d" * 200) / ("e" * 200) / ("f" * 200)).read_bytes() == DATA
    assert (back / "empty").is_dir() and (back / "nothing").read_bytes() == b""
    status = (back / "run").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o755, 1_000_000_000)
    assert (back / "link").readlink() == Path("run")
    assert os.readlink(back / "far") == os.readlink(source / "far")
    with open(os.fsencode(back) + b"/odd \xff\n\t name", "rb") as file:
        assert file.read() == b"odd"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("source", ["source", "source/a", "source/b", "source/b/c"]),
        ("source/", ["source", "source/a", "source/b", "source/b/c"]),
        ("source/b/../a", ["a"]),
        ("source/.", [".", "./a", "./b", "./b/c"]),
        ("source/b/..", [".", "./a", "./b", "./b/c"]),
        ("to-a", ["to-a"]),
        ("to-b", ["to-b", "to-b/c"]),
    ],
)
def test_what_names_are_in_an_archive(tmp_path: Path, path: str, names: list[str]) -> None:
    """They begin with the last part of the path; a link that is named is followed."""
    (tmp_path / "source/b").mkdir(parents=True)
    (tmp_path / "source/a").write_text("a")
    (tmp_path / "source/b/c").write_text("c")
    (tmp_path / "to-a").symlink_to("source/a")
    (tmp_path / "to-b").symlink_to("source/b")
    members, _ = packed(tmp_path, path)
    assert [member.name for member in members] == names


def test_large_files(tmp_path: Path) -> None:
    """As large as they are, also beyond what a header has room for."""
    size = 9 * 1024**3
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)
    process = subprocess.Popen([PROGRAM, "pack", "large"], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as pipe:
        head = pipe.read(1536)
    assert process.wait(SECONDS) == 1
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as archive:
        assert (member := archive.next()) is not None and (member.name, member.size) == ("large", size)
    with open(tmp_path / "some", "wb") as file:
        file.write(DATA * 20 + b"x")
    done = program("pack", "some", cwd=tmp_path)
    (tmp_path / "in").mkdir()
    unpacked(tmp_path, done.stdout)
    assert (tmp_path / "in/some").read_bytes() == DATA * 20 + b"x"


def test_what_is_left_out(tmp_path: Path) -> None:
    """FIFOs and sockets, with a note for each of the first ones; without waiting for any."""
    (tmp_path / "s").mkdir()
    for number in range(30):
        os.mkfifo(tmp_path / f"s/fifo{number}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s/socket"))
        members, said = packed(tmp_path, "s")
    assert [member.name for member in members] == ["s"]
    lines = said.splitlines()
    assert len(lines) == 21 and lines[-1] == "note: left out 11 more"
    assert all(line.startswith("note: left out s/") for line in lines[:-1])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none", "error: cannot read none: no such file or directory"),
        ("none/x", "error: cannot read none/x: no such file or directory"),
        ("fifo", "error: cannot read fifo: neither a file nor a directory"),
        ("x" * 300, f"error: cannot read {'x' * 300}: file name too long"),
    ],
)
def test_what_cannot_be_packed(tmp_path: Path, path: str, words: str) -> None:
    """It is said in one line, and nothing that looks like an archive is written."""
    os.mkfifo(tmp_path / "fifo")
    done = program("pack", path, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.decode().splitlines()) == (1, b"", [words])


def test_a_tree_without_end(tmp_path: Path) -> None:
    """3,000 directories, one in the other: an error, and no archive that could be taken for whole."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3_000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    done = program("pack", ".", cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout.endswith(END)
    assert done.stderr.endswith(b": a name would be longer than 4095 bytes\n")
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


# --- where it goes


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("there", "there/src/a"),
        ("there/", "there/src/a"),
        ("new", "new/a"),
        ("there/new", "there/new/a"),
        ("there/../new", "new/a"),
        (".", "src/a"),
        ("to-there", "there/src/a"),
    ],
)
def test_a_directory_goes_where_cp_would_put_it(tmp_path: Path, path: str, made: str) -> None:
    """Into a directory, or by another name."""
    (tmp_path / "there").mkdir()
    (tmp_path / "to-there").symlink_to("there")
    unpacked(
        tmp_path, entry("src/", tarfile.DIRTYPE, mode=0o755) + entry("src/a", data=b"a") + END, "src", path
    )
    assert (tmp_path / made).read_bytes() == b"a"


def test_a_file_replaces_a_file(tmp_path: Path) -> None:
    """As a whole, by its new name; who has the old one open keeps that."""
    (tmp_path / "old").write_text("old")
    with open(tmp_path / "old") as before:
        unpacked(tmp_path, entry("new", data=b"new", mode=0o600) + END, "new", "old")
        assert before.read() == "old"
    assert (tmp_path / "old").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/such", "error: cannot unpack into no/such: no such file or directory"),
        ("new/", "error: cannot unpack into new/: no such file or directory"),
        ("file/", "error: cannot unpack into file/: not a directory"),
        ("file/x", "error: cannot unpack into file/x: not a directory"),
        ("full", "error: cannot make src: is a directory"),
    ],
)
def test_where_it_cannot_go(tmp_path: Path, path: str, words: str) -> None:
    """It is said, and nothing is left of the attempt."""
    (tmp_path / "file").write_text("file")
    (tmp_path / "full/src").mkdir(parents=True)
    before = sorted(str(each) for each in tmp_path.rglob("*"))
    assert refused(tmp_path, entry("src", data=b"x") + END, "src", path) == words
    assert sorted(str(each) for each in tmp_path.rglob("*")) == before


def test_a_directory_is_made(tmp_path: Path) -> None:
    """That of an archive without a name, and those in it that are not named before what is in them."""
    unpacked(tmp_path, entry("a/b/c", data=b"x") + entry("./d", data=b"y") + END, "", "in")
    assert (tmp_path / "in/a/b/c").read_bytes() == b"x" and (tmp_path / "in/d").read_bytes() == b"y"


# --- archives of others


@pytest.mark.parametrize(
    "how", ["--format=gnu", "--format=pax", "--format=ustar", "--format=v7", "--format=oldgnu"]
)
def test_archives_of_tar(tmp_path: Path, how: str) -> None:
    """Every format that GNU tar writes, hard links included."""
    source = tmp_path / "s"
    # the oldest has room for 99 bytes, and ustar's hard links for 100
    long = source / ("a" * 60) / ("b" * (30 if how.endswith(("v7", "ustar")) else 80))
    long.mkdir(parents=True)
    (long / "file").write_bytes(DATA)
    os.link(long / "file", source / "hard")
    (source / "soft").symlink_to("hard")
    data = subprocess.run(["tar", "c", how, "s"], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "in").mkdir()
    unpacked(tmp_path, data)
    back = tmp_path / "in" / long.relative_to(tmp_path) / "file"
    assert back.read_bytes() == DATA and back.samefile(tmp_path / "in/s/hard")
    assert (tmp_path / "in/s/soft").readlink() == Path("hard")


def test_devices_and_bits_of_privilege_are_left_out(scene: Path) -> None:
    """No device, no FIFO, no set-id bit."""
    data = entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3) + entry("disk", tarfile.BLKTYPE)
    data += entry("fifo", tarfile.FIFOTYPE) + entry("su", data=b"x", mode=0o6755, uid=0, gid=0)
    data += entry("sticky/", tarfile.DIRTYPE, mode=0o7777)
    said = unpacked(scene, data + END)
    assert said.splitlines() == [
        "note: left out null: a device",
        "note: left out disk: a device",
        "note: left out fifo: a FIFO",
    ]
    assert sorted(path.name for path in (scene / "in").iterdir()) == ["sticky", "su"]
    assert stat.S_IMODE((scene / "in/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((scene / "in/sticky").stat().st_mode) & 0o7000 == 0
    require_canaries(scene)


# --- hostile ones

LONG: Final = "x" * 5000
HOSTILE: Final = {
    "up": entry("../canary", data=b"dead"),
    "up in the middle": entry("a/../../canary", data=b"dead"),
    "up at the end": entry("a/..", tarfile.DIRTYPE),
    "absolute": entry("/canary", data=b"dead"),
    "through a link": entry("l", tarfile.SYMTYPE, linkname="..") + entry("l/canary", data=b"dead"),
    "through an absolute link": entry("l", tarfile.SYMTYPE, linkname="/")
    + entry("l/tmp/pjw-dead", data=b"dead"),
    "through a chain of links": entry("a", tarfile.SYMTYPE, linkname=".")
    + entry("b", tarfile.SYMTYPE, linkname="a/..")
    + entry("b/canary", data=b"dead"),
    "a directory through a link": entry("l", tarfile.SYMTYPE, linkname="../out")
    + entry("l/d/", tarfile.DIRTYPE),
    "a directory that is a link": entry("l", tarfile.SYMTYPE, linkname="../out")
    + entry("l/", tarfile.DIRTYPE)
    + entry("l/f", data=b"dead"),
    "a hard link up": entry("h", tarfile.LNKTYPE, linkname="../canary") + entry("h", data=b"dead"),
    "a hard link, absolute": entry("h", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a hard link through a link": entry("l", tarfile.SYMTYPE, linkname="..")
    + entry("h", tarfile.LNKTYPE, linkname="l/canary"),
    "a long name up": entry(f"{'d/' * 100}{'../' * 101}canary", data=b"dead"),
    "a name of GNU's": entry(f"{'../' * 60}canary", data=b"dead", gnu=True),
    "a name too long": entry(LONG, data=b"x"),
    "10^5 levels": entry("d/" * 100_000, tarfile.DIRTYPE),
    "no name": entry("", data=b"x"),
    "an unknown kind": entry("x", b"?", data=b"x"),
    "sparse": entry("x", tarfile.GNUTYPE_SPARSE, data=b"x"),
    "a size below 0": entry("x", data=b"x")[:124] + b"\xff" * 12 + entry("x", data=b"x")[136:],
    "a sum that is wrong": b"y" + entry("x", data=b"x")[1:],
    "no archive": b"PK\x03\x04" + bytes(range(256)) * 4,
    "nothing": b"",
    "cut in a header": entry("x", data=b"x")[:300],
    "cut in its contents": entry("half", data=DATA)[:5000],
    "cut before its end": entry("x", data=b"x"),
    "an extended header without end": entry("x", tarfile.XHDTYPE, data=b"999999 path=x\n"),
    "an extended header that is none": entry("x", tarfile.XHDTYPE, data=b"\0" * 512),
    "a record of no length": entry("x", tarfile.XHDTYPE, data=b"0 path=x\n"),
    "a record of a vast length": entry("x", tarfile.XHDTYPE, data=b"99999999999999999999999 path=x\n"),
    "an extended header of 1 GiB": entry("x", tarfile.XHDTYPE, size=1024**3),
    "a NUL in a name": entry("x", tarfile.XHDTYPE, data=b"12 path=a\0b\n"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives_touch_nothing_outside(scene: Path, what: str) -> None:
    """They are refused, what they made before is in the directory, and each file there is whole."""
    end = b"" if what.startswith(("cut", "nothing", "no archive")) else END
    done = program("unpack", "", "in", cwd=scene, data=HOSTILE[what] + end)
    assert done.returncode == 1, (what, done.stderr)
    assert done.stderr.startswith(b"error: cannot ") and done.stderr.count(b"\n") == 1
    require_canaries(scene)
    assert not [
        path
        for path in (scene / "in").rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "x"
    ]
    assert not Path("/tmp/pjw-dead").exists()


def test_what_is_not_below_the_name_that_was_said(scene: Path) -> None:
    """An archive of `src` has nothing else in it."""
    assert refused(scene, entry("other", data=b"x") + END, "src").endswith(
        "cannot unpack other: it is not below the name that was said"
    )
    require_canaries(scene)


def test_a_link_is_replaced_and_not_followed(scene: Path) -> None:
    """A file that has the name of a link to somewhere else."""
    (scene / "in/l").symlink_to("../canary")
    unpacked(scene, entry("l", data=b"new") + END)
    assert not (scene / "in/l").is_symlink()
    require_canaries(scene)


def test_several_unpack_at_once(scene: Path) -> None:
    """Into one directory, as jobs in one workspace do: each replaces what another has made."""
    data = entry("file", data=b"whole" * 100) + entry("link", tarfile.SYMTYPE, linkname="file")
    data += entry("hard", tarfile.LNKTYPE, linkname="file")
    with ExitStack() as stack:
        archive = os.memfd_create("archive")
        stack.callback(os.close, archive)
        with open(archive, "wb", closefd=False) as file:
            file.write(data * 300 + END)
        command = [PROGRAM, "unpack", "", "in"]
        processes = []
        for _ in range(8):
            # opened again, for an offset of its own
            stdin = stack.enter_context(open(f"/proc/self/fd/{archive}", "rb"))
            processes.append(subprocess.Popen(command, cwd=scene, stdin=stdin, stderr=subprocess.PIPE))
        done = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert ([process.returncode for process in processes], done) == ([0] * 8, [b""] * 8)
    assert sorted(path.name for path in (scene / "in").iterdir()) == ["file", "hard", "link"]
    assert (scene / "in/hard").read_bytes() == (scene / "in/link").read_bytes() == b"whole" * 100
    require_canaries(scene)


def test_many_entries(scene: Path) -> None:
    """In bounded memory, and not for long."""
    one = entry("f", data=b"")
    command = [PROGRAM, "unpack", "", "in"]
    process = subprocess.Popen(command, cwd=scene, stdin=subprocess.PIPE)

    def peak_kib() -> int:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(one * 1000)
        first = peak_kib()
        for _ in range(40):
            pipe.write(one * 1000)
        last = peak_kib()
        pipe.write(END)
    assert process.wait(SECONDS) == 0
    # a name that is kept of each would be three times that; sanitizers have memory of their own
    assert last - first < 400 or PROGRAM != ARCHIVE_PROGRAM
    assert last < 4096 or PROGRAM != ARCHIVE_PROGRAM
    require_canaries(scene)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_nothing_half_made_stays_behind(scene: Path, number: signal.Signals) -> None:
    """Whoever sends the archive has gone: the file that is not whole goes, too."""
    command = [PROGRAM, "unpack", "", "in"]
    process = subprocess.Popen(command, cwd=scene, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    with process.stderr:
        process.stdin.write(entry("file", data=DATA)[:100_000])
        process.stdin.flush()
        deadline = time.monotonic() + SECONDS
        while not list((scene / "in").iterdir()):
            assert time.monotonic() < deadline
        process.send_signal(number)
        assert process.wait(SECONDS) == 128 + number
        process.stdin.close()
    assert not list((scene / "in").iterdir())
