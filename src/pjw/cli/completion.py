"""Completion for bash, zsh and fish: the scripts, and the answers that they get.

A job is completed with its command beside it, where the shell shows that. After any error the answer is
empty: a shell has no place for words in the middle of a line.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from pjw.cli.connection import find_settings
from pjw.cli.units import SIGNALS
from pjw.errors import PjwError
from pjw.model import Job, JobState

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient

FORMATS: Final = ("table", "ids", "json", "jsonl")
# The user waits with a finger on the key.
DEADLINE_SECONDS: Final = 2.0
JOBS_MAX: Final = 100
DESCRIPTION_MAX: Final = 60

_RUNNING: Final = (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
# Only those jobs that the command can do something to.
_STATES: Final[Mapping[str, tuple[JobState, ...]]] = {
    "exec": (JobState.RUNNING,),
    "attach": (JobState.RUNNING,),
    "forward": (JobState.RUNNING,),
    "stop": (JobState.QUEUED, JobState.RUNNING, JobState.STOPPING),
    "wait": (JobState.QUEUED, *_RUNNING),
    "hold": (JobState.QUEUED,),
    "release": (JobState.QUEUED,),
    "rm": (JobState.EXITED, JobState.LOST),
}

Completer = Callable[..., Iterable[str] | Mapping[str, str]]


def print_script(arguments: argparse.Namespace) -> None:
    """Print the script that a shell reads to complete `pjw`."""
    from argcomplete.shell_integration import shellcode

    sys.stdout.write(shellcode(["pjw"], shell=arguments.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks, and end the process."""
    import argcomplete

    for action in _actions(parser):
        action.completer = _completer_of(action)  # type: ignore[attr-defined]
    # offer options only when the user has begun one, not where there is no job to offer
    argcomplete.autocomplete(parser, always_complete_options=False)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    # argparse has no other way to ask
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _actions(command)
        elif action.choices is None:
            # an action with choices is completed by itself
            yield action


def _completer_of(action: argparse.Action) -> Completer:
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    match action.metavar:
        case "JOB":
            return complete_jobs
        case "WORKSPACE":
            return complete_workspaces
        case "IMAGE":
            return complete_images
        case "CONTEXT":
            return complete_contexts
        case "FORMAT":
            return lambda **_: [*FORMATS, "template:"]
        case "SIGNAL":
            return lambda **_: list(SIGNALS)
        case "N|all":
            return lambda **_: ["all"]
        case "COMMAND|TOPIC":
            return complete_help
        case "FILE" | "CMD":
            files: Completer = FilesCompleter()
            return files
        case "DIR":
            directories: Completer = DirectoriesCompleter()
            return directories
        case _:
            # not SuppressCompleter, which would leave out the name of the option as well
            return _complete_nothing


def _complete_nothing(**_: object) -> tuple[str, ...]:
    """Complete no values that only the user knows: a name, a size, a time."""
    return ()


def complete_help(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Complete `pjw help`: commands and topics, and after a command its subcommands."""
    from pjw.cli.parser import build_parser, commands_of
    from pjw.cli.topics import TOPICS

    parser: argparse.ArgumentParser = build_parser()
    words = getattr(parsed_args, "words", None) or []
    for word in words:
        if word not in commands_of(parser):
            return []
        parser = commands_of(parser)[word]
    return [*commands_of(parser), *(() if words else TOPICS)]


def complete_contexts(prefix: str, **_: object) -> list[str]:
    """Complete the names of contexts."""
    from pjw.cli.contexts import context_names

    try:
        return list(context_names())
    except PjwError:
        return []


def complete_workspaces(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Complete the names of our workspaces."""
    try:
        return asyncio.run(_list_workspaces(parsed_args))
    except (PjwError, OSError, TimeoutError):
        return []


async def _list_workspaces(arguments: argparse.Namespace) -> list[str]:
    async with _connected(arguments) as client:
        return [each.name for each in await client.workspaces()]


def complete_images(parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Complete the names of images that our jobs can have."""
    try:
        return asyncio.run(_list_images(parsed_args))
    except (PjwError, OSError, TimeoutError):
        return []


async def _list_images(arguments: argparse.Namespace) -> list[str]:
    async with _connected(arguments) as client:
        return [each.name for each in await client.images()]


@asynccontextmanager
async def _connected(
    arguments: argparse.Namespace, *, everybody: bool = False
) -> "AsyncIterator[AsyncClient]":
    """Give a client with a deadline as short as the patience of a user who waits for a word."""
    from pjw.client.aio import AsyncClient

    settings = find_settings(arguments)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    async with asyncio.timeout(DEADLINE_SECONDS):
        async with AsyncClient(settings.server, *files, all_clients=everybody, reconnect_seconds=0) as client:
            yield client


def complete_jobs(prefix: str, parsed_args: argparse.Namespace, **_: object) -> dict[str, str]:
    """Complete the newest jobs: by id with a description, or by name when the user began one."""
    from pjw.cli.render import printable

    words = os.environ.get("COMP_LINE", "").split()[1:]
    states = next((_STATES[word] for word in words if word in _STATES), ())
    try:
        jobs = asyncio.run(_list(parsed_args, states))
    except (PjwError, OSError, TimeoutError):
        return {}
    by_name = prefix[:1].isalpha()
    found: dict[str, str] = {}
    for job in jobs:
        key = job.name if by_name else str(job.id)
        if key:
            found.setdefault(key, printable(f"{job.state}: {job.command}")[:DESCRIPTION_MAX])
    return found


async def _list(arguments: argparse.Namespace, states: Iterable[JobState]) -> list[Job]:
    async with _connected(arguments, everybody=bool(getattr(arguments, "all", False))) as client:
        return [job async for job in client.list(states=states, newest_first=True, limit=JOBS_MAX)]
