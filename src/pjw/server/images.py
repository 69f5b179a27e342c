"""pjwd image: the operator's images, whether pjwd runs or not. Needs root.

The image is unpacked by the program that unpacks uploads in jobs, from an archive that we have made of plain
names (image_archive.py), into a directory that only root may enter.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from pjw.errors import ConfigError, KernelError
from pjw.image_archive import FORMS, ImageArchive
from pjw.launcher.archive_program import ARCHIVE_PROGRAM
from pjw.launcher.image_store import ImageStore
from pjw.launcher.scratch import RM_PROGRAM, known_places
from pjw.model import check_image

# the rest of a digest says nothing to a person
_DIGEST_CHARACTERS: Final = 19


def store_of(state_dir: str) -> ImageStore:
    """Open the operator's images of a state directory. Raises ConfigError, KernelError."""
    if os.geteuid() != 0:
        raise ConfigError("only root may change images", hint="sudo pjwd image …")
    path = os.path.realpath(state_dir)
    if not os.path.isdir(path):
        raise ConfigError(f"there is no state directory {path}", hint="give it with --state-dir or --config")
    return ImageStore(path, known_places(path))


def import_image(state_dir: str, name: str, source: str) -> str:
    """Take an image by a name for all clients; its digest. Raises ConfigError, KernelError."""
    check_image(name)
    if source.partition(":")[0] not in ("oci", "docker-archive", "oci-archive", "dir", "tar"):
        raise ConfigError(f"{source} does not say what it is", hint=f"give {FORMS}")
    # by it a partial image goes when we are ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    store = store_of(state_dir)
    _sweep(store)
    with ImageArchive.open(source) as archive:
        for line in archive.left_out:
            print(f"pjwd: left out {line}", file=sys.stderr)
        try:
            _require_room(store, archive, name)
            with store.partial() as partial:
                try:
                    _unpack(archive, partial)
                    # whole on the disk before anything names it
                    os.sync()
                    facts = {
                        "config": asdict(archive.config),
                        "bytes": archive.bytes,
                        "inodes": archive.inodes,
                        "made_ns": time.time_ns(),
                    }
                    store.keep(partial, name, archive.digest, facts)
                finally:
                    if os.path.isdir(partial):
                        _remove(partial)
            _sweep(store)
        except OSError as error:
            raise KernelError("import the image", name, error.errno or 0) from error
    return archive.digest


def _require_room(store: ImageStore, archive: ImageArchive, name: str) -> None:
    """Check for room: a small archive may unpack to a full disk, which stops all jobs. Raises ConfigError."""
    status = os.statvfs(store.path)
    free = status.f_bavail * status.f_frsize
    if archive.file_bytes > free:
        raise ConfigError(
            f"cannot import the image {name}: its files have {archive.file_bytes} bytes, and {free} are free"
            f" in {store.path}"
        )


def _unpack(archive: ImageArchive, directory: str) -> None:
    unpacker = subprocess.Popen(
        [ARCHIVE_PROGRAM, "unpack", "", "."],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=directory,
        umask=0o022,
        # Ctrl-C is ours
        process_group=0,
    )
    assert unpacker.stdin is not None
    assert unpacker.stderr is not None
    try:
        # an unpacker that has ended says why
        with suppress(BrokenPipeError):
            for piece in archive.pieces():
                unpacker.stdin.write(piece)
            unpacker.stdin.close()
        said = unpacker.stderr.read().decode(errors="backslashreplace").strip()
        if unpacker.wait():
            raise ConfigError(f"cannot unpack the image: {said.removeprefix('error: ')}")
    finally:
        unpacker.kill()
        unpacker.wait()
        unpacker.stderr.close()
        with suppress(BrokenPipeError):
            unpacker.stdin.close()


def remove_images(state_dir: str, names: list[str]) -> None:
    """Remove names, and the images that have no name left. Raises ConfigError, KernelError."""
    store = store_of(state_dir)
    for name in names:
        store.forget(name)
        print(name)
    _sweep(store)


def _sweep(store: ImageStore) -> None:
    gone: list[str] = []
    try:
        store.sweep(gone.append)
    except OSError as error:
        raise KernelError("look after images in", store.path, error.errno or 0) from error
    for path in gone:
        _remove(path)


def _remove(path: str) -> None:
    done = subprocess.run(
        [RM_PROGRAM, "-rf", "--one-file-system", "--", path], check=False, capture_output=True
    )
    if done.returncode:
        print(f"pjwd: cannot remove {path}: {done.stderr.decode(errors='replace').strip()}", file=sys.stderr)


def listed(state_dir: str, form: str) -> Iterator[str]:
    """Yield lines that show the images. Raises ConfigError, KernelError."""
    table = store_of(state_dir).table()
    found = [(name, digest, table["images"][digest]) for name, digest in sorted(table["names"].items())]
    if form == "json":
        shown = [{"name": name, "digest": digest, **_shown(facts)} for name, digest, facts in found]
        yield json.dumps(shown, indent=2, ensure_ascii=False)
        return
    width = max(map(len, ("NAME", *table["names"])))
    yield f"{'NAME':<{width}}  {'DIGEST':<{_DIGEST_CHARACTERS}}  {'MIB':>8}  {'FILES':>8}  IMPORTED"
    for name, digest, facts in found:
        made = datetime.fromtimestamp(facts["made_ns"] / 1e9, UTC)
        yield (
            f"{name:<{width}}  {digest[:_DIGEST_CHARACTERS]}  {facts['bytes'] / 1024**2:>8.1f}"
            f"  {facts['inodes']:>8}  {made:%Y-%m-%d %H:%M}"
        )


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    made = datetime.fromtimestamp(facts["made_ns"] / 1e9, UTC)
    shown = {name: facts[name] for name in ("bytes", "inodes", "config")}
    return {**shown, "made": made.isoformat().replace("+00:00", "Z")}
