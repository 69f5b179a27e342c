"""The gateway's end of the socket to pjwd-slurm, the process that calls Slurm's programs (pjw.slurm).

The gateway executes nothing, since it talks to the network. pjwd-slurm is started before the gateway gives up
root, and ends with it.
"""

import asyncio
import json
import os
import shutil
import socket
import sys
from typing import Any, Final

from pjw.errors import ConfigError, KernelError, PjwError
from pjw.server.config import GatewaySlurm

# as in pjw.slurm
_REQUESTS_FD: Final = 3
# of an answer: that is a hundred thousand jobs
_LINE_BYTES_MAX: Final = 32 * 1024 * 1024
_PROGRAMS: Final = ("sbatch", "scancel", "squeue", "sinfo")


class SlurmRefusedError(PjwError):
    """Slurm did not do it; in its words."""


def start_slurm(settings: GatewaySlurm, uid: int | None) -> socket.socket:
    """Start pjwd-slurm as *uid* (None: as we are); the socket to it. Raises ConfigError and KernelError."""
    for name in _PROGRAMS:
        if shutil.which(name, path=settings.bin) is None:
            raise ConfigError(
                f"the engine slurm needs {name}, and there is none in {settings.bin}",
                hint="install Slurm's client programs (on Debian: slurm-client), or set gateway.slurm.bin",
            )
    if settings.conf is not None and not os.path.exists(settings.conf):
        raise ConfigError(
            f"gateway.slurm.conf names {settings.conf}, and there is no such file",
            hint="leave it out where Slurm finds its slurm.conf itself",
        )
    given = {
        "uid": uid,
        "bin": settings.bin,
        "conf": settings.conf or "",
        "account": settings.account or "",
        "hold": settings.hold,
        "socket": settings.socket,
    }
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-m", "pjw.slurm", json.dumps(given)],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _REQUESTS_FD)],
            )
    except OSError as error:
        ours.close()
        raise KernelError("start", "pjwd-slurm", error.errno or 0) from error
    return ours


class SlurmPort:
    """Calls of Slurm's programs."""

    def __init__(self, made: socket.socket) -> None:
        self._socket: Final = made
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: Final[dict[int, asyncio.Future[Any]]] = {}
        self._number = 0
        self._is_closed = False

    async def begin(self) -> asyncio.StreamReader:
        """Connect; the answers, for `run`."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket, limit=_LINE_BYTES_MAX)
        return reader

    async def run(self, answers: asyncio.StreamReader) -> None:
        """Hear the answers. Raises RuntimeError when pjwd-slurm has gone: a new gateway has a new one."""
        while line := await answers.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"])
            if future.done():
                continue
            if "error" in answer:
                future.set_exception(SlurmRefusedError(answer["error"]))
            else:
                future.set_result(answer["result"])
        if not self._is_closed:
            raise RuntimeError("pjwd-slurm has gone")

    def close(self) -> None:
        """Hang up: pjwd-slurm ends."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()

    async def submit(
        self,
        uuid: str,
        shape: str,
        cpus: int,
        megabytes: int,
        minutes: int,
        exclude: list[str],
        partition: str,
        constraint: str,
    ) -> str:
        """Submit a hold; the id of Slurm's job. Raises SlurmRefusedError, as all others here."""
        return str(
            await self._call(
                "submit",
                uuid=uuid,
                shape=shape,
                cpus=cpus,
                megabytes=megabytes,
                minutes=minutes,
                exclude=exclude,
                partition=partition,
                constraint=constraint,
            )
        )

    async def cancel(self, ids: list[str]) -> None:
        """Take Slurm's jobs back."""
        await self._call("cancel", ids=ids)

    async def jobs(self) -> list[dict[str, str]]:
        """Our jobs in Slurm that have not ended: id, uuid, shape, state and reason of each."""
        return list(await self._call("jobs"))

    async def nodes(self) -> dict[str, tuple[str, str]]:
        """Slurm's nodes, with the state of each, and the reason for it."""
        return {name: (state, why) for name, (state, why) in (await self._call("nodes")).items()}

    async def _call(self, method: str, **arguments: object) -> Any:  # noqa: ANN401  the result of the method
        assert self._writer is not None
        self._number += 1
        future = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        request = {"id": self._number, "method": method, "arguments": arguments}
        self._writer.write(json.dumps(request).encode() + b"\n")
        return await future
