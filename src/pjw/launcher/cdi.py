"""Devices that the operator offers, as files of the Container Device Interface (CDI) describe them.

https://github.com/cncf-tags/container-device-interface defines the format. The launcher reads these files
itself, for each launch with devices: a request has names alone. Of `containerEdits` it takes deviceNodes,
mounts and env. It runs no hook.
"""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pjw.errors import ConfigError, GpuError, KernelError
from pjw.launcher.operator_files import open_operator_file
from pjw.model import GPUS_MAX, MOUNT_PATH_MAX_BYTES, is_plain_path, is_variable, lies_in

# The most edits of one job: each is a descriptor of init's order, whose array has as many (init/init.h).
EDITS_MAX: Final = 128
# nvidia-ctk writes 20 KiB for eight GPUs
_FILE_BYTES_MAX: Final = 1024**2
_FILES_MAX: Final = 64
_PIECE_BYTES: Final = 1024**2
# an answer of the launcher holds all variables of a job's devices
_VARIABLES_MAX_BYTES: Final = 8192
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]{0,62}[A-Za-z0-9])?")
# the directories that each job has of its own; elsewhere it sees the host's files as they are
_OWN: Final = ("/dev", "/proc", "/run", "/sys", "/tmp", "/var/tmp")  # noqa: S108  a job's
# places where nothing of a device can be: the job can write there, or they belong to the kernel
_NEVER: Final = ("/proc", "/sys", "/tmp", "/var/tmp", "/run/job", "/run/workspace")  # noqa: S108


@dataclass(frozen=True, slots=True)
class Edit:
    """A device node, file or directory of the host, and its path in a job."""

    host_path: str
    path: str
    is_device: bool


@dataclass(frozen=True, slots=True)
class Edits:
    """The edits and variables that a job gets with a device."""

    edits: tuple[Edit, ...] = ()
    environment: tuple[str, ...] = ()

    @property
    def nodes(self) -> frozenset[str]:
        """The device nodes on the host."""
        return frozenset(edit.host_path for edit in self.edits if edit.is_device)


NO_EDITS: Final = Edits()


@dataclass(frozen=True, slots=True)
class Device:
    """A device: its own edits, and the edits that all devices of its file have in common."""

    name: str
    own: Edits
    common: Edits


def read_devices(kind: str, directories: Iterable[str]) -> tuple[Device, ...]:
    """Return the devices of a kind, each name once. Raises ConfigError or KernelError for a bad file.

    A device in a later directory replaces one of the same name in an earlier directory, as CDI defines it.
    """
    devices: dict[str, Device] = {}
    for directory in directories:
        found: dict[str, Device] = {}
        for path in _files(directory):
            for device in _devices_of(path, kind):
                if device.name in found:
                    raise ConfigError(f"{path}: {kind}={device.name} is in another file of {directory}, too")
                found[device.name] = device
        devices |= found
    return _distinct(devices.values())


def _distinct(devices: Iterable[Device]) -> tuple[Device, ...]:
    """Return each device once: nvidia-ctk names one as `0` and by its UUID, and all of them as `all`."""
    kept: list[Device] = []
    # few nodes first: a device with all nodes of another one, and more, is several devices at once
    for device in sorted(devices, key=lambda each: (len(each.own.nodes), _order(each.name))):
        if device.own.nodes and not any(other.own.nodes <= device.own.nodes for other in kept):
            kept.append(device)
    return tuple(sorted(kept, key=lambda each: _order(each.name)))[:GPUS_MAX]


def _order(name: str) -> tuple[bool, int, str]:
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def edits_of(devices: Sequence[Device], names: Sequence[str], *, image: bool = False) -> Edits:
    """Return the edits of a job with these devices; in an *image* also of files that it sees anyway.

    Raises GpuError for an unknown name.
    """
    by_name = {device.name: device for device in devices}
    if missing := [name for name in names if name not in by_name]:
        raise GpuError.gone(missing[0])
    parts = [part for name in names for part in (by_name[name].common, by_name[name].own)]
    edits = {
        edit.path: edit
        for part in parts
        for edit in part.edits
        if image or edit.is_device or _is_to_be_made(edit)
    }
    variables = {text.partition("=")[0]: text for part in parts for text in part.environment}
    if len(edits) > EDITS_MAX:
        raise ConfigError(
            f"{len(names)} GPUs have {len(edits)} devices and mounts; a job can have at most {EDITS_MAX}"
        )
    if sum(len(text.encode()) + 1 for text in variables.values()) > _VARIABLES_MAX_BYTES:
        raise ConfigError(f"the variables of GPUs have more than {_VARIABLES_MAX_BYTES} bytes")
    return Edits(tuple(edits.values()), tuple(variables.values()))


def _files(directory: str) -> list[str]:
    """Return the files of a directory, sorted by name; none when the directory is missing."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise KernelError("read", directory, error.errno or 0) from error
    if len(names) > _FILES_MAX:
        raise ConfigError(f"{directory} has more than {_FILES_MAX} files")
    return [f"{directory}/{name}" for name in names]


def _devices_of(path: str, kind: str) -> Iterator[Device]:
    try:
        # decode first, as in protocol.py
        spec = _table(json.loads(_read(path).decode()))
        if spec.get("kind") != kind:
            return
        common = _edits(spec.get("containerEdits"))
        for device in map(_table, _list(spec, "devices")):
            name = _text(device, "name")
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name[:80]!r} is not a name of a device")
            yield Device(name, _edits(device.get("containerEdits")), common)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot take the devices of {path}: {error}") from error


def _read(path: str) -> bytes:
    """Read all of a file that only root can change. Raises ConfigError or KernelError."""
    descriptor = open_operator_file(path)
    try:
        _require_roots(path, descriptor)
        data = b""
        while len(data) <= _FILE_BYTES_MAX and (piece := os.read(descriptor, _PIECE_BYTES)):
            data += piece
    except OSError as error:
        raise KernelError("read", path, error.errno or errno.EIO) from error
    finally:
        os.close(descriptor)
    if len(data) > _FILE_BYTES_MAX:
        raise ValueError("it is too long")
    return data


def _require_roots(path: str, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise ConfigError(
            f"cannot take the devices of {path}: others than root may change it",
            hint=f"chown root {path}; chmod go-w {path}",
        )


def _edits(value: object) -> Edits:
    edits = _table({} if value is None else value)
    nodes = map(_node, map(_table, _list(edits, "deviceNodes")))
    mounts = map(_mount, map(_table, _list(edits, "mounts")))
    variables = tuple(_variable(each) for each in _list(edits, "env"))
    return Edits((*nodes, *mounts), variables)


def _node(node: Mapping[str, Any]) -> Edit:
    path = _place(_text(node, "path"))
    if not lies_in(path, "/dev") or path == "/dev":
        raise ValueError(f"the device {path} is not in /dev")
    if node.get("type", "c") not in ("c", "u"):
        raise ValueError(f"{path} is no character device")
    allowed = node.get("permissions") or "rw"
    if not isinstance(allowed, str) or not {"r", "w"} <= set(allowed):
        # the node's own mode decides about access, and a mount of the node cannot change that
        raise ValueError(f"{path} has the permissions {allowed!r:.80}, and only 'rw' can be given")
    return Edit(_host_path(_text(node, "hostPath", path)), path, is_device=True)


def _mount(mount: Mapping[str, Any]) -> Edit:
    return Edit(_host_path(_text(mount, "hostPath")), _place(_text(mount, "containerPath")), is_device=False)


def _is_to_be_made(mount: Edit) -> bool:
    """Return whether a job needs this mount: it sees host files except in directories of its own."""
    return mount.host_path != mount.path or any(lies_in(mount.path, own) for own in _OWN)


def _host_path(path: str) -> str:
    if not is_plain_path(path):
        raise ValueError(f"{path[:80]!r} is no absolute path without '.' and '..'")
    return path


def _place(path: str) -> str:
    _host_path(path)
    if any(lies_in(path, each) or lies_in(each, path) for each in _NEVER) or path in _OWN:
        raise ValueError(f"{path[:80]!r} is a directory of the job's own")
    if len(path.encode()) > MOUNT_PATH_MAX_BYTES:
        raise ValueError(f"{path[:80]!r} is too long")
    return path


def _variable(text: object) -> str:
    if (
        not isinstance(text, str)
        or "=" not in text
        or not text.isprintable()
        or not is_variable(text.partition("=")[0])
    ):
        raise ValueError(f"{text!r:.80} is no variable")
    return text


def _text(table: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = table.get(key, default) or default
    if not isinstance(value, str):
        raise ValueError(f"{key} is missing, or no text")  # noqa: TRY004  as all that is wrong in a file
    return value


def _list(table: Mapping[str, Any], key: str) -> list[Any]:
    value = table.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list")  # noqa: TRY004
    return value


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("there is no table where one must be")  # noqa: TRY004
    return value
