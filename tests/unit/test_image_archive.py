"""Images of other tools as one plain archive: layers, whiteouts, links, and hostile ones."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.image_archive import ImageArchive
from pjw.model import ImageConfig
from tests.images import directory, docker_archive, entry, layer, oci_layout

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
