"""`pjw mcp`: an MCP server on stdin and stdout, for the program of an AI agent.

The only module that imports the package mcp. The work of the tools is in agent_jobs.py. Their docstrings and
the texts of their parameters are for a model to read.
"""

import asyncio
import inspect
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Coroutine
from contextlib import suppress
from typing import Annotated, Any, Final, TypeVar

import anyio
from mcp.server.mcpserver import MCPServer
from mcp.types import CallToolResult, TextContent, ToolAnnotations
from pydantic import BeforeValidator, Field

from pjw.cli.agent_jobs import AgentJobs, Answer, words_of
from pjw.cli.connection import connect_async
from pjw.errors import ConfigError, PjwError
from pjw.version import version

T = TypeVar("T")

# Seconds that an answer may take beyond the requested time: the client reconnects after a lost connection.
_BEYOND_SECONDS: Final = 60
# Seconds to wait for stops when a signal ends us; the sender may soon kill us.
_LAST_SECONDS: Final = 1
_INSTRUCTIONS: Final = """\
Runs shell commands as jobs on a machine with pjwd: isolated, with limits, without a network. A job begins \
in an empty directory of its own, /run/job, and sees the machine's programs read-only. Its files go when it \
ends. To work with files over several commands, run one job that stays, such as "sleep 3600", put files into \
it, and run commands inside it (in_job)."""

_Job = Annotated[
    str,
    # models like to give an id as a number
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
]
_Command = Annotated[
    _Job, Field(description="The id from run, such as 17 (a job) or 17/2 (a command in it), or a job's name.")
]
_RunningJob = Annotated[_Job, Field(description="The id or the name of a job that runs.")]
_Path = Annotated[
    str,
    Field(min_length=1, description="A path in the job. A relative one begins at its directory, /run/job."),
]
_Wait = Annotated[
    float,
    Field(
        ge=1,
        le=600,
        description="Answer after at most this many seconds, even if the command goes on.",
    ),
]
_MaxBytes = Annotated[int, Field(ge=100, le=100_000, description="How much output the answer has at most.")]


class _Tools:
    """Each method but `add_to` is a tool."""

    def __init__(self, jobs: AgentJobs) -> None:
        self._jobs: Final = jobs

    def add_to(self, server: MCPServer) -> None:
        """Make tools of the methods."""
        for tool, reads, destroys in (
            (self.run, False, False),
            (self.poll, True, False),
            (self.stop, False, True),
            (self.put, False, True),
            (self.get, True, False),
            (self.list, True, False),
        ):
            server.add_tool(
                tool,
                description=inspect.getdoc(tool),
                annotations=ToolAnnotations(read_only_hint=reads, destructive_hint=destroys),
                structured_output=False,
            )

    async def run(
        self,
        command: Annotated[str, Field(description="What /bin/sh -c executes.")],
        wait_seconds: _Wait = 20,
        in_job: Annotated[
            _Job,
            Field(description="Run it inside this running job, with its files and limits, not as a new job."),
        ] = "",
        workdir: Annotated[
            str, Field(description="Where it begins: an absolute path. Default: /run/job.")
        ] = "",
        env: Annotated[dict[str, str] | None, Field(description="Environment variables to add.")] = None,
        name: Annotated[str, Field(description="A name for the new job, to find it by.")] = "",
        cpus: Annotated[float, Field(ge=0, description="Processors, such as 0.5. 0: the default.")] = 0,
        memory: Annotated[str, Field(description="Such as 512M or 2G. Empty: the default.")] = "",
        timeout: Annotated[  # noqa: ASYNC109  a model reads this name
            str, Field(description="Kill the job after this time: 90s, 1h30m. Empty: the default.")
        ] = "",
        max_bytes: _MaxBytes = 16_000,
    ) -> CallToolResult:
        """Run a shell command, and answer with its exit code and output (stdout and stderr together).

        A command that takes longer than wait_seconds goes on: the answer has its id, and poll gives the rest.
        An exit code other than 0 is a result, no error. When this call is cancelled, the command is stopped.
        """
        asked = {"command": command, "workdir": workdir, "env": env or {}}
        if in_job:
            if name or cpus or memory or timeout:
                return _failure(
                    "name, cpus, memory and timeout apply only to a new job", "leave them out with in_job"
                )
            work = self._jobs.run_inside(in_job, asked, seconds=wait_seconds, bytes_max=max_bytes)
        else:
            limits: dict[str, str | int] = {
                "cpu_max_millicores": round(cpus * 1000),
                "memory_max_bytes": memory,
                "time_max_seconds": timeout,
            }
            work = self._jobs.run(asked | {"name": name}, limits, seconds=wait_seconds, bytes_max=max_bytes)
        return await _answer(work, wait_seconds)

    async def poll(
        self,
        job: _Command,
        offset: Annotated[
            int,
            Field(description="Begin at this byte of the output. Below 0: so many bytes before its end."),
        ] = 0,
        wait_seconds: _Wait = 20,
        max_bytes: _MaxBytes = 16_000,
    ) -> CallToolResult:
        """Give further output of a command, and whether it has ended, with its exit code.

        Answers when the command has ended, when max_bytes are there, or after wait_seconds. Call it as often
        as you like, also after the end. When this call is cancelled, the command goes on.
        """
        work = self._jobs.poll(job, offset, wait_seconds, max_bytes)
        return await _answer(work, wait_seconds)

    async def stop(
        self,
        job: _Command,
        grace_seconds: Annotated[
            float,
            Field(
                ge=-1, le=600, description="From SIGTERM to SIGKILL. Below 0: the default. 0 kills at once."
            ),
        ] = -1,
    ) -> CallToolResult:
        """Stop a command, with every process that it has started, and answer when it has ended."""
        grace = None if grace_seconds < 0 else grace_seconds
        return await _answer(self._jobs.stop(job, grace), _BEYOND_SECONDS + max(0, grace_seconds))

    async def put(
        self,
        job: _RunningJob,
        path: _Path,
        content: Annotated[
            str, Field(description="All of the file: text, or with base64 its bytes. Up to 1 MiB.")
        ],
        *,
        base64: Annotated[
            bool, Field(description="Whether content is base64, for what is not text.")
        ] = False,
        executable: Annotated[bool, Field(description="Whether to make the file executable.")] = False,
    ) -> CallToolResult:
        """Write a file in a running job, or replace it; directories are made as needed.

        The file is there as a whole or not at all. It goes when the job ends.
        """
        work = self._jobs.put(job, path, content, base64=base64, executable=executable)
        return await _answer(work, 0)

    async def get(
        self,
        job: _RunningJob,
        path: _Path,
        offset: Annotated[int, Field(ge=0, description="Begin at this byte of the file.")] = 0,
        max_bytes: _MaxBytes = 16_000,
        *,
        base64: Annotated[bool, Field(description="Whether to give base64, for what is not text.")] = False,
    ) -> CallToolResult:
        """Read a file of a running job. A file longer than max_bytes is read in parts, by offset."""
        return await _answer(self._jobs.get(job, path, offset, max_bytes, base64=base64), 0)

    async def list(
        self,
        limit: Annotated[int, Field(ge=1, le=100, description="How many jobs at most.")] = 20,
        *,
        running: Annotated[bool, Field(description="Only those that have not ended.")] = False,
    ) -> CallToolResult:
        """List your jobs, the newest first: id, name, state, exit code and command of each."""
        return await _answer(self._jobs.list(limit, running=running), 0)


def serve(arguments: Namespace) -> None:
    """Serve until stdin ends. Raises ConfigError."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(
            "cannot serve agents: stdin is not a pipe; the program of the agent starts this command",
            hint="for Claude Code: claude mcp add pjw -- pjw mcp",
        )
    # before the package sets up its own way, on stderr as well
    logging.basicConfig(level=logging.WARNING, format="pjw: %(message)s", stream=sys.stderr)
    asyncio.run(_serve(arguments))


async def _serve(arguments: Namespace) -> None:
    async with connect_async(arguments) as client:
        jobs = AgentJobs(client)
        ending = _EndBySignal(jobs)
        ending.install()
        server: MCPServer = MCPServer(
            "pjw", version=version(), instructions=_INSTRUCTIONS, log_level="WARNING", subscriptions=False
        )
        _Tools(jobs).add_to(server)
        # the reader of our answers has gone
        with suppress(BrokenPipeError, ConnectionResetError):
            try:
                await server.run_stdio_async()
            except BaseExceptionGroup as group:
                _raise_single(group)


def _raise_single(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the error in a group when it is the only one; look into nested groups as well."""
    raised: BaseException = group
    while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
        [raised] = raised.exceptions
    raise raised


class _EndBySignal:
    """Ends us by a signal, as it would without this, after stopping commands whose ids no answer has given.

    We do not leave by way of the server: the thread that reads stdin would wait there.
    """

    def __init__(self, jobs: AgentJobs) -> None:
        self._jobs: Final = jobs
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Catch the signals that end programs, but not those that we were started to ignore."""
        loop = asyncio.get_running_loop()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                # Windows has no such handlers
                with suppress(NotImplementedError):
                    loop.add_signal_handler(number, self._begin, number)

    def _begin(self, number: int) -> None:
        if self._task is None:
            self._task = asyncio.ensure_future(self._end(number))

    async def _end(self, number: int) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self._jobs.stop_untold()
        finally:
            # also after a bug: this task's error would be lost, and later signals do nothing
            os._exit(128 + number)


async def _answer(work: Coroutine[Any, Any, Answer], seconds: float) -> CallToolResult:
    """Return the answer for a model; an error that it can act on is the result of a failed call."""
    try:
        answer = await _apart(_within(work, seconds + _BEYOND_SECONDS))
    except PjwError as error:
        return _result(Answer(words_of(error)), is_error=True)
    except TimeoutError:
        return _failure("the server did not answer in time", "try again; list shows what runs")
    return _result(answer)


def _failure(words: str, hint: str) -> CallToolResult:
    return _result(Answer(words_of(PjwError(words, hint=hint))), is_error=True)


def _result(answer: Answer, *, is_error: bool = False) -> CallToolResult:
    texts = [answer.words, *([answer.output] if answer.output else [])]
    return CallToolResult(content=[TextContent(type="text", text=text) for text in texts], is_error=is_error)


async def _within(work: Coroutine[Any, Any, T], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await work


async def _apart(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* in a task of its own, which is cancelled once and may then await its cleanup.

    anyio, by which the server cancels a call, would cancel every further await of the call as well.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task})
        raise
