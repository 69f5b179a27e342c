"""The reference of the library, from its signatures and docstrings."""

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from typing import Final

import pjw
from pjw import errors

INTRODUCTION: Final = """\
# The library

`import pjw` offers these names; [the client library](../library.md) shows them in use. Times are in
UTC, sizes in bytes, durations in seconds, unless a name says otherwise (`_millicores`, `_usec`,
`_ns`).

`AsyncClient` has every method of `Client`, awaited, or as an asynchronous iterator or context
manager. `Worker` runs jobs in the process that uses it, as root, without a service
([architecture](../architecture.md)). It is in the wheel `pjw`; all else is in `pjw-client`.
"""
# The meaning of an argument's name, for each method whose own words do not say it.
ARGUMENTS: Final = {
    "after": "where to go on: the id, or the pair of names, at the end of the page before",
    "all_clients": "whether methods may look at jobs of other clients; only for the role viewer or admin",
    "array_id": "the id of an array, for its elements alone",
    "client_name": "the client that acts: its limits, its workspaces, its user id",
    "condition": "`ok`, `failed` or `any`: how another job must have ended",
    "config": "the command, variables and directory that an image brings along",
    "data": "bytes, or pieces of bytes in their order",
    "digest": "`sha256-` and 64 hexadecimal digits: the content of the image; empty: not known",
    "follow": "whether to follow the output until the job has ended",
    "grace_seconds": "seconds between SIGTERM and SIGKILL (signal(7)); None: the operator's",
    "ids": "ids of jobs; empty: all",
    "job_id": "a job: its id, its name, or an element as `17_5`; JobNotFoundError if there is none",
    "labels": "labels that a job must have, each with its value",
    "limit": "the most jobs, the newest; None: all",
    "most": "the most jobs in the answer",
    "name": "the name of a job, a workspace or an image",
    "newest_first": "whether the newest job comes first",
    "number": "the number of a session within its job",
    "offset": "the first byte of the output, from 0 on",
    "overrides": "limits by name, as a number, or as text with a unit: `256M`, `1h30m`",
    "owner": "the client whose jobs count; None: every client's",
    "path": "a path of the job, or of this machine, as the method says",
    "reconnect_seconds": "how many seconds a call tries to reach a server that is away",
    "request_id": "up to 64 printable characters; a call that is repeated with it does its work once",
    "seen": "called with the number of bytes that the other end has",
    "settings": "all settings of a worker, the new ones included",
    "since": "the time from which on to read output",
    "spec": "a `JobSpec`, or a command alone",
    "specs": "each a `JobSpec`, or a command alone",
    "stderr": "whether to read stderr, of a job that keeps it apart",
    "tail": "the number of last lines to begin with; None: from the offset on",
    "target": "a path of this machine, for the copy",
    "waiting": "the job of the queue that is started",
    "wanted": "filters: states, labels, a name",
    "watched": "filters: the jobs and labels to report",
}


def library() -> str:
    """Return the page of the library."""
    lines = [INTRODUCTION, "## Arguments\n", "| name | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in sorted(ARGUMENTS.items())]
    for name in pjw.__all__:
        lines += ["", *_class(getattr(pjw, name))]
    lines += ["", *_errors()]
    return "\n".join(lines) + "\n"


def public_methods(cls: type) -> Iterator[tuple[str, object]]:
    """Yield the methods of a class and of its bases of ours, by name."""
    for name, value in inspect.getmembers_static(cls):
        is_magic = name.startswith("_")
        plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not is_magic and inspect.isfunction(plain):
            yield name, plain
        elif not is_magic and isinstance(value, property):
            yield name, value


def _class(cls: type) -> Iterator[str]:
    yield f"## {cls.__name__}\n"
    yield f"{_prose(cls)}\n"
    if issubclass(cls, enum.Enum):
        yield f"Values: {', '.join(f'`{member.value}`' for member in cls)}.\n"
        return
    if dataclasses.is_dataclass(cls):
        yield "| field | type | default |\n| --- | --- | --- |"
        for field in dataclasses.fields(cls):
            kind = str(field.type).replace("|", "\\|")
            yield f"| `{field.name}` | `{kind}` | {_default(field)} |"
        yield ""
    elif cls.__init__ is not object.__init__:
        yield f"```python\n{cls.__name__}{_signature(cls.__init__)}\n```\n"
        if init := inspect.getdoc(cls.__init__):
            yield f"{init}\n"
    for name, method in public_methods(cls):
        if isinstance(method, property):
            yield f"### {cls.__name__}.{name}\n\n{_prose(method)}\n"
        else:
            awaited = "await " if inspect.iscoroutinefunction(method) else ""
            yield f"### {cls.__name__}.{name}\n"
            yield f"```python\n{awaited}{name}{_signature(method)}\n```\n"
            yield f"{_prose(method)}\n"


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "All are in `pjw.errors`, below `PjwError`. Some have a `hint`: a next step for a person.\n"
    yield "A class names the errors that each of its methods may raise. A method names the others.\n"
    yield "| error | meaning |\n| --- | --- |"
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.PjwError):
            yield f"| `{name}` | {' '.join((error.__doc__ or '').split())} |"


def _prose(value: object) -> str:
    """Return the docstring, with code marked where it stands between asterisks."""
    return re.sub(r"(?<![*\w])\*(\w+)\*", r"`\1`", inspect.getdoc(value) or "")


def _signature(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    kept = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    text = str(signature.replace(parameters=kept))
    return re.sub(r"\b(?:pjw|collections|datetime|typing)(?:\.[a-z_]+)*\.(?=[A-Za-z])", "", text)


def _default(field: "dataclasses.Field[object]") -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is dataclasses.MISSING else "empty"
