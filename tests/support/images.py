"""Roots for jobs, made of programs of this machine, and images of them as other tools write them."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from pjw.launcher.image_store import ImageStore
from pjw.launcher.scratch import known_places

PROGRAMS: Final = (
    *(
        "cat",
        "chmod",
        "cp",
        "env",
        "id",
        "ln",
        "ls",
        "mkdir",
        "mv",
        "pwd",
        "readlink",
        "rm",
        "sh",
        "sleep",
        "stat",
        "tee",
    ),
    *("touch", "true", "test"),
)
# of Python's library what a script of a test needs no part of
_LEFT_OUT: Final = shutil.ignore_patterns(
    "test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "site-packages",
    "dist-packages", "config-*", "pydoc_data", "unittest", "asyncio", "multiprocessing",
)  # fmt: skip


def small_root(directory: Path, programs: Iterable[str] = PROGRAMS) -> Path:
    """A root with a shell and a few programs, and what they are linked with."""
    for name in ("bin", "etc", "root"):
        (directory / name).mkdir(parents=True)
    (directory / "etc" / "os-release").write_text("ID=small\n")
    (directory / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    for name in programs:
        _add_program(directory, name, directory / "bin" / name)
    return directory


def python_root(directory: Path) -> Path:
    """A root with the system's Python at the place that it has on this machine."""
    small_root(directory)
    interpreter = Path("/usr/bin/python3")
    target = directory / "usr" / "bin" / "python3"
    target.parent.mkdir(parents=True)
    _add_program(directory, str(interpreter), target)
    ask = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    library = subprocess.check_output([interpreter, "-I", "-S", "-c", ask], text=True).strip()
    shutil.copytree(library, directory / library.lstrip("/"), ignore=_LEFT_OUT, symlinks=True)
    for each in (directory / library.lstrip("/") / "lib-dynload").glob("_ctypes*.so"):
        add_libraries(directory, str(each))
    return directory


def _add_program(directory: Path, name: str, target: Path) -> None:
    found = shutil.which(name)
    assert found is not None, name
    shutil.copy(Path(found).resolve(), target)
    add_libraries(directory, found)


def add_libraries(directory: Path, program: str) -> None:
    """Give a root what a program of this machine is linked with."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    for path in re.findall(r"(/\S+) \(0x", said):
        target = directory / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(Path(path).resolve(), target)


def have_image(state: Path, name: str, root: Path, config: Mapping[str, object] | None = None) -> str:
    """Give a state directory an image of the operator's by hard links, as `pjwd image import` would."""
    store = ImageStore(str(state), known_places(str(state)))
    digest = f"sha256-{hashlib.sha256(name.encode()).hexdigest()}"
    empty = {"env": {}, "workdir": "", "entrypoint": [], "command": []}
    facts = {"config": {**empty, **(config or {})}, "bytes": 1, "inodes": 1, "made_ns": time.time_ns()}
    with store.partial() as partial:
        subprocess.run(["cp", "-al", f"{root}/.", partial], check=True)
        for point in ("dev", "proc", "run", "sys", "tmp"):
            (Path(partial) / point).mkdir(exist_ok=True)
        for file in ("group", "hosts"):
            (Path(partial) / "etc" / file).touch()
        store.keep(partial, name, digest, facts)
    return digest


# --- what other tools write

# the contents of files, by their headers
_DATA: Final[dict[int, bytes]] = {}


def entry(
    name: str, data: bytes | str | None = None, kind: bytes = tarfile.REGTYPE, mode: int = 0o644
) -> tarfile.TarInfo:
    """A header; `layer` has its contents from `data`, which is the target of a link."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, mode
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        assert isinstance(data, str)
        info.linkname = data
    elif isinstance(data, bytes):
        info.size = len(data)
        _DATA[id(info)] = data
    return info


def directory(name: str, mode: int = 0o755) -> tarfile.TarInfo:
    """The header of a directory."""
    return entry(name, kind=tarfile.DIRTYPE, mode=mode)


def layer(*entries: tarfile.TarInfo) -> bytes:
    """A tar archive of these."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for info in entries:
            tar.addfile(info, io.BytesIO(_DATA.pop(id(info), b"")))
    return made.getvalue()


def layer_of(root: Path) -> bytes:
    """A tar archive of a directory."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.add(root, arcname=".")
    return made.getvalue()


def oci_layout(
    where: Path, layers: Iterable[bytes], config: Mapping[str, object] | None = None, tag: str = ""
) -> Path:
    """An OCI image layout."""
    blobs = where / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def keep(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    manifest = {
        "config": keep(json.dumps({"config": dict(config or {})}).encode()),
        "layers": [keep(data) for data in layers],
    }
    named = {"annotations": {"org.opencontainers.image.ref.name": tag}} if tag else {}
    index = {"manifests": [{**keep(json.dumps(manifest).encode()), **named}]}
    (where / "index.json").write_text(json.dumps(index))
    (where / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return where


def docker_archive(path: Path, layers: Iterable[bytes], config: Mapping[str, object] | None = None) -> Path:
    """What `docker save` writes."""
    data = {f"{number}/layer.tar": each for number, each in enumerate(layers)}
    names = list(data)
    data["config.json"] = json.dumps({"config": dict(config or {})}).encode()
    data["manifest.json"] = json.dumps(
        [{"Config": "config.json", "RepoTags": ["thing:latest"], "Layers": names}]
    ).encode()
    path.write_bytes(layer(*(entry(name, each) for name, each in data.items())))
    return path
