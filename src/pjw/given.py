"""Values that a person gives: none is empty, and the address of a server has a host and a port."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pjw.errors import ConfigError

# a program that uses the library does not need argparse
if TYPE_CHECKING:
    import argparse

import re
from typing import Final


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


# The address of a server, as a person writes it. Standard library only.

DEFAULT_PORT: Final = 50051
# the default address: pjwd listens there, and clients connect to it
DEFAULT_ADDRESS: Final = f"localhost:{DEFAULT_PORT}"
# a name, an address of IPv4, or one of IPv6 in brackets, with its zone (fe80::1%eth0)
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?", re.ASCII)


def server_address(text: str) -> str:
    """Return HOST:PORT for an address that may lack its port. Raises ConfigError."""
    found = _ADDRESS.fullmatch(require_value("the address of the server", text))
    if found is None or not 0 < int(found[2] or DEFAULT_PORT) < 65_536:
        raise ConfigError(f"{text[:80]!r} is no server's HOST:PORT", hint=_hint(text))
    return f"{found[1]}:{found[2] or DEFAULT_PORT}"


def host_of(address: str) -> str:
    """Return the host of HOST:PORT, without brackets."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _hint(text: str) -> str:
    if "://" in text:
        return f"leave out {text.partition('://')[0][:20]}://"
    if text.count(":") > 1 and "[" not in text:
        return f"an address of IPv6 is in brackets: [::1]:{DEFAULT_PORT}"
    return f"for example jobs.example.org:{DEFAULT_PORT}, or jobs.example.org for the port {DEFAULT_PORT}"
