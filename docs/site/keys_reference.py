"""The reference of pjwd's configuration file, from the structs that decode it."""

import dataclasses
from collections.abc import Iterator
from typing import Final

import msgspec

from pjw.model import SUM_MINIMUM, Limits
from pjw.server.config import ServerConfig
from pjw.worker.settings import FLOOR, NO_CEILING

INTRODUCTION: Final = """\
# All keys of the configuration

`pjwd serve --config FILE` reads TOML. Every key is optional; an unknown one is an error.
[What the settings do](../configuration.md) explains them.
"""


def keys() -> str:
    """Return the page of all keys: those outside of a table first, then each table."""
    return "\n".join([INTRODUCTION, *_struct("", ServerConfig)])


def _struct(table: str, struct: type[msgspec.Struct]) -> Iterator[str]:
    described = msgspec.inspect.type_info(struct)
    assert isinstance(described, msgspec.inspect.StructType)
    tables: list[tuple[str, type[msgspec.Struct] | None]] = []
    if table:
        yield f"## [{table}]\n"
        yield f"{(struct.__doc__ or '').splitlines()[0]}\n"
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for field in described.fields:
        kind, text = _plain(field.type)
        name = f"{table}.{field.encode_name}".removeprefix(".")
        if isinstance(kind, msgspec.inspect.StructType):
            tables.append((name, kind.cls))
        elif isinstance(kind, msgspec.inspect.DictType):
            value, _ = _plain(kind.value_type)
            if isinstance(value, msgspec.inspect.StructType):
                tables.append((f"{name}.NAME", value.cls))
            else:
                tables.append((name, None))
        else:
            yield f"| `{field.encode_name}` | {_type(field.type)} | {_default(field)} | {text} |"
    yield ""
    for name, cls in tables:
        yield from _struct(name, cls) if cls else _limits(name)


def _limits(table: str) -> Iterator[str]:
    """Yield a table whose keys are the names of limits."""
    defaults = {"limits": Limits(), "ceilings": NO_CEILING, "floors": FLOOR}[table]
    yield f"## [{table}]\n"
    yield "| key | type | default |\n| --- | --- | --- |"
    for limit in dataclasses.fields(Limits):
        of_host = table == "ceilings" and limit.name in SUM_MINIMUM
        default = "all that the host has" if of_host else f"`{getattr(defaults, limit.name)}`"
        yield f"| `{limit.name}` | integer, at least 0 | {default} |"
    yield ""


def _plain(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, str]:
    """Return a type without its annotations, and its description."""
    if isinstance(kind, msgspec.inspect.Metadata):
        inner, text = _plain(kind.type)
        return inner, (kind.extra_json_schema or {}).get("description", text)
    return kind, ""


def _type(kind: msgspec.inspect.Type) -> str:
    """How a value of a type is written in TOML, and its bounds."""
    kind, _ = _plain(kind)
    match kind:
        case msgspec.inspect.UnionType(types):
            return " or ".join(
                _type(each) for each in types if not isinstance(each, msgspec.inspect.NoneType)
            )
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return _bounded("integer", kind)
        case msgspec.inspect.FloatType():
            return _bounded("number", kind)
        case msgspec.inspect.StrType():
            return "string"
        case msgspec.inspect.LiteralType(values):
            return " or ".join(f'`"{value}"`' for value in values)
        case _:
            item = getattr(kind, "item_type", None)
            assert item is not None, kind
            return f"list of {_type(item)}s"


def _bounded(word: str, kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    """Return a number and its bounds, without one that only keeps sums within 64 bits."""
    low, high = kind.ge, kind.le
    if kind.lt is not None:
        high = kind.lt - 1 if isinstance(kind, msgspec.inspect.IntType) else kind.lt
    if high is not None and high >= 2**53:
        high = None
    match low, high:
        case None, None:
            return word
        case _, None:
            return f"{word}, at least {low}"
        case None, _:
            return f"{word}, at most {high}"
        case _:
            return f"{word}, {low} to {high}"


def _default(field: msgspec.inspect.Field) -> str:
    value = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory() if callable(field.default_factory) else None
    if value is None or value in ((), "", frozenset()):
        return "none"
    return f"`{msgspec.json.encode(value).decode()}`"
