"""Real loop devices, partitions and volumes, followed to the disks under them."""

import ctypes
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.launcher import cgroup as cgroups
from pjw.launcher.cgroup import devices, interface_files
from pjw.model import Limits

MIB = 1024**2
# linux/blkpg.h
BLKPG = 0x1269
BLKPG_ADD_PARTITION = 1
BLKPG_DEL_PARTITION = 2


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A loop device of 64 MiB, as /dev/loopN."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    command = ["losetup", "--find", "--show", "--partscan", str(image)]
    try:
        loop = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device: {error}")
    yield loop
    subprocess.run(["losetup", "--detach", loop], check=True)


def number_of(path: str) -> str:
    """The MAJ:MIN of a block device, from its directory in /sys."""
    return Path("/sys/block", path, "dev").read_text(encoding="ascii").strip()


def set_partition(device: str, operation: int) -> None:
    """Tell the kernel of partition 1, or that it is no more (linux/blkpg.h).

    Not by a table on the disk: not every kernel reads the same tables. Debian 13 has no addpart(8).
    """
    # struct blkpg_partition: start and length in bytes, number, two names, padding
    partition = ctypes.create_string_buffer(struct.pack("@qqi64s64s4x", MIB, 32 * MIB, 1, b"", b""))
    # struct blkpg_ioctl_arg
    request = struct.pack("@iiiP", operation, 0, len(partition), ctypes.addressof(partition))
    with open(device, "rb") as disk:
        fcntl.ioctl(disk, BLKPG, request)


def test_a_partition_gives_the_loop_device_that_has_it(loop_device: str) -> None:
    """A real partition leads to a device that takes io limits."""
    set_partition(loop_device, BLKPG_ADD_PARTITION)
    try:
        name = Path(loop_device).name
        whole = number_of(name)
        assert devices.whole_disks(whole) == {whole}
        assert devices.whole_disks(number_of(f"{name}/{name}p1")) == {whole}
        instance = f"test-{os.getpid()}-loop"
        hierarchy = cgroups.open_hierarchy(instance, io_devices=[whole])
        assert hierarchy.create(1, Limits(), 7).try_remove()
        for mount in interface_files.read_mounts():
            parent = Path(mount.point, "pjw", instance)
            if mount.fs_type.startswith("cgroup") and parent.is_dir():
                parent.rmdir()
    finally:
        set_partition(loop_device, BLKPG_DEL_PARTITION)


def test_device_mapper_is_followed_to_the_disk(loop_device: str) -> None:
    """A real volume over a real volume leads to the one device that does the work."""
    names = [f"pjw-test-{os.getpid()}-{level}" for level in (1, 2)]
    lower, made = loop_device, []
    try:
        for name in names:
            command = ["dmsetup", "create", "--noudevsync", name, "--table", f"0 65536 linear {lower} 0"]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no device mapper: {error}")
            made.append(name)
            info = ["dmsetup", "info", "--columns", "--noheadings", "-o", "major,minor", name]
            lower = subprocess.run(info, check=True, capture_output=True, text=True).stdout.strip()
        assert devices.whole_disks(lower) == {number_of(Path(loop_device).name)}
        assert devices.is_stacked(lower)
    finally:
        for name in reversed(made):
            subprocess.run(["dmsetup", "remove", "--noudevsync", "--retry", name], check=True)
