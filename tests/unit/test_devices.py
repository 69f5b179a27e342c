"""Block devices to whole disks, on trees of sysfs that are built here."""

import os
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.launcher.cgroup import devices, interface_files


class Sysfs:
    """A tree with the few links and files of the real one that are looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)

    def add(self, path: str, device: str, *, partition: bool = False, over: tuple[str, ...] = ()) -> None:
        directory = self.root / "devices" / path
        directory.mkdir(parents=True)
        (directory / "dev").write_text(f"{device}\n")
        (self.root / "dev/block" / device).symlink_to(directory)
        if partition:
            (directory / "partition").write_text("1\n")
            return
        (directory / "slaves").mkdir()
        for lower in over:
            target = (self.root / "dev/block" / lower).resolve()
            (directory / "slaves" / target.name).symlink_to(target)

    def disks(self, device: str) -> set[str]:
        return devices.whole_disks(device, str(self.root))


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """A sysfs with disks of every kind."""
    tree = Sysfs(tmp_path / "sys")
    tree.add("pci0/ata1/block/sda", "8:0")
    tree.add("pci0/ata1/block/sda/sda1", "8:1", partition=True)
    tree.add("pci0/ata2/block/sdb", "8:16")
    tree.add("pci0/ata2/block/sdb/sdb3", "8:19", partition=True)
    return tree


def test_a_whole_disk_is_itself(sysfs: Sysfs) -> None:
    """A device that is neither a partition nor stacked is the answer."""
    assert sysfs.disks("8:16") == {"8:16"}


def test_a_partition_gives_its_disk(sysfs: Sysfs) -> None:
    """The kernel throttles whole disks only."""
    assert sysfs.disks("8:1") == {"8:0"}


def test_stacked_devices_give_every_disk_once(sysfs: Sysfs) -> None:
    """A volume over an encrypted md over two disks ends at these two, by whatever way."""
    sysfs.add("virtual/block/md127", "9:127", over=("8:1", "8:19"))
    sysfs.add("virtual/block/dm-0", "254:0", over=("9:127",))
    sysfs.add("virtual/block/dm-1", "254:1", over=("254:0", "8:1"))
    assert sysfs.disks("254:1") == {"8:0", "8:16"}


def test_a_partition_of_an_md_gives_the_disks_under_it(sysfs: Sysfs) -> None:
    """A partition's disk may itself be stacked."""
    sysfs.add("virtual/block/md0", "9:0", over=("8:0", "8:16"))
    sysfs.add("virtual/block/md0/md0p1", "259:5", partition=True)
    assert sysfs.disks("259:5") == {"8:0", "8:16"}


def test_nvme_is_told_by_sysfs_and_not_by_name(sysfs: Sysfs) -> None:
    """With multipath the disk is the head, below no controller; its hidden paths are not it."""
    sysfs.add("virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
    sysfs.add("virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p2", "259:2", partition=True)
    sysfs.add("pci0/nvme/nvme0/nvme0c0n1", "259:1")
    assert sysfs.disks("259:2") == {"259:0"}


def test_a_loop_device_is_itself(sysfs: Sysfs) -> None:
    """What lies under a loop device is a file, so its limits are set on the loop device."""
    sysfs.add("virtual/block/loop3", "7:3")
    sysfs.add("virtual/block/loop3/loop3p1", "259:9", partition=True)
    assert sysfs.disks("259:9") == {"7:3"}


def test_an_unknown_device_is_an_error_with_a_hint(sysfs: Sysfs) -> None:
    """A limit is never silently missing."""
    with pytest.raises(ConfigError, match="cannot find the disk of device 8:77") as caught:
        sysfs.disks("8:77")
    assert caught.value.hint == devices.HINT


def test_paths_give_disks_in_the_order_of_their_numbers(sysfs: Sysfs, tmp_path: Path) -> None:
    """Several paths on one device name its disks once, sorted as numbers and not as text."""
    number = tmp_path.stat().st_dev
    if not os.major(number):
        pytest.skip("the temporary directory is on no block device")
    name = f"{os.major(number)}:{os.minor(number)}"
    sysfs.add("virtual/block/x", name, over=("8:16", "8:0"))
    sysfs.add("pci0/ata9/block/sdz", "8:4")
    (sysfs.root / "devices/virtual/block/x/slaves/sdz").symlink_to(sysfs.root / "devices/pci0/ata9/block/sdz")
    assert devices.disks_under([str(tmp_path), str(sysfs.root)], str(sysfs.root)) == [
        "8:0",
        "8:4",
        "8:16",
    ]


def test_a_path_on_no_disk_is_an_error_with_a_hint() -> None:
    """tmpfs has no device: the operator must choose another place, or no io limits."""
    with pytest.raises(ConfigError, match=r"cannot find the disk of /dev/shm: tmpfs has none") as caught:
        devices.disks_under(["/dev/shm"])
    assert caught.value.hint == devices.HINT


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """The reason is the kernel's, not a traceback."""
    with pytest.raises(ConfigError, match="No such file"):
        devices.disks_under([str(tmp_path / "none")])


def test_btrfs_names_all_its_devices(sysfs: Sysfs) -> None:
    """One mount source stands for every device of the pool, and for no other pool."""
    for pool, members in {"aaaa": ("8:16",), "bbbb": ("8:0", "8:19")}.items():
        directory = sysfs.root / "fs/btrfs" / pool / "devices"
        directory.mkdir(parents=True)
        for member in members:
            target = (sysfs.root / "dev/block" / member).resolve()
            (directory / target.name).symlink_to(target)
    (sysfs.root / "fs/btrfs/features").mkdir()
    assert sorted(devices.btrfs_members("8:19", str(sysfs.root))) == ["8:0", "8:19"]
    assert devices.btrfs_members("8:1", str(sysfs.root)) == ["8:1"]


def test_a_stacked_device_is_not_counted_twice(sysfs: Sysfs) -> None:
    """What went through dm is counted again by the disk below, and belongs to the sum once."""
    sysfs.add("virtual/block/dm-0", "254:0", over=("8:0",))

    def parse(line: str) -> tuple[str, int, int]:
        device, read, written = line.split()
        return device, int(read), int(written)

    text = "8:0 10 1\n254:0 10 1\n8:16 100 0\nTotal 0 0\n"
    assert devices.sum_io(text, parse, str(sysfs.root)) == (110, 1)


def test_mountinfo_is_read_with_escapes_and_optional_fields(tmp_path: Path) -> None:
    """Blanks in names are written as octal, and the number of optional fields varies."""
    path = tmp_path / "mountinfo"
    path.write_text(
        "36 35 98:0 /a\\040b /mnt/c\\134d rw master:1 shared:2 - ext3 /dev/ro\\040ot rw,errors=remount-ro\n"
        "37 35 0:40 / /x rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    first, second = interface_files.read_mounts(str(path))
    assert (first.id, first.device, first.root, first.point) == (36, "98:0", "/a b", "/mnt/c\\d")
    assert (first.fs_type, first.source) == ("ext3", "/dev/ro ot")
    assert second.super_options == {"rw", "cpu", "cpuacct"}
