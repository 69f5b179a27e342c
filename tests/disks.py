"""Small disks of a test's own, and how to fill them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

MIB: Final = 1024**2


@contextmanager
def small_disk(megabytes: int, *options: str, reserved_percent: int = 0) -> Iterator[Path]:
    """An ext4 of that size, in a file, mounted on a directory of its own; what is reserved is root's."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop device, as in user mode Linux; the host of CI runs this")
    base = Path(subprocess.check_output(["mktemp", "-d", "/var/lib/pjw-test-disk-XXXXXX"], text=True).strip())
    image, point = base / "image", base / "disk"
    point.mkdir()
    try:
        subprocess.run(["truncate", "-s", f"{megabytes}M", image], check=True)
        # no reserved blocks by default: the workers of most tests are root, which could use them
        reserved = str(reserved_percent)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", reserved, "-b", "1024", image], check=True)
        subprocess.run(["mount", "-o", ",".join(("loop", *options)), image, point], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", point], check=True)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)


def free_bytes(path: Path) -> int:
    """What anybody may still write there."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def fill(path: Path, leave: int = 0) -> None:
    """Take all space but *leave* bytes."""
    with path.open("wb") as file:
        if (most := free_bytes(path.parent) - leave - 2 * MIB) > 0:
            os.posix_fallocate(file.fileno(), 0, most)
        chunk = bytes(64 * 1024)
        while (size := min(len(chunk), free_bytes(path.parent) - leave)) > 0:
            try:
                os.write(file.fileno(), chunk[:size])
                os.fsync(file.fileno())
            except OSError:
                return
