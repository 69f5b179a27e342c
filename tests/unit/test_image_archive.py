"""Images of other tools as one plain archive: layers, whiteouts, links, and hostile ones."""

import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pjw import image_archive
from pjw.errors import ConfigError, InvalidJobError
from pjw.image_archive import ImageArchive
from pjw.model import ImageConfig
from tests.support.images import directory, docker_archive, entry, layer, oci_layout

SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
# what every image has in the end
POINTS = {"dev", "proc", "run", "sys", "tmp", "etc", "etc/group", "etc/hosts", "etc/passwd", "var", "var/tmp"}


def packed(source: str) -> tuple[ImageArchive, dict[str, tarfile.TarInfo], dict[str, bytes]]:
    """An image, the entries of its archive by their names, and the contents of files."""
    with ImageArchive.open(source) as archive:
        data = b"".join(archive.pieces())
    entries: dict[str, tarfile.TarInfo] = {}
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            assert info.name not in entries
            parent = os.path.dirname(info.name)
            # as a program needs it that makes one after the other
            assert not parent or entries[parent].isdir(), info.name
            entries[info.name] = info
            if info.isreg() and (file := tar.extractfile(info)) is not None:
                contents[info.name] = file.read()
    return archive, entries, contents


def damaged(data: bytes, where: int) -> bytes:
    """The same with other bytes there."""
    return data[:where] + b"\xff" * 50 + data[where + 50 :]


def of_layers(tmp_path: Path, *layers: bytes) -> tuple[dict[str, tarfile.TarInfo], dict[str, bytes]]:
    """The entries, and contents of files, of an image of these layers, without what every one has."""
    _, entries, contents = packed(f"oci:{oci_layout(tmp_path / 'layout', layers)}")
    return {name: info for name, info in entries.items() if name not in POINTS}, contents


def test_later_layers_replace_and_remove(tmp_path: Path) -> None:
    """Files, directories, a whiteout of each, an opaque directory, and a kind that changes."""
    below = layer(
        directory("a"), entry("a/1", b"one"), entry("a/2", b"two"), directory("b"), entry("b/old", b"old"),
        directory("c"), entry("c/x", b"x"), entry("d", b"file"), directory("e"), entry("e/f", b"f"),
    )  # fmt: skip
    above = layer(
        entry("a/1", b"uno"), entry("a/.wh.2"), directory("b"), entry("b/new", b"new"),
        entry("b/.wh..wh..opq"), entry(".wh.c"), directory("d"), entry("d/in", b"in"), entry("e", b"now"),
        entry("a/.wh..wh.plnk"),
    )  # fmt: skip
    entries, contents = of_layers(tmp_path, below, above)
    assert set(entries) == {"a", "a/1", "b", "b/new", "d", "d/in", "e"}
    assert {name: contents[name] for name in entries if entries[name].isreg()} == {
        "a/1": b"uno",
        "b/new": b"new",
        "d/in": b"in",
        "e": b"now",
    }


def test_a_directory_is_made_opaque_once(tmp_path: Path) -> None:
    """A layer that says so of each of its directories, and again and again, takes no time for it."""
    count = 20_000
    tree = image_archive.Tree(layered=True, notes=[])
    for place, name in enumerate(("d/old", "d/sub/old", "other")):
        tree.add(entry(name), (0, place))
    above = [f"d/{number}" for number in range(count)] + ["d/sub/new"]
    above += [*["d/.wh..wh..opq"] * count, "d/last", "d/.wh..wh..opq"]
    before = time.process_time()
    for place, name in enumerate(above):
        tree.add(entry(name), (1, place))
    # to look at the whole directory each time takes a hundred times as long
    assert time.process_time() - before < 5
    names = {name for name, _ in tree.walk()}
    assert len(names) == count + 5
    assert {"d/sub/new", "d/last", "other"} < names
    assert {"d/old", "d/sub/old"}.isdisjoint(names)


@pytest.mark.parametrize("kind", ["link", "fifo", "behind"])
def test_a_layout_has_files_alone(tmp_path: Path, kind: str) -> None:
    """A link in it leads nowhere, and nobody waits for who writes to a FIFO; the layout itself may be one."""
    layout = oci_layout(tmp_path / "layout", [layer(entry("x", b"x"))])
    (tmp_path / "to").symlink_to(layout)
    ImageArchive.open(f"oci:{tmp_path}/to").__exit__()
    blobs = layout / "blobs" / "sha256"
    if kind == "behind":
        blobs.rename(tmp_path / "sha256")
        blobs.symlink_to(tmp_path / "sha256")
    for blob in list(blobs.iterdir()):
        if kind != "behind":
            blob.rename(tmp_path / blob.name)
        if kind == "link":
            blob.symlink_to(tmp_path / blob.name)
        elif kind == "fifo":
            os.mkfifo(blob)
    with pytest.raises(ConfigError, match=r"blobs/sha256/\S+ is no file") as refused:
        ImageArchive.open(f"oci:{layout}")
    assert ("link" in str(refused.value)) == (kind != "fifo")


def test_links_are_followed_within_the_tree_alone(tmp_path: Path) -> None:
    """A layer that writes by way of a link of a layer below does so in the image, wherever that leads."""
    below = layer(
        directory("usr"), directory("usr/lib"), entry("lib", "usr/lib", SYM), entry("up", "../../../x", SYM),
        entry("host", "/etc", SYM),
    )  # fmt: skip
    above = layer(
        entry("lib/a", b"a"), entry("up/b", b"b"), entry("host/c", b"c"), entry("hard", "lib/a", HARD)
    )
    entries, contents = of_layers(tmp_path, below, above)
    assert {"usr/lib/a", "x/b", "etc/c", "hard"} <= set(entries)
    assert (entries["lib"].issym(), entries["hard"].linkname) == (True, "usr/lib/a") or (
        entries["usr/lib/a"].linkname == "hard"
    )
    assert contents["x/b"] == b"b"


def test_what_jobs_need_is_there_whatever_the_image_has(tmp_path: Path) -> None:
    """Directories in the place of links, so that nothing of pjw's is mounted elsewhere."""
    odd = layer(
        entry("proc", "/etc", SYM), entry("dev", b"file"), directory("tmp"), entry("tmp/left", b"left"),
        entry("var", "/", SYM), entry("etc", "/elsewhere", SYM),
    )  # fmt: skip
    _, entries, _ = packed(f"oci:{oci_layout(tmp_path / 'layout', [odd], {'WorkingDir': '/app/src'})}")
    assert all(entries[name].isdir() for name in ("proc", "dev", "tmp", "run", "sys", "app/src"))
    assert "tmp/left" not in entries
    assert {"elsewhere/hosts", "elsewhere/passwd"} <= set(entries)


def test_nothing_special_is_kept(tmp_path: Path) -> None:
    """Devices and FIFOs are left out and named; owners and set-id bits are not kept."""
    info = entry("setuid", b"x", mode=0o6755)
    info.uid = info.gid = 7
    image = layer(info, entry("null", kind=tarfile.CHRTYPE), entry("fifo", kind=tarfile.FIFOTYPE))
    path = tmp_path / "image.tar"
    path.write_bytes(image)
    archive, entries, _ = packed(str(path))
    assert (entries["setuid"].mode, entries["setuid"].uid) == (0o755, 0)
    assert {"null", "fifo"} & set(entries) == set()
    assert [line.split(":")[0] for line in archive.left_out] == ["null", "fifo"]


@pytest.mark.parametrize(
    ("hostile", "words"),
    [
        (entry("../../etc/passwd", b"x"), "leads out"),
        (entry("a/../../b", b"x"), "leads out"),
        (entry("a", "missing", HARD), "does not have"),
        (entry("a", "../../etc/shadow", HARD), "leads out"),
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, hostile: tarfile.TarInfo, words: str) -> None:
    """In words, with the image's name, and no traceback."""
    path = tmp_path / "image.tar"
    path.write_bytes(layer(hostile))
    with pytest.raises(ConfigError, match=words):
        ImageArchive.open(f"tar:{path}")


def numbered(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An archive with a header that says this size, behind an entry, and nothing behind it."""
    first, info = layer(entry("first"))[:512], tarfile.TarInfo("second")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return first + bytes(header) + bytes(1024)


def extended(**headers: str) -> bytes:
    """An archive with an entry, and an extended header before it."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {key.replace("__", "."): value for key, value in headers.items()}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@pytest.mark.parametrize("form", ["", "tar:", "docker-archive:"])
@pytest.mark.parametrize(
    "data",
    [
        *(numbered(size) for size in (-1, -5, -512, -1024, 2**40, 2**62, 2**70)),
        *(numbered(2**40, kind) for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)),
        extended(size="-512"),
        extended(GNU__sparse__map="x,y", GNU__sparse__size="5"),
        extended(path="a/" * 10_000),
        b"",
        *(damaged(lzma.compress(os.urandom(100_000)), 50_000),),
        *(damaged(gzip.compress(layer(entry("a", b"ab" * 100_000))), where) for where in (20, 100)),
    ],
    ids=range(16),
)
def test_archives_that_are_meant_to_harm(tmp_path: Path, data: bytes, form: str) -> None:
    """Numbers that are none, what would take all memory or years to read, and damage: refused in words."""
    (tmp_path / "hostile.tar").write_bytes(data)
    with pytest.raises(ConfigError), ImageArchive.open(f"{form}{tmp_path}/hostile.tar") as archive:
        list(archive.pieces())


def test_a_directory_that_changes_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the directory puts a link in its place while it is read: nothing behind that is taken."""
    (tmp_path / "image" / "in").mkdir(parents=True)
    (tmp_path / "image" / "in" / "file").write_text("theirs")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    real = os.lstat
    armed: list[bool] = []

    def lstat(path: str, *, dir_fd: int | None = None) -> os.stat_result:
        if os.path.basename(path) == "file" and armed and not (tmp_path / "away").exists():
            (tmp_path / "image" / "in").rename(tmp_path / "away")
            (tmp_path / "image" / "in").symlink_to(tmp_path / "secret")
        return real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "lstat", lstat)
    with suppress(ConfigError), ImageArchive.open(f"dir:{tmp_path}/image") as archive:
        # when its contents are read
        armed.append(True)
        assert b"secret" not in b"".join(archive.pieces())


def test_directories_that_are_too_deep(tmp_path: Path) -> None:
    """Refused in words."""
    here = os.open(tmp_path, os.O_PATH)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        with pytest.raises(ConfigError), ImageArchive.open(f"dir:{tmp_path}") as archive:
            list(archive.pieces())
    finally:
        # pytest cannot
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_config_is_short() -> None:
    """Every list of images has it."""
    with pytest.raises(InvalidJobError, match="more than 65536 characters"):
        ImageConfig({"A": "x" * 70_000})


@pytest.mark.parametrize("source", ["a\0b", "tar:a\0b", "oci:a\0b", "dir:a\0b"])
def test_a_path_with_nul(source: str) -> None:
    """Refused in words."""
    with pytest.raises(ConfigError, match="null byte"):
        ImageArchive.open(source)


@pytest.mark.parametrize("time", ["nan", "inf", "-inf", "1e400"])
def test_times_that_are_none(tmp_path: Path, time: str) -> None:
    """The file is there, with another time."""
    assert "x" in of_layers(tmp_path, extended(mtime=time))[0]


@pytest.mark.parametrize("manifest", [5, None, "manifests", ["manifests"]])
def test_a_manifest_that_is_none(tmp_path: Path, manifest: object) -> None:
    """Another kind of JSON than an object."""
    layout = oci_layout(tmp_path / "layout", [])
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    (layout / "index.json").write_text(json.dumps({"manifests": [{"digest": f"sha256:{digest}"}]}))
    with pytest.raises(ConfigError, match="is not what an image has there"):
        ImageArchive.open(f"oci:{layout}")


def test_what_an_image_has_is_printed_plainly(tmp_path: Path) -> None:
    """No word of it has a terminal do something."""
    one = {"annotations": {"org.opencontainers.image.ref.name": "\x1b[31m"}}
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [one, one]}))
    with pytest.raises(ConfigError, match=r"images: \\x1b\[31m, "):
        ImageArchive.open(f"oci:{tmp_path}")


def test_directories_that_no_entry_names_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry with a deep path is as many as it makes."""
    monkeypatch.setattr(image_archive, "ENTRIES_MAX", 100)
    with pytest.raises(ConfigError, match="more than 100 entries"):
        of_layers(tmp_path, layer(entry("a/" * 100)))


def test_absolute_names_and_loops(tmp_path: Path) -> None:
    """A name that begins with / is one of the image; links that lead nowhere are refused."""
    entries, _ = of_layers(tmp_path, layer(entry("/opt/x", b"x")))
    assert set(entries) == {"opt", "opt/x"}
    loop = layer(entry("a", "b", SYM), entry("b", "a", SYM), entry("a/x", b"x"))
    (tmp_path / "image.tar").write_bytes(loop)
    with pytest.raises(ConfigError, match="lead nowhere"):
        ImageArchive.open(str(tmp_path / "image.tar"))


def test_the_config_is_taken(tmp_path: Path) -> None:
    """Of docker's archive as of a layout; USER counts for nothing."""
    config = {
        "Env": ["PATH=/app/bin", "odd name=1"], "WorkingDir": "/app", "Entrypoint": ["run"], "Cmd": ["x"],
        "User": "0",
    }  # fmt: skip
    wanted = ImageConfig({"PATH": "/app/bin"}, "/app", ("run",), ("x",))
    path = docker_archive(tmp_path / "saved.tar", [layer(entry("x", b"x"))], config)
    for source in (str(path), f"docker-archive:{path}", f"docker-archive:{path}:latest"):
        assert packed(source)[0].config == wanted
    layout = oci_layout(tmp_path / "layout", [layer(entry("x", b"x"))], config, tag="1.0")
    first, again = packed(f"oci:{layout}:1.0")[0], packed(f"oci:{layout}")[0]
    assert (first.config, first.digest) == (wanted, again.digest)
    with pytest.raises(ConfigError, match=r"no image 2\.0"):
        ImageArchive.open(f"oci:{layout}:2.0")


def test_a_directory_is_an_image(tmp_path: Path) -> None:
    """Links are kept as they are, hard links too, and nothing outside is read."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "a").write_bytes(b"a")
    os.link(root / "bin" / "a", root / "bin" / "b")
    (root / "secret").symlink_to("/etc/shadow")
    _, entries, contents = packed(f"dir:{root}")
    assert entries["secret"].linkname == "/etc/shadow"
    assert (contents["bin/a"], entries["bin/b"].linkname) == (b"a", "bin/a")


def test_layers_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    """Changed blobs, digests that are paths, and what is no image at all."""
    layout = oci_layout(tmp_path / "layout", [layer(entry("x", b"x"))])
    index = json.loads((layout / "index.json").read_text())
    for blob in (layout / "blobs" / "sha256").iterdir():
        data = blob.read_bytes()
        if data[:1] != b"{":
            blob.write_bytes(data.replace(b"ustar", b"ustar", 1) + b"\0")
    with pytest.raises(ConfigError, match="not what the image says"):
        ImageArchive.open(f"oci:{layout}")
    index["manifests"][0]["digest"] = "sha256:../../../etc/passwd"
    (layout / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="digest that pjw does not know"):
        ImageArchive.open(f"oci:{layout}")
    (tmp_path / "text").write_text("no image")
    for source in (
        str(tmp_path / "text"),
        f"tar:{tmp_path}/text",
        str(tmp_path / "none"),
        f"oci:{tmp_path}",
        "dir:",
    ):
        with pytest.raises(ConfigError, match="image"):
            ImageArchive.open(source)
