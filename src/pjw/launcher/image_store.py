"""The operator's images: directories by their digests, and a table of names.

STATE/images/sha256-DIGEST/    an image, whole
STATE/images/partial-ID/       an image during its import, locked by the importer; or left by a kill
STATE/images/gone-ID/          an image during its removal
STATE/images/table             JSON: the digest of each name, and the facts of each digest

Only root may enter the directory. `pjwd image` changes it, whether a launcher runs or not. An image stays as
long as a name or a job has it. A link in its scratch directory marks a job with an image. The launcher makes
the link before it looks into the table. A process that removes an image takes its names out of the table
before it looks for such links. So one of the two sees the other.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from pjw.errors import ConfigError, KernelError
from pjw.launcher.root_files import make_root_s, replace_file

NAME: Final = "images"
# the name of the link in a scratch directory
MARK: Final = "image"
_TABLE: Final = "table"
_PARTIAL: Final = "partial-"
_GONE: Final = "gone-"


class ImageStore:
    """The directory of images of one pjwd."""

    def __init__(self, state_dir: str, scratch_places: tuple[str, ...]) -> None:
        """Make the directory if need be. Raises KernelError."""
        self.path: Final = os.path.join(state_dir, NAME)
        self._places: Final = scratch_places
        self._read: tuple[tuple[int, int, int], dict[str, Any]] | None = None
        make_root_s(self.path, "directory of images")
        self._table_path: Final = os.path.join(self.path, _TABLE)
        try:
            # if another process holds the lock, it has a table or makes one
            with self._locked(wait=False) as is_ours:
                if is_ours and not os.path.exists(self._table_path):
                    self._write({"names": {}, "images": {}})
        except OSError as error:
            raise KernelError("make the table of images in", self.path, error.errno or 0) from error

    def directory(self, digest: str) -> str:
        """Return the path of an image, whether it exists or not."""
        return os.path.join(self.path, digest)

    def open_table(self) -> int:
        """Open the table, and return its descriptor. Raises KernelError."""
        try:
            return os.open(self._table_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError("open the table of images", self._table_path, error.errno or 0) from error

    def _write(self, table: Mapping[str, object]) -> None:
        replace_file(self._table_path, json.dumps(table, sort_keys=True).encode())

    def table(self) -> dict[str, Any]:
        """Return the content of the table. Raises KernelError."""
        descriptor = self.open_table()
        try:
            status = os.fstat(descriptor)
            key = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._read is None or self._read[0] != key:
                # root wrote it; writers replace it and never change it in place
                self._read = (key, json.loads(os.pread(descriptor, status.st_size, 0)))
            return self._read[1]
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or 0
            raise KernelError("read the table of images in", self.path, number) from error
        finally:
            os.close(descriptor)

    def is_named(self, digest: str) -> bool:
        """Whether an image has a name, and so may be used by another job."""
        return digest in self.table()["names"].values()

    @contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[bool]:
        """Keep other processes from changing the table. Without *wait*: False when another one changes it."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(directory)

    @contextmanager
    def partial(self) -> Iterator[str]:
        """Yield a directory in which to make an image; nothing of it stays unless `keep` takes it."""
        path = os.path.join(self.path, f"{_PARTIAL}{os.urandom(8).hex()}")
        os.mkdir(path, 0o700)
        # a lock on the directory itself ends with our process, and follows a rename
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            os.close(lock)

    def keep(self, partial: str, name: str, digest: str, facts: Mapping[str, object]) -> bool:
        """Give an image, which is whole and synced, its name; false when the store had the image already."""
        with self._locked():
            table = self.table()
            names, images = dict(table["names"]), dict(table["images"])
            is_new = not os.path.isdir(self.directory(digest))
            if is_new:
                os.rename(partial, self.directory(digest))
            names[name], images[digest] = digest, dict(facts)
            self._write({"names": names, "images": images})
        return is_new

    def forget(self, name: str) -> None:
        """Take a name away. Raises ConfigError when there is no such name."""
        with self._locked():
            table = self.table()
            if name not in table["names"]:
                raise ConfigError(f"no image {name}", hint="pjwd image ls")
            names = {each: digest for each, digest in table["names"].items() if each != name}
            self._write({**table, "names": names})

    def sweep(self, remove: Callable[[str], object], *, wait: bool = True) -> None:
        """Have *remove* remove each directory that no name and no job has any more. Raises OSError.

        Without *wait* this does nothing while another process changes the table, which then sweeps.
        """
        with self._locked(wait=wait) as is_ours:
            if not is_ours:
                return
            table = self.table()
            kept = {*table["names"].values()}
            entries = set(os.listdir(self.path))
            digests = {entry for entry in entries if entry.startswith("sha256-")}
            if digests - kept:
                kept |= self.used()
            for digest in digests - kept:
                os.rename(self.directory(digest), os.path.join(self.path, f"{_GONE}{os.urandom(8).hex()}"))
            images = {digest: facts for digest, facts in table["images"].items() if digest in kept}
            if images.keys() != table["images"].keys():
                self._write({**table, "images": images})
            for entry in os.listdir(self.path):
                path = os.path.join(self.path, entry)
                if entry.startswith(_GONE) or (entry.startswith(_PARTIAL) and _is_left(path)):
                    remove(path)

    def used(self) -> set[str]:
        """Return the images that jobs have."""
        found = set()
        for place in self._places:
            with suppress(FileNotFoundError):
                for each in os.listdir(place):
                    found.add(image_of(os.path.join(place, each)))
        return found


def image_of(path: str) -> str:
    """Return the image of the job with this directory; empty: it has none."""
    try:
        # in another directory the client itself could have made that link
        return "" if os.lstat(path).st_uid else os.readlink(os.path.join(path, MARK))
    except OSError:
        return ""


def _is_left(path: str) -> bool:
    """Whether the import of a partial image has ended without it."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(directory)
    return True
