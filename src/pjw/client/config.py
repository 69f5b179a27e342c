"""Where to connect to, and as whom, when nobody says it: the environment and the user's file.

Each setting is taken from the nearest place that has it: an option, a context that is named, the variable
PJW_NAME, the current context (PJW_CONTEXT, or `current` of the file), the file outside of any context. Never
in a file of the server: a client and a server on one machine are strangers.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pjw.client.settings import ClientSettings
from pjw.errors import ConfigError

DEFAULT_SERVER: Final = "localhost:50051"
KEYS: Final = ("server", "ca_crt", "client_crt", "client_key")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What is in the user's file: settings, contexts by name, and which of these is the current one."""

    settings: Mapping[str, str]
    contexts: Mapping[str, Mapping[str, str]]
    current: str | None

    def context(self, name: str) -> Mapping[str, str]:
        """A context by its name. Raises ConfigError when there is none."""
        if name not in self.contexts:
            known = ", ".join(sorted(self.contexts))
            raise ConfigError(
                f"no context {name!r} is in {config_path()}",
                hint=f"there are: {known}"
                if known
                else "`pjw context add NAME FILE` makes one from a bundle",
            )
        return self.contexts[name]


def find_settings(
    context: str | None = None, options: Mapping[str, str | None] | None = None
) -> ClientSettings:
    """Gather the settings; *options* are those of a command line, where there is one.

    Raises ConfigError that says which is missing and how to give it.
    """
    file = read_config()
    environment = {key: os.environ.get(f"PJW_{key.upper()}") for key in KEYS}
    chosen = os.environ.get("PJW_CONTEXT") or file.current
    # a context that is named is an option like the others
    named = file.context(context) if context else {}
    current = file.context(chosen) if chosen and not context else {}
    found: dict[str, str] = {}
    for key in KEYS:
        sources = (options or {}, named, environment, current, file.settings)
        if value := next(filter(None, (source.get(key) for source in sources)), None):
            found[key] = value
    found.setdefault("server", DEFAULT_SERVER)
    for key in KEYS:
        if key not in found:
            option = None if options is None else "--" + key.replace("_", "-")
            raise ConfigError(f"no {option or key} is given", hint=_how_to_give(key, option, found))
    return ClientSettings(**found)


def _how_to_give(key: str, option: str | None, found: Mapping[str, str]) -> str:
    ways = f"set PJW_{key.upper()}, or put {key} into {config_path()}"
    if option is not None:
        ways = f"give {option} FILE, {ways}"
    # who has given nothing yet is new here, and does best with a bundle
    if not found.keys() & set(KEYS[1:]):
        return f"ask your operator for a bundle, and `pjw context add default NAME.pjw`; or {ways}"
    return ways


def config_path() -> str:
    """The user's file (XDG Base Directory Specification)."""
    # not pathlib: its import is 3 % of a whole `pjw get`
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(directory, "pjw", "config.toml")


def read_config() -> ConfigFile:
    """The user's file, or an empty one. Raises ConfigError, which names it and what it should not hold."""
    path = config_path()
    values = _read_toml(path)
    current, contexts = values.pop("current", None), values.pop("contexts", {})
    if not isinstance(current, str | None):
        raise ConfigError(f"{path}: current is not the name of a context")
    if not isinstance(contexts, dict):
        raise ConfigError(f"{path}: contexts is not a table of contexts")
    _check_keys(path, values, "current and tables [contexts.NAME]")
    for name, context in contexts.items():
        if not isinstance(context, dict):
            raise ConfigError(
                f"{path}: context {name} is not a table", hint=f"begin it with [contexts.{name}]"
            )
        _check_keys(f"{path}: context {name}", context)
    return ConfigFile(values, contexts, current)


def _check_keys(place: str, values: Mapping[str, object], also: str | None = None) -> None:
    for key, value in values.items():
        if key not in KEYS or not isinstance(value, str):
            raise ConfigError(
                f"{place}: {key} is not a setting with a text value",
                hint=f"it may hold {', '.join(KEYS)}" + (f"; {also}" if also else ""),
            )


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    import tomllib  # only who has a file pays for its import

    try:
        return tomllib.loads(text)
    # not tomllib's own error alone: a number of 5,000 digits and "[[[[…" raise others
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: it is not TOML: {error}") from error
