"""The command lines of Slurm's programs, and what they print, read strictly.

The name of each job of ours is `pjw-UUID`, and its comment says how much it holds, in the gateway's words.
Other jobs of our user's are none of our business.
"""

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

PREFIX: Final = "pjw-"
# A program that has not answered after this time is killed: Slurm's own attempts would last for minutes.
ANSWER_SECONDS: Final = 30
# So many programs run at once: each takes 20 ms of a processor and more.
AT_ONCE: Final = 4
_SEPARATOR: Final = "\x1f"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# what the gateway may write into a shape, and the names of nodes
_WORD: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,250}")
# a partition, or a feature: of Slurm's lists and expressions the operator has allowed none
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,60}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,18}")


class SlurmError(Exception):
    """Slurm did not do it: for a person to read, in Slurm's words where it has some."""


@dataclass(frozen=True, slots=True)
class Commands:
    """Slurm's programs, as the gateway's configuration has them."""

    # the directory of the programs
    bin: str
    # the path of slurm.conf, empty for Slurm's own
    conf: str
    account: str
    # on each node: the program that holds a place, and the socket of pjwd
    hold: str
    socket: str

    async def answer(self, method: str, arguments: Mapping[str, Any]) -> object:
        """Do what the gateway asks for. Raises SlurmError."""
        match method:
            case "submit":
                return await self.submit(**arguments)
            case "cancel":
                await self.cancel(**arguments)
                return None
            case "jobs":
                return await self.jobs()
            case "nodes":
                return await self.nodes()
            case _:
                raise SlurmError(f"there is no {method}")

    async def submit(
        self,
        uuid: str,
        shape: str,
        cpus: int,
        megabytes: int,
        minutes: int,
        exclude: Sequence[str],
        partition: str,
        constraint: str,
    ) -> str:
        """Ask Slurm for a place; the id of Slurm's job. 0 and empty words leave it to Slurm."""
        _require(_UUID, uuid)
        _require(_WORD, shape)
        # not NONE: slurmd would have the user's login shell make an environment, which takes a second
        command = ["sbatch", "--parsable", "--export=ALL", "--no-requeue", "--nodes=1", "--ntasks=1"]
        command += ["--input=/dev/null", "--output=/dev/null", "--error=/dev/null", "--chdir=/"]
        command += [f"--job-name={PREFIX}{uuid}", f"--comment={shape}"]
        command += [f"--cpus-per-task={int(cpus)}"] if cpus else []
        command += [f"--mem={int(megabytes)}M"] if megabytes else []
        command += [f"--time={int(minutes)}"] if minutes else []
        command += [f"--partition={_require(_NAME, partition)}"] if partition else []
        command += [f"--constraint={_require(_NAME, constraint)}"] if constraint else []
        command += [f"--account={self.account}"] if self.account else []
        if exclude:
            for name in exclude:
                _require(_WORD, name)
            command.append(f"--exclude={','.join(exclude)}")
        script = f"#!/bin/sh\nexec {_quoted(self.hold)} {_quoted(self.socket)} {shape} {uuid}\n"
        said = await self._run(command, script.encode())
        return _require(_NUMBER, said.strip().partition(";")[0])

    async def cancel(self, ids: Sequence[str]) -> None:
        """Take jobs back that have no place yet, or whose places nobody needs."""
        await self._run(["scancel", *(_require(_NUMBER, each) for each in ids)])

    async def jobs(self) -> list[dict[str, str]]:
        """Our jobs that have not ended, each with its id, uuid, shape, state and the reason why it waits."""
        form = _SEPARATOR.join(("%A", "%j", "%T", "%k", "%R"))
        said = await self._run(["squeue", "--noheader", "--me", f"--format={form}"])
        found = []
        for line in said.splitlines():
            number, name, state, shape, reason = _fields("squeue", line, 5)
            uuid = name.removeprefix(PREFIX)
            if name.startswith(PREFIX) and _UUID.fullmatch(uuid) and _WORD.fullmatch(shape):
                _require(_NUMBER, number)
                waits = reason[1:-1] if reason.startswith("(") and reason.endswith(")") else ""
                found.append({"id": number, "uuid": uuid, "shape": shape, "state": state, "reason": waits})
        return found

    async def nodes(self) -> dict[str, tuple[str, str]]:
        """Return the nodes of Slurm, each with its state and the reason that an administrator gave for it."""
        form = _SEPARATOR.join(("%N", "%T", "%E"))
        said = await self._run(["sinfo", "--noheader", "--Node", f"--format={form}"])
        rows = [_fields("sinfo", line, 3) for line in said.splitlines()]
        return {name: (state.rstrip("*~#!%$@^-+"), "" if why == "none" else why) for name, state, why in rows}

    async def _run(self, command: Sequence[str], stdin: bytes = b"") -> str:
        program = os.path.join(self.bin, command[0])
        # nothing of ours: with --export=ALL a job would have it
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": "/"}
        if self.conf:
            environment["SLURM_CONF"] = self.conf
        async with _turns:
            try:
                process = await asyncio.create_subprocess_exec(
                    program,
                    *command[1:],
                    env=environment,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                )
            except OSError as error:
                raise SlurmError(f"cannot execute {program}: {error.strerror}") from error
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    out, said = await process.communicate(stdin)
            except TimeoutError:
                raise SlurmError(f"{command[0]} did not answer for {ANSWER_SECONDS} s") from None
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        if process.returncode != 0:
            raise SlurmError(f"{command[0]}: {_words(said)}")
        return out.decode(errors="replace")


_turns: Final = asyncio.Semaphore(AT_ONCE)


def _words(said: bytes) -> str:
    """One line of what a program complained of: the one about munge, or the last."""
    lines = [
        re.sub(r"^\S+: (error: )?|^error: ", "", line).strip()
        for line in said.decode(errors="replace").splitlines()
        if line.strip()
    ]
    about = [line for line in lines if "munge" in line.lower() and not line.startswith("If munged")]
    return (about[:1] or lines[-1:] or ["it failed without a word"])[0]


def _fields(program: str, line: str, count: int) -> list[str]:
    fields = line.split(_SEPARATOR)
    if len(fields) != count:
        raise SlurmError(f"{program} printed a line that pjw does not understand: {line!r}")
    return [each.strip() for each in fields]


def _require(pattern: "re.Pattern[str]", text: str) -> str:
    if not pattern.fullmatch(text):
        raise SlurmError(f"not what was expected of Slurm or for it: {text!r}")
    return text


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"
