"""What a test sees of a running object without its private members: what it keeps, watches and tells."""

import asyncio
import gc
import os
import sqlite3
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.gateway.nodes import NodeSession

# the rest of the program, and what is under way
_ELSEWHERE: Final = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.FrameType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    asyncio.Task,
)


def kept_by(thing: object) -> Iterator[object]:
    """All that is in memory for the sake of an object, itself included."""
    met, waiting = {id(thing)}, [thing]
    while waiting:
        each = waiting.pop()
        yield each
        # a dictionary does not tell of keys that are texts
        keys = list(each) if isinstance(each, dict) else []
        for more in [*gc.get_referents(each), *keys]:
            if id(more) not in met and not isinstance(more, _ELSEWHERE):
                met.add(id(more))
                waiting.append(more)


def texts_kept_by(thing: object) -> set[str]:
    """The texts among these, such as the names of clients."""
    return {each for each in kept_by(thing) if isinstance(each, str)}


def watches(path: Path) -> int:
    """How often this process watches a file by inotify(7)."""
    wanted, found = f"ino:{path.stat().st_ino:x} ", 0
    for number in os.listdir("/proc/self/fdinfo"):
        with suppress(FileNotFoundError):
            lines = Path(f"/proc/self/fdinfo/{number}").read_text().splitlines()
            found += sum(line.startswith("inotify wd:") and wanted in line for line in lines)
    return found


def tables_opened(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """The connections of SQLite that are made from now on."""
    connect, found = sqlite3.connect, list[sqlite3.Connection]()

    def noting(*arguments: Any, **options: Any) -> sqlite3.Connection:
        found.append(connect(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(sqlite3, "connect", noting)
    return found


def told(session: NodeSession) -> list[pb.SessionResponse]:
    """What a node has been told since the last look; call it where an event loop runs."""
    messages, found = session.messages(), []
    while True:
        step = messages.__anext__()
        try:
            step.send(None)
        except StopIteration as come:
            found.append(come.value)
        except StopAsyncIteration:
            return found
        else:
            # it waits for the next message
            step.close()
            return found
