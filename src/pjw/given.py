"""Refuse empty values: a script that uses a variable which it never set passes one.

If pjw took an empty value for "not given", it would use another server than was meant. As a path, an empty
value would be the current directory.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pjw.errors import ConfigError

# a program that uses the library does not need argparse
if TYPE_CHECKING:
    import argparse


def require_value(what: str, value: str) -> str:
    """Return *value*. Raises ConfigError, which begins with *what*, when it is empty."""
    if not value:
        raise ConfigError(f"{what} is empty", hint="leave it out, or give it a value")
    return value


def require_values(place: str, values: Mapping[str, object]) -> None:
    """Refuse empty values in a table of a configuration; errors begin with *place*. Raises ConfigError."""
    for name in _empty_of("", values):
        require_value(f"{place}: {name}", "")


def require_arguments(parser: "argparse.ArgumentParser", arguments: "argparse.Namespace") -> None:
    """End the program with a usage error when an option or argument is empty.

    The command of a job may have empty words.
    """
    import argparse

    for action in _actions(parser):
        value = getattr(arguments, action.dest, None)
        if value == action.default or action.nargs == argparse.REMAINDER:
            continue
        if value == "" or (isinstance(value, list) and "" in value):
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            parser.error(f"argument {name}: it is empty; leave it out, or give it a value")


def _empty_of(name: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _empty_of(f"{name}.{key}" if name else key, member)
    elif isinstance(value, list):
        for number, member in enumerate(value):
            yield from _empty_of(f"{name}[{number}]", member)
    elif value == "":
        yield name


def _actions(parser: "argparse.ArgumentParser") -> "Iterator[argparse.Action]":
    import argparse

    # argparse has no public way to list them
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
