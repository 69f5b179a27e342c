"""From paths to the whole disks under them, which the kernel can throttle.

By sysfs alone: names of devices are never parsed, because nothing holds them to a pattern.
"""

import os
from collections.abc import Callable, Iterable
from typing import Final

from pjw.errors import ConfigError
from pjw.launcher.cgroup import interface_files

HINT: Final = "put the state directory on a disk, or set the io limits to 0"


def disks_under(paths: Iterable[str], sysfs: str = "/sys") -> list[str]:
    """Return the disks that hold *paths*, each as MAJ:MIN, sorted.

    A partition gives its disk, device mapper and md give the disks that they are made of, a loop device gives
    itself. Raises ConfigError for a path that lies on no disk.
    """
    found: set[str] = set()
    for path in paths:
        for device in _devices_of(path, sysfs):
            found |= whole_disks(device, sysfs)
    return sorted(found, key=lambda device: tuple(map(int, device.split(":"))))


def whole_disks(device: str, sysfs: str = "/sys") -> set[str]:
    """Return the disks under one block device, given and returned as MAJ:MIN."""
    link = f"{sysfs}/dev/block/{device}"
    if not os.path.exists(link):
        raise ConfigError(f"cannot find the disk of device {device}: sysfs does not know it", hint=HINT)
    directory = os.path.realpath(link)
    # A partition's directory lies in that of its disk.
    if os.path.exists(f"{directory}/partition"):
        directory = os.path.dirname(directory)
    slaves = _entries(f"{directory}/slaves")
    if not slaves:
        return {_number(directory)}
    return set().union(*(whole_disks(_number(f"{directory}/slaves/{name}"), sysfs) for name in slaves))


def is_stacked(device: str, sysfs: str = "/sys") -> bool:
    """Return whether devices below this one do, and count, its work again."""
    return bool(_entries(f"{sysfs}/dev/block/{device}/slaves"))


def sum_io(text: str, parse: Callable[[str], tuple[str, int, int]], sysfs: str = "/sys") -> tuple[int, int]:
    """Return the bytes read and written over all devices, each byte counted once."""
    read_bytes = written_bytes = 0
    for line in text.splitlines():
        device, read, written = parse(line)
        if (read or written) and not is_stacked(device, sysfs):
            read_bytes += read
            written_bytes += written
    return read_bytes, written_bytes


def _devices_of(path: str, sysfs: str) -> list[str]:
    """Return the block devices of the file system at *path*."""
    try:
        status = os.stat(path)
        if os.major(status.st_dev):
            return [_text(status.st_dev)]
        # Major 0 is no device. Some file systems (btrfs) have one all the same, and name it
        # as the source of their mount; most (tmpfs, overlay, nfs) have none.
        mount = _mount_of(path)
        source = os.stat(mount.source) if mount.source.startswith("/dev/") else None
    except OSError as error:
        raise ConfigError(f"cannot find the disk of {path}: {error.strerror}", hint=HINT) from error
    if source is None or not os.major(source.st_rdev):
        raise ConfigError(f"cannot find the disk of {path}: {mount.fs_type} has none", hint=HINT)
    device = _text(source.st_rdev)
    return btrfs_members(device, sysfs) if mount.fs_type == "btrfs" else [device]


def btrfs_members(device: str, sysfs: str = "/sys") -> list[str]:
    """Return all devices of the btrfs that *device* belongs to: its mount names no other."""
    for pool in _entries(f"{sysfs}/fs/btrfs"):
        directory = f"{sysfs}/fs/btrfs/{pool}/devices"
        members = [_number(f"{directory}/{name}") for name in _entries(directory)]
        if device in members:
            return members
    return [device]


def _mount_of(path: str) -> interface_files.CgroupMount:
    # Ask the kernel which mount it is: st_dev is not the mount's for a btrfs subvolume, and
    # the longest matching mount point may be hidden under another mount.
    descriptor = os.open(path, os.O_PATH)
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
            info = dict(line.split(":", 1) for line in file)
    finally:
        os.close(descriptor)
    mount_id = int(info["mnt_id"])
    for mount in interface_files.read_mounts():
        if mount.id == mount_id:
            return mount
    raise ConfigError(f"cannot find the disk of {path}: its mount is not visible here", hint=HINT)


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _number(directory: str) -> str:
    try:
        with open(f"{directory}/dev", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise ConfigError(f"cannot read {directory}/dev: {error.strerror}", hint=HINT) from error


def _text(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
