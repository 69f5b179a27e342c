"""Small disks of a test's own, and how to fill them."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

MIB: Final = 1024**2


@contextmanager
def _image(megabytes: int, *how: str) -> Iterator[tuple[Path, Path]]:
    """A file with an ext4 of that size, made as mkfs.ext4 is told, and a directory to mount it on."""
    base = Path(subprocess.check_output(["mktemp", "-d", "/var/lib/pjw-test-disk-XXXXXX"], text=True).strip())
    image, point = base / "image", base / "disk"
    point.mkdir()
    try:
        _run("truncate", "-s", f"{megabytes}M", image)
        _run("mkfs.ext4", "-q", "-F", *how, image)
        yield image, point
    finally:
        _run("rm", "-rf", "--one-file-system", base)


@contextmanager
def _mounted(device: Path, point: Path, *options: str) -> Iterator[Path]:
    _run("mount", "-o", ",".join(options), device, point)
    try:
        yield point
    finally:
        _run("umount", point)


@contextmanager
def small_disk(megabytes: int, *options: str, reserved_percent: int = 0) -> Iterator[Path]:
    """An ext4 of that size, in a file, mounted on a directory of its own; what is reserved is root's."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop device, as in user mode Linux; the host of CI runs this")
    # no reserved blocks by default: the workers of most tests are root, which could use them
    how = ("-m", str(reserved_percent), "-b", "1024")
    with _image(megabytes, *how) as (image, point), _mounted(image, point, "loop", *options):
        yield point


@contextmanager
def disk_with_queue(megabytes: int, settings: Mapping[str, str]) -> Iterator[Path]:
    """An ext4 of that size on a loop device whose queue has these settings. The page cache has no image.

    They are files of /sys/block/DISK/queue (Documentation/ABI/stable/sysfs-block), written in order.
    """
    with ExitStack() as stack:
        image, point = stack.enter_context(_image(megabytes))
        # jobs look for their files there
        image.parent.chmod(0o755)
        attach = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
        device = Path(subprocess.check_output(attach, text=True).strip())
        stack.callback(_run, "losetup", "--detach", device)
        for name, value in settings.items():
            file = Path(f"/sys/class/block/{device.name}/queue/{name}")
            before = file.read_text().strip()
            # one of several is in brackets: `[none] mq-deadline bfq`
            before = before.partition("[")[2].partition("]")[0] or before
            file.write_text(value)
            # the device keeps what it has when it is detached
            stack.callback(file.write_text, before)
        yield stack.enter_context(_mounted(device, point, "nodiscard"))


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


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
