"""The effective configuration: each key with its value, its origin, and its meaning.

`pjwd config show` prints it. The output as TOML is a configuration file again.
"""

import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, get_args, get_origin

import msgspec

from pjw.model import LIMIT_WORDS
from pjw.server.config import ServerConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `origin` is `default`, `file` or `option`."""

    key: str
    value: object
    origin: str
    description: str


def settings_of(
    config: ServerConfig, in_file: Mapping[str, object], options: Mapping[str, object]
) -> list[Setting]:
    """Return every key of a configuration that was made from these."""
    descriptions = describe_keys()
    values = msgspec.to_builtins(config, order="deterministic")
    for table, limits in zip(("limits", "ceilings", "floors"), config.effective_limits(), strict=True):
        values[table] = dict(limits.items())
    return [
        Setting(
            key,
            value,
            _origin(key, in_file, options),
            # one of the operator's own names, in a table of such
            descriptions.get(key) or descriptions[key.partition(".")[0]],
        )
        for key, value in _flat(values, descriptions)
    ]


def _flat(
    values: Mapping[str, object], descriptions: Mapping[str, str], table: str = ""
) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        name = f"{table}{key}"
        is_table = not table or any(each.startswith(f"{name}.") for each in descriptions)
        if isinstance(value, dict) and value and is_table:
            yield from _flat(value, descriptions, f"{name}.")
        else:
            yield name, value


def _origin(key: str, in_file: Mapping[str, object], options: Mapping[str, object]) -> str:
    if key in options:
        return "option"
    table, _, name = key.rpartition(".")
    there: object = in_file
    for part in table.split(".") if table else ():
        there = there.get(part, {}) if isinstance(there, Mapping) else {}
    return "file" if isinstance(there, Mapping) and name in there else "default"


def describe_keys() -> dict[str, str]:
    """Return the meaning of each key, by its name with its table's in front."""
    found = dict(_described(ServerConfig))
    del found["limits"], found["ceilings"], found["floors"]
    for name, (_, words) in LIMIT_WORDS.items():
        found[f"limits.{name}"] = f"what a job gets unless its client asks for another: {words}"
        found[f"ceilings.{name}"] = f"the most that a client may ask for: {words}"
        found[f"floors.{name}"] = f"the least that a client may ask for: {words}"
    return found


def _described(struct: type[msgspec.Struct], table: str = "") -> Iterator[tuple[str, str]]:
    for name, hint in typing.get_type_hints(struct, include_extras=True).items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from _described(hint, f"{table}{name}.")
        elif get_origin(hint) is Annotated:
            metas = [meta for meta in get_args(hint)[1:] if isinstance(meta, msgspec.Meta)]
            yield f"{table}{name}", next(meta.description for meta in metas if meta.description)


def as_toml(settings: list[Setting], path: str | None) -> str:
    """Format a configuration file with these values, each followed by a comment about its origin."""
    lines: list[str] = []
    table = ""
    for setting in settings:
        inside, _, name = setting.key.rpartition(".")
        if inside != table:
            lines += ["", f"[{inside}]"]
            table = inside
        origin = f"file {path}" if setting.origin == "file" else setting.origin
        # TOML has no word for "none": a comment in its place keeps the file one that can be read
        shown = f"# {name} =" if setting.value is None else f"{name} = {_toml(setting.value)}"
        lines.append(f"{shown}  # {origin}: {setting.description}")
    return "\n".join(lines) + "\n"


def as_json(settings: list[Setting]) -> str:
    """Format an object with a member for each key."""
    members = {
        setting.key: {
            "value": setting.value,
            "origin": setting.origin,
            "description": setting.description,
        }
        for setting in settings
    }
    return json.dumps(members, indent=2) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(key)} = {_toml(each)}' for key, each in value.items())}}}"
    # JSON's forms of a number, a truth and a string are TOML's, but for one character
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
