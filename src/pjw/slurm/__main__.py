"""Start pjwd-slurm: give up root, then call Slurm's programs for the gateway until that is gone.

The gateway talks to the network, and so it may execute nothing (server/syscalls.py). This process executes
Slurm's programs and nothing else. It gets uuids and sizes, and of a client's words only the partition and
the feature that the operator allows it to name. Each request and each answer is a line of JSON on descriptor
3. The argument is a line of JSON, too: the user to become, and the settings of `commands.Commands`.
"""

import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from pjw.process import open_standard_descriptors
from pjw.slurm.programs import Commands, SlurmError

_REQUESTS_FD: Final = 3
# of a request; an answer may be longer
_LINE_BYTES_MAX: Final = 65_536
# linux/prctl.h
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 4, 15, 38


def main() -> int:
    """Serve until the gateway hangs up; the exit code."""
    open_standard_descriptors()
    os.closerange(_REQUESTS_FD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # we end when the gateway ends; a terminal's keys reach both
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(sys.argv[1])
    _give_up_root(settings.pop("uid"))
    asyncio.run(_serve(socket.socket(fileno=_REQUESTS_FD), Commands(**settings)))
    return 0


def _give_up_root(uid: int | None) -> None:
    # import what we need later while we are root: perhaps only root can read the interpreter's directory
    for name in ("asyncio.subprocess", "concurrent.futures.thread", "linecache", "traceback"):
        import_module(name)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, b"pjwd-slurm", 0, 0, 0)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


async def _serve(gateway: socket.socket, commands: Commands) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=gateway, limit=_LINE_BYTES_MAX)
    under_way: set[asyncio.Task[None]] = set()
    # it is reset when the gateway is killed with answers unread
    with suppress(ConnectionError):
        while line := await reader.readline():
            task = asyncio.ensure_future(_answer(json.loads(line), commands, writer))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            task.add_done_callback(_end_at_bug)
    # the gateway has gone: nobody waits for what is under way
    os._exit(0)


def _end_at_bug(task: asyncio.Task[None]) -> None:
    # The gateway would wait for this answer for ever. It ends when we end, and the next one starts another
    # pjwd-slurm.
    if not task.cancelled() and (error := task.exception()) is not None:
        traceback.print_exception(error)
        os._exit(1)


async def _answer(request: dict[str, Any], commands: Commands, writer: asyncio.StreamWriter) -> None:
    answer: dict[str, object] = {"id": request["id"]}
    try:
        answer["result"] = await commands.answer(request["method"], request["arguments"])
    except SlurmError as error:
        answer["error"] = str(error)
    writer.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
