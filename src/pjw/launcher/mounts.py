"""Mounts that the operator offers: from a word in a request to a directory of the host, and to its mount.

The launcher alone knows which directory a word stands for: from the greeting, or from the operator's
configuration, which only root can change. It never walks to such a directory itself, since a file server that
is gone would hold up all starts. A separate process walks (init/offered.c), and this module waits for it as
for all else.
"""

import errno
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from pjw.errors import ConfigError, GpuError, InvalidJobError, MountError, PjwError, ProtocolError
from pjw.launcher.cdi import Edit
from pjw.launcher.processes import Timer, Watcher
from pjw.launcher.protocol import LAUNCH_SECONDS
from pjw.launcher.spawn import Failed, OpenedTree, read_report, spawn_opener
from pjw.model import OFFERED_MAX, MountSource
from pjw.process import close_all

# The most processes that walk to directories at once. Only a process that waits for a dead file server stays.
OPENERS_MAX: Final = 64
# far above any configuration
_CONFIGURATION_BYTES_MAX: Final = 4 * 1024**2
_PIECE_BYTES: Final = 1024**2

# a directory, or a node or file of a device
Source = MountSource | Edit
# Gets the descriptors of the mounts, in the order of the sources, and owns them from then on; or an error.
Then = Callable[[list[int] | PjwError], None]


@dataclass(slots=True, eq=False)
class _Opening:
    """A process that opens the directories of one launch."""

    sources: Sequence[Source]
    then: Then
    pid: int
    report: socket.socket
    timer: Timer | None = None
    trees: list[int] = field(default_factory=list)


class Mounts:
    """The operator's mounts, and the processes that open their directories."""

    def __init__(self, watcher: Watcher, sources: Sequence[MountSource]) -> None:
        self._watcher: Final = watcher
        self.sources = sources
        self._openings: Final[set[_Opening]] = set()
        # processes that have not ended
        self._processes = 0

    def open(self, sources: Sequence[Source], then: Then) -> None:
        """Make a mount of each, mounted nowhere yet; calls *then* once, maybe before it returns."""
        if self._processes >= OPENERS_MAX:
            then(_failed(sources[0], errno.EAGAIN))
            return
        try:
            pid, report = spawn_opener(sources)
        except OSError as error:
            then(_failed(sources[0], error.errno or errno.EAGAIN))
            return
        opening = _Opening(sources, then, pid, report)
        self._processes += 1
        self._watcher.reap_helper(pid, lambda: self._on_ended(opening))
        self._openings.add(opening)
        opening.timer = self._watcher.call_after(
            LAUNCH_SECONDS, lambda: self._finish(opening, errno.ETIMEDOUT)
        )
        self._watcher.watch(report, lambda: self._on_report(opening))

    def _on_ended(self, opening: _Opening) -> None:
        self._processes -= 1
        # no process has this pid any more
        opening.pid = 0

    def _on_report(self, opening: _Opening) -> None:
        match read_report(opening.report):
            case OpenedTree(tree):
                opening.trees.append(tree)
                if len(opening.trees) == len(opening.sources):
                    self._finish(opening)
            case Failed(errno=number):
                self._finish(opening, number or errno.EIO)
            case _:
                raise ProtocolError("what opens the operator's directories sent an unknown report")

    def _finish(self, opening: _Opening, error: int = 0) -> None:
        self._let_go(opening)
        trees, opening.trees = opening.trees, []
        if error:
            failed = opening.sources[len(trees)]
            close_all(trees)
            opening.then(_failed(failed, error))
        else:
            opening.then(trees)

    def _let_go(self, opening: _Opening) -> None:
        self._openings.discard(opening)
        self._watcher.unwatch(opening.report)
        opening.report.close()
        if opening.timer is not None:
            opening.timer.cancel()
        if opening.pid:
            # it has nothing more to do; while it waits for a file server it may stay
            with suppress(ProcessLookupError):
                os.kill(opening.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop waiting for all directories, without a call of *then*."""
        for opening in list(self._openings):
            self._let_go(opening)
            close_all(opening.trees)


def _failed(source: Source, error: int) -> PjwError:
    if isinstance(source, Edit):
        return GpuError.of_edit(source.path, error)
    return MountError.of_source(source.name, error)


def read_mounts_of(descriptor: int, path: str) -> tuple[MountSource, ...]:
    """Return the mounts of a configuration, read to its end; *path* is for messages. Raises ConfigError."""
    # root's process should not load it without need
    import tomllib

    data = b""
    try:
        while len(data) <= _CONFIGURATION_BYTES_MAX and (piece := os.read(descriptor, _PIECE_BYTES)):
            data += piece
    finally:
        os.close(descriptor)
    try:
        if len(data) > _CONFIGURATION_BYTES_MAX:
            raise ValueError("it is too long")
        values = tomllib.loads(data.decode())
        return tuple(_source(name, keys) for name, keys in _table(values.get("mounts", {})).items())
    except (ValueError, RecursionError, InvalidJobError) as error:
        raise ConfigError(f"cannot take the mounts of {path}: {error}") from error


def _source(name: str, keys: object) -> MountSource:
    # the server has checked the same file by more rules, with better messages
    given = _table(keys)
    path, read_only = given.pop("path", ""), given.pop("read_only", True)
    clients = given.pop("clients", ["*"])
    types = isinstance(path, str) and isinstance(read_only, bool) and isinstance(clients, list)
    if given or not types or not all(isinstance(each, str) for each in clients):
        raise ValueError(f"mounts.{name} has unknown keys, or values of a wrong type")
    return MountSource(name, path, read_only, tuple(clients))


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > OFFERED_MAX:
        raise ValueError(f"mounts must be tables, at most {OFFERED_MAX}")
    return dict(value)
