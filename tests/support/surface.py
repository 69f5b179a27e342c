"""The public surface of pjw as its own objects tell it: what docs/compatibility.md promises, line by line.

    python -m tests.support.surface

writes it into tests/data/surface (`scripts/record-surface`); unit/test_surface.py compares.
"""

import argparse
import asyncio
import dataclasses
import enum
import errno
import inspect
import io
import itertools
import json
import logging
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
from google.protobuf.descriptor import FieldDescriptor

import pjw
from pjw import errors, process, worker
from pjw.certs import authority
from pjw.cli import events, exits, options, parser, quota, render, stats
from pjw.client import config as client_config
from pjw.client.requests import UsageHistory
from pjw.model import (
    ClientQuota,
    EndReason,
    ExitStatus,
    GroupUse,
    Identity,
    Job,
    JobChange,
    JobState,
    Limits,
    Sums,
    Usage,
    UsageSample,
)
from pjw.rpc import status
from pjw.server import audit, effective, log_setup, metrics
from pjw.server import config as server_config
from pjw.server import main as pjwd
from pjw.server.connections import CAUSES, ConnectionNumbers
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part
from pjw.worker.input import InputWriter
from pjw.worker.metrics import ClientNumbers, WorkerNumbers

ROOT: Final = Path(__file__).parents[2]
RECORDED: Final = ROOT / "tests" / "data" / "surface"
_NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)


# --- Python

# Of these classes, which serve pjwd too, the members that programs may use.
_FOR_PROGRAMS: Final[Mapping[type, frozenset[str]]] = {
    pjw.Worker: frozenset(
        {"close", "delete", "get", "hold", "list", "logs", "open", "quota", "release", "start", "stop"}
        | {"submit", "usage_history", "wait", "write_input"}
        | {"connect", "exec", "resize", "wait_session", "stop_session"}
    ),
    InputWriter: frozenset({"write"}),
    Part: frozenset(),
}


def python() -> Iterator[str]:
    """The names of `pjw`, all errors, and every class of ours that one meets by way of these.

    A class without a module in front is met, but not to be imported.
    """
    named: dict[type, str] = {}
    for module in (pjw, errors, worker):
        for name in getattr(module, "__all__", vars(module)):
            kind = getattr(module, name)
            if isinstance(kind, type) and (module is not errors or issubclass(kind, errors.PjwError)):
                named.setdefault(kind, f"{module.__name__}.{name}")
    waiting = list(named)
    while waiting:
        kind = waiting.pop()
        met: list[type] = []
        yield from _class(named[kind], kind, met)
        for each in met:
            if each not in named:
                place = "pjw.model." if each.__module__.startswith("pjw.model.") else ""
                named[each] = f"{place}{each.__qualname__}"
                waiting.append(each)


def _class(name: str, kind: type, met: list[type]) -> Iterator[str]:
    if issubclass(kind, errors.PjwError):
        yield f"{name}({', '.join(base.__name__ for base in kind.__bases__)})"
        yield from (f"{name}.{fact}: {type_.__name__} | None" for fact, type_ in kind.FACTS.items())
        return
    methods = False
    if issubclass(kind, tuple):
        hints = typing.get_type_hints(kind)
        yield from (
            f"{name}.{field}, item {number}: {_type(hint, met)}"
            for number, (field, hint) in enumerate(hints.items(), 1)
        )
    elif issubclass(kind, enum.Enum):
        yield from (f"{name}.{member.name} = {member.value!r}" for member in kind)
    elif dataclasses.is_dataclass(kind):
        yield from _call(name, kind, kind.__init__, met)
    else:
        methods = True
        if kind not in _FOR_PROGRAMS:
            yield from _call(name, kind, kind.__init__, met)
    # of data the methods are pjw's own helpers
    for base in reversed(kind.__mro__):
        for member, thing in vars(base).items() if base.__module__.startswith("pjw.") else ():
            if member.startswith("_") or member not in _FOR_PROGRAMS.get(kind, {member}):
                continue
            if isinstance(thing, property):
                yield f"{name}.{member}: {_type(_hints(thing.fget).get('return'), met)}"
            elif methods and isinstance(thing, classmethod | staticmethod | types.FunctionType):
                function: Any = getattr(thing, "__func__", thing)
                yield from _call(f"{name}.{member}", function, function, met)


def _call(name: str, called: Callable[..., Any], annotated: Any, met: list[type]) -> Iterator[str]:
    """A line for the answer, and one for each parameter: its place, type and default.

    So another parameter is a line more, and changes none. Not str(Signature), which differs between Pythons.
    """
    hints = _hints(annotated)
    word = "async " if inspect.iscoroutinefunction(called) else ""
    yield f"{name}() -> {word}{_type(hints.get('return'), met)}"
    places = itertools.count(1)
    for each in inspect.signature(called).parameters.values():
        if each.name in ("self", "cls"):
            continue
        place = "by name" if each.kind is inspect.Parameter.KEYWORD_ONLY else str(next(places))
        default = "" if each.default is each.empty else f" = {_default(each.default)}"
        yield f"{name}({each.name}, {place}): {_type(hints.get(each.name), met)}{default}"


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:
        # what is imported for a type checker alone keeps the name that it has in the source
        return dict(inspect.get_annotations(function))


def _default(value: object) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    # of a dataclass only that there is one: its own line has more
    return "…" if dataclasses.is_dataclass(value) or "factory" in repr(value) else repr(value)


def _type(hint: Any, met: list[type]) -> str:
    """A type as it is written, the same in each Python. Our own classes are added to *met*."""
    if hint in (None, types.NoneType):
        return "None"
    if isinstance(hint, str) or hint is Ellipsis:
        return "..." if hint is Ellipsis else str(hint)
    if isinstance(hint, list):
        return f"[{', '.join(_type(each, met) for each in hint)}]"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(arguments[0], met)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(each, met) for each in arguments)
    if origin is not None:
        return f"{_type(origin, met)}[{', '.join(_type(each, met) for each in arguments)}]"
    name = getattr(hint, "__qualname__", getattr(hint, "__name__", str(hint)))
    if isinstance(hint, type) and hint.__module__.startswith("pjw."):
        met.append(hint)
    return str(name)


# --- the contract


def proto() -> Iterator[str]:
    """Methods, fields and values with their numbers and types."""
    contract = pb.DESCRIPTOR
    yield f"package {contract.package}"
    for service in contract.services_by_name.values():
        for method in service.methods:
            asked = f"{'stream ' * method.client_streaming}{method.input_type.name}"
            told = f"{'stream ' * method.server_streaming}{method.output_type.name}"
            yield f"{service.name}.{method.name}({asked}) returns ({told})"
    for message in contract.message_types_by_name.values():
        yield f"message {message.name}"
        for field in message.fields:
            yield f"{message.name}.{field.name} = {field.number}: {_field(field)}"
    for kind in contract.enum_types_by_name.values():
        yield from (f"{kind.name}.{value.name} = {value.number}" for value in kind.values)


_TYPES: Final = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def _field(field: FieldDescriptor) -> str:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        return f"map<{', '.join(_field(each) for each in inner.fields)}>"
    named = inner or field.enum_type
    text = named.full_name if named is not None else _TYPES[field.type]
    if field.is_repeated:
        return f"repeated {text}"
    one_of = field.containing_oneof
    if one_of is None:
        return text
    # `optional` is a oneof of a single field, whose name the compiler makes
    return f"optional {text}" if one_of.name == f"_{field.name}" else f"{text}, one of {one_of.name}"


def wire() -> Iterator[str]:
    """What goes beside the messages: errors by name with code and facts, and the metadata."""
    for row in status.TABLE:
        yield f"reason {row.reason}: {row.code.name}"
        yield from (f"reason {row.reason}, {name}: {kind.__name__}" for name, kind in row.kind.FACTS.items())
    for name in ("ERROR_KEY", "HINT_KEY", "ERRNO_KEY", "ADMITTED_KEY"):
        yield f"metadata {getattr(status, name)}"


# --- programs


def cli() -> Iterator[str]:
    """Each command with its arguments and options: how many values an option takes, and which."""
    yield from _command(parser.build_parser())
    yield from _command(pjwd.build_parser())


def _command(command: argparse.ArgumentParser) -> Iterator[str]:
    name = command.prog
    arguments = ""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from _command(inner)
        elif not isinstance(action, argparse._HelpAction):
            values = _VALUES[action.nargs if action.nargs is not None else 1]
            repeated = ", repeated" * isinstance(action, argparse._AppendAction)
            required = ", required" * (action.required and bool(action.option_strings))
            for option in action.option_strings:
                yield f"{name} {option}{values}{repeated}{required}"
            shown = str(action.metavar or action.dest)
            if not action.option_strings:
                arguments += values.replace("VALUE", shown)
            for choice in action.choices or ():
                yield f"{name} {action.option_strings[-1] if action.option_strings else shown} {choice}"
    yield f"{name}{arguments}"
    if name == "pjw list":
        yield from (f"pjw list --format {each}" for each in (*options.FORMATS, "template:"))


_VALUES: Final[Mapping[int | str, str]] = {
    0: "", 1: " VALUE", "?": " [VALUE]", "*": " [VALUE]…", "+": " VALUE…", "...": " [VALUE]…",
}  # fmt: skip


def exit_codes() -> Iterator[str]:
    """The codes of both programs, and which one an error of the library becomes."""
    for program, module in (("pjw", exits), ("pjw", process), ("pjwd", pjwd), ("pjwd", process)):
        for name, value in vars(module).items():
            if name.startswith("EXIT_") and (module in (exits, pjwd) or name == "EXIT_CLOSED_PIPE"):
                yield f"{program} {name.removeprefix('EXIT_').lower()}: {value}"
    for program, build in (("pjw", parser.build_parser), ("pjwd", pjwd.build_parser)):
        try:
            with redirect_stderr(io.StringIO()):
                build().parse_args(["--nosuch"])
        except SystemExit as wrong:
            yield f"{program} usage: {wrong.code}"
    for kind in (each for each in vars(errors).values() if isinstance(each, type)):
        if not issubclass(kind, errors.PjwError):
            continue
        error = kind.restored("", None, {"errno": errno.EACCES})
        yield f"pjw after {kind.__name__}: {exits.exit_code_of(error)}"
    missing = errors.LaunchError("x", errno.ENOENT)
    yield f"pjw after LaunchError with ENOENT: {exits.exit_code_of(missing)}"


def variables() -> Iterator[str]:
    """Environment variables of our own."""
    yield from (f"PJW_{key.upper()}" for key in client_config.KEYS)
    for path in (ROOT / "src" / "pjw").rglob("*.py"):
        yield from re.findall(r'"(PJWD?_[A-Z]+)"', path.read_text())


# --- JSON


def json_keys() -> Iterator[str]:
    """The members of what the programs print as JSON, with the types that their values can have."""
    some, other, waiting = _jobs()
    yield from _members("job", [render.members(each) for each in (some, other, waiting)])
    changes = (JobChange(some), JobChange(some, 1, _NOW, removed=True))
    yield from _members("event", [{**json.loads(events.json_line(each)), "job": {}} for each in changes])
    sample = UsageSample(_NOW, 1, 1, 1, 1, 1)
    told = [json.loads(stats._json(UsageHistory(each, [sample]))) for each in (some, other)]
    yield from _members("stats", [{**each, "job": {}} for each in told])
    limits = Limits()
    whose = ClientQuota("alice", limits, limits, Sums(), 1, 1, 1, 1, 1, 1, 1, 1, GroupUse())
    yield from _members("quota", [quota.members(whose)])
    setting = effective.Setting("KEY", None, "default", "words")
    yield from _members("config", [json.loads(effective.as_json([setting]))])
    yield from _members("audit", _audit_lines())
    record = logging.LogRecord("pjw", logging.INFO, "", 0, "words", (), None)
    bug = logging.LogRecord("pjw", logging.INFO, "", 0, "words", (), (ValueError, ValueError(), None))
    said = [json.loads(log_setup.JsonFormatter().format(each)) for each in (record, bug)]
    yield from _members("log", said)
    yield from (f"state {state}" for state in JobState)
    yield from (f"reason {reason}" for reason in EndReason)


def _jobs() -> tuple[Job, ...]:
    """A job that has ended, with all that one can have, one that has just begun, and one that waits."""
    usage = Usage(1, 1, 1, 1, 1)
    ended = Job(
        1, "alice", "x", JobState.EXITED, Limits(), _NOW, _NOW, ExitStatus.of(None, 15), EndReason.STOPPED,
        usage, 1, "name", {"KEY": "value"}, split_stderr=True, input=True, detail="words", queued=_NOW,
    )  # fmt: skip
    waiting = Job(3, "alice", "x", JobState.QUEUED, Limits(), _NOW, queued=_NOW, not_before=_NOW, held=True)
    return ended, Job(2, "alice", "x", JobState.STARTING, Limits(), _NOW), waiting


def _audit_lines() -> list[Any]:
    """A line of a gateway's call for a client, and of one that nobody has a name for."""
    known = audit.CallRecord("Logs", pb.LogsRequest(id=1), "ipv4:127.0.0.1:1")
    known.identity = Identity("alice", 1)
    known.for_client = "bob"
    return [json.loads(each.line()) for each in (known, audit.CallRecord("List", None, "ipv4:127.0.0.1:1"))]


def _members(name: str, told: list[Any]) -> Iterator[str]:
    """A line for each member; `?` behind its name: it is not always there."""
    objects = [each for each in told if isinstance(each, dict)]
    if not objects:
        return
    for key in dict.fromkeys(key for each in objects for key in each):
        values = [each[key] for each in objects if key in each]
        kinds = " | ".join(dict.fromkeys(_json_type(value) for value in values))
        yield f"{name}.{key}{'?' * (len(values) < len(objects))}: {kinds}"
        inner = [one for value in values for one in (value if isinstance(value, list) else [value])]
        yield from _members(f"{name}.{key}{'[]' * isinstance(values[0], list)}", inner)


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", types.NoneType: "null"}
    return names.get(type(value), "number")


# --- pjwd


def config() -> Iterator[str]:
    """Each key of pjwd's configuration and of a user's file, with its type; a default may change."""
    yield from _keys("", server_config.ServerConfig)
    for name in ("limits", "ceilings", "floors"):
        yield from (f"{name}.{field.name}: int" for field in dataclasses.fields(Limits))
    for key in client_config.KEYS:
        yield f"~/.config/pjw/config.toml {key}: str"
        yield f"~/.config/pjw/config.toml contexts.NAME.{key}: str"
    yield "~/.config/pjw/config.toml current: str"


def _keys(table: str, struct: type[msgspec.Struct]) -> Iterator[str]:
    for name, hint in typing.get_type_hints(struct).items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from _keys(f"{table}{name}.", hint)
        elif name in ("by_name", "mounts"):
            yield from _keys(f"{table}{name}.NAME.", typing.get_args(hint)[1])
        elif typing.get_origin(hint) is not dict:
            yield f"{table}{name}: {_type(hint, [])}"


def metric_names() -> Iterator[str]:
    """Each family with its type and labels, and the values of those labels that have a closed set."""
    return iter(asyncio.run(_families()))


async def _families() -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        paths = authority.init_directory(directory)
        [crt] = [Path(path).read_bytes() for path in paths if path.endswith(".crt")]
    reloader = SimpleNamespace(
        config=server_config.ServerConfig(),
        credentials=SimpleNamespace(crt_pem=crt, ca_pem=crt),
        counts={("certificates", result): 0 for result in ("ok", "failed")},
    )
    told = _Told(cast("Any", None), cast("Any", None), cast("Any", SimpleNamespace(lost_lines=0)))
    told.registry.register(metrics.StateCollector(told, cast("Any", reloader)))
    record = audit.CallRecord("Start", pb.StartRequest(), "ipv4:127.0.0.1:1")
    told.call_began(record)
    told.call_ended(record)
    lines: list[str] = []
    for family in told.registry.collect():
        if not family.name.startswith("pjw"):
            continue
        labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
        names = sorted({sample.name for sample in family.samples})
        shown = f"{{{', '.join(labels)}}}" if labels else ""
        lines += [f"{name}{shown}: {family.type}" for name in names]
        for label in {"reason", "state", "result", "limit"} & labels.keys():
            values = dict.fromkeys(sample.labels[label] for sample in family.samples)
            lines += [f"{family.name} {label} {value}" for value in values]
    return lines


class _Told(metrics.ServerMetrics):
    """Metrics of a pjwd that has one of everything."""

    def numbers(self) -> tuple[WorkerNumbers, dict[str, int], Any]:
        clients = {"alice": ClientNumbers(1, 1, 1)}
        return WorkerNumbers({}, {}, clients, 1, 1, 0, launcher_up=True), {"Logs": 1}, self._bytes

    def connections(self) -> ConnectionNumbers:
        return ConnectionNumbers(accepted=1, open=1, unproven=0, closed=dict.fromkeys(CAUSES, 0))


KINDS: Final[Mapping[str, Callable[[], Iterator[str]]]] = {
    "cli": cli,
    "config": config,
    "environment": variables,
    "exit-codes": exit_codes,
    "json": json_keys,
    "metrics": metric_names,
    "proto": proto,
    "python": python,
    "wire": wire,
}


def lines_of(kind: str) -> list[str]:
    """The lines of one kind as they are now."""
    return sorted(set(KINDS[kind]()))


def record() -> None:
    """Write all of it."""
    RECORDED.mkdir(exist_ok=True)
    for kind in KINDS:
        (RECORDED / f"{kind}.txt").write_text("".join(f"{line}\n" for line in lines_of(kind)))


if __name__ == "__main__":
    record()
