"""Which server, and with which certificates: options, then environment, then a file."""

import argparse
import os
from typing import Final

from pjw.client.settings import ClientSettings
from pjw.errors import ConfigError

DEFAULT_SERVER: Final = "localhost:50051"
_KEYS: Final = ("server", "ca_crt", "client_crt", "client_key")


def find_settings(arguments: argparse.Namespace) -> ClientSettings:
    """Gather the settings. Raises ConfigError that says which is missing and how to give it."""
    file = _read_file()
    found: dict[str, str] = {}
    for key in _KEYS:
        value = getattr(arguments, key) or os.environ.get(f"PJW_{key.upper()}") or file.get(key)
        if value:
            found[key] = value
    found.setdefault("server", DEFAULT_SERVER)
    for key in _KEYS:
        if key not in found:
            option = "--" + key.replace("_", "-")
            raise ConfigError(
                f"no {option} is given",
                hint=f"give {option} FILE, set PJW_{key.upper()}, or put {key} into {config_path()}",
            )
    return ClientSettings(**found)


def config_path() -> str:
    """The user's file (XDG Base Directory Specification)."""
    # not pathlib: its import is 3 % of a whole `pjw get`
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(directory, "pjw", "config.toml")


def _read_file() -> dict[str, str]:
    path = config_path()
    try:
        with open(path) as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    import tomllib  # only who has a file pays for its import

    try:
        values = tomllib.loads(text)
    # not tomllib's own error alone: a number of 5,000 digits and "[[[[…" raise others
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: it is not TOML: {error}") from error
    for key, value in values.items():
        if key not in _KEYS or not isinstance(value, str):
            raise ConfigError(
                f"{path}: {key} is not a setting with a text value", hint=f"it may hold {', '.join(_KEYS)}"
            )
    return values
