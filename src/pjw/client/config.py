"""The server and the identity to use when the caller gives none: from the environment and the user's file.

Each setting is taken from the nearest place that has it: an option, a context that is named, the variable
PJW_NAME, a bundle (PJW_BUNDLE, its path or its text), the current context (PJW_CONTEXT, or `current` of the
file), the file outside of any context. Never from a file of the server: a client and a server on one machine
are strangers.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pjw.certs.files import ClientCredentials
from pjw.errors import ConfigError
from pjw.given import DEFAULT_ADDRESS, require_value, require_values, server_address

# The address of a server, and the client's certificates.


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """The address to connect to, and the files that identify the client."""

    server: str
    ca_crt: str
    client_crt: str
    client_key: str

    def __post_init__(self) -> None:
        """Add the default port to the address. Raises ConfigError for a wrong address or an empty value."""
        for name in self.__slots__:
            require_value(name, getattr(self, name))
        object.__setattr__(self, "server", server_address(self.server))


KEYS: Final = ("server", "ca_crt", "client_crt", "client_key")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The contents of the user's file: settings, contexts by name, and the name of the current context."""

    settings: Mapping[str, str]
    contexts: Mapping[str, Mapping[str, str]]
    current: str | None

    def context(self, name: str) -> Mapping[str, str]:
        """Return a context by its name. Raises ConfigError when there is none."""
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
    environment = {key: _variable(f"PJW_{key.upper()}") for key in KEYS}
    chosen = chosen_context(file)
    # a context that is named is an option like the others
    named = file.context(require_value("the name of the context", context)) if context is not None else {}
    bundle = {} if context is not None else _settings_of_bundle(_variable("PJW_BUNDLE"))
    current = file.context(chosen) if chosen is not None and context is None and not bundle else {}
    found: dict[str, str] = {}
    for key in KEYS:
        sources = (options or {}, named, environment, bundle, current, file.settings)
        given = (source[key] for source in sources if source.get(key) is not None)
        if (value := next(given, None)) is not None:
            found[key] = value
    found.setdefault("server", DEFAULT_ADDRESS)
    for key in KEYS:
        if key not in found:
            option = None if options is None else "--" + key.replace("_", "-")
            raise ConfigError(f"no {option or key} is given", hint=_how_to_give(key, option, found))
    return ClientSettings(**found)


def chosen_context(file: ConfigFile) -> str | None:
    """Return the name of the current context; None if there is none. Raises ConfigError."""
    return _variable("PJW_CONTEXT") or file.current


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else require_value(f"the variable {name}", value)


def _settings_of_bundle(value: str | None) -> Mapping[str, str]:
    """Return the settings of a bundle. *value* is its path, or its text, as CI passes a secret to a job."""
    if value is None:
        return {}
    from pjw.certs.bundle import read_bundle
    from pjw.certs.files import InMemory

    path = InMemory("PJW_BUNDLE", value.encode()) if "-----BEGIN" in value else value
    return {"server": read_bundle(path).server, "ca_crt": path, "client_crt": path, "client_key": path}


def _how_to_give(key: str, option: str | None, found: Mapping[str, str]) -> str:
    ways = f"set PJW_{key.upper()}, or put {key} into {config_path()}"
    if option is not None:
        ways = f"give {option} FILE, {ways}"
    # A user who has set nothing yet is new here, and does best with a bundle.
    if not found.keys() & set(KEYS[1:]):
        return f"ask your operator for a bundle, and `pjw context add default NAME.pjw`; or {ways}"
    return ways


def config_path() -> str:
    """Return the path of the user's file (XDG Base Directory Specification)."""
    # not pathlib: its import is 3 % of a whole `pjw get`
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(directory, "pjw", "config.toml")


def read_config() -> ConfigFile:
    """Read the user's file; an absent one is empty. Raises ConfigError, which names file and fault."""
    path = config_path()
    values = _read_toml(path)
    current, contexts = values.pop("current", None), values.pop("contexts", {})
    require_values(path, {"current": current})
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
    require_values(place, values)
    for key, value in values.items():
        if key not in KEYS or not isinstance(value, str):
            raise ConfigError(
                f"{place}: {key} is not a setting with a text value",
                hint=f"it may hold {', '.join(KEYS)}" + (f"; {also}" if also else ""),
            )


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    import tomllib  # only a user with a file pays for its import

    try:
        return tomllib.loads(text)
    # not tomllib's own error alone: a number of 5,000 digits and "[[[[…" raise others
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: it is not TOML: {error}") from error


# Warns before the client's certificate or the server's authority expires: after that no call gets through.
#
# A program gets the warning as a line in its log, from the logger `pjw.client.config`. The command line warns
# in its own way (cli/connection.py), and turns this logger off.

log: Final = logging.getLogger(__name__)

# the certificates that we have checked for the log
_told: Final[set[bytes]] = set()


def ends_of(credentials: ClientCredentials) -> Iterator[str]:
    """Yield a sentence for each of a client's certificates that expires soon: when, and the remedy."""
    # this import takes a third of the time of a `pjw get`
    from pjw.certs.checks import describe_time, ends_soon, first_end

    for what, pem in (
        ("client certificate", credentials.crt_pem),
        ("certificate of the server's authority", credentials.ca_pem),
    ):
        try:
            end = first_end(pem)
        except ValueError:
            # the connection will report the fault of this certificate
            continue
        if ends_soon(end):
            yield (
                f"the {what} expires on {describe_time(end)}, and then pjw cannot connect:"
                " ask your operator for a new bundle"
            )


def log_ends(credentials: ClientCredentials) -> None:
    """Log a warning for each certificate that expires soon, once in the life of this process."""
    if not log.isEnabledFor(logging.WARNING) or credentials.crt_pem in _told:
        return
    _told.add(credentials.crt_pem)
    for words in ends_of(credentials):
        log.warning("%s", words)
