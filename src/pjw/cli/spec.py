"""What `start` and `run` are told, as a JobSpec."""

import os
import re
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from pjw.cli import units
from pjw.errors import ConfigError, InvalidJobError, PjwError, describe_errno

if TYPE_CHECKING:
    from pjw.model import JobSpec

# Each option of a limit: where argparse puts it, the limits that it sets, how a value is worded.
_LIMITS: Final = {
    "cpus": ("cpu_max_millicores",),
    "memory": ("memory_max_bytes",),
    "pids": ("pids_max",),
    "io_read": ("io_rbps_max",),
    "io_write": ("io_wbps_max",),
    "iops": ("io_riops_max", "io_wiops_max"),
    "output": ("output_max_bytes",),
    "timeout": ("time_max_seconds",),
}
# Far above what a command may be given; a wrong path (/dev/zero) ends here.
_ENV_FILE_CHARACTERS_MAX: Final = 1024 * 1024
_BEYOND: Final = r"limit (\w+) must be at (most|least) (\d+)"


def spec_from(arguments: Namespace) -> "JobSpec":
    """The job that is asked for. Raises InvalidJobError or ConfigError."""
    from pjw.model import JobSpec

    words = arguments.command
    if words[:1] == ["--"]:
        words = words[1:]
    limits: dict[str, int] = {}
    for option, names in _LIMITS.items():
        value = getattr(arguments, option)
        if value is not None:
            limits |= dict.fromkeys(names, value)
    return JobSpec(
        words[0] if len(words) == 1 else words,
        limits,
        name=arguments.name or "",
        labels=dict(arguments.label),
        env=_environment(arguments),
        workdir=arguments.workdir or "",
        split_stderr=arguments.split_stderr,
        input=arguments.stdin is not None,
    )


def in_options(error: PjwError) -> PjwError:
    """An error about a limit, in the words of the option that asked for it; all others as they are."""
    found = re.search(_BEYOND, str(error))
    if not isinstance(error, InvalidJobError) or not found:
        return error
    limit, bound, value = found[1], found[2], int(found[3])
    option = "--" + next(name for name, limits in _LIMITS.items() if limit in limits).replace("_", "-")
    said = _in_words(limit, value)
    if bound == "most":
        return InvalidJobError(
            f"cannot start the job: {option} may be at most {said} on this server",
            hint=f"give {option} {said} or less; the operator's ceiling for {limit} is {value}",
        )
    return InvalidJobError(f"cannot start the job: {option} must be at least {said}, or 0 for no limit")


def _in_words(limit: str, value: int) -> str:
    if limit == "cpu_max_millicores":
        return f"{value / 1000:g}"
    if limit.endswith("seconds"):
        return units.duration_in_words(value)
    return units.size_in_words(value) if limit.endswith(("bytes", "bps_max")) else str(value)


def _environment(arguments: Namespace) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in arguments.env_file:
        _add(found, _lines(path))
    _add(found, arguments.env)
    return found


def _add(found: dict[str, str], entries: Iterable[str]) -> None:
    """Add `KEY=VALUE`, or `KEY` with the value that it has here; one that is not set here is left out."""
    for entry in entries:
        key, given, value = entry.partition("=")
        if given:
            found[key] = value
        elif key in os.environ:
            found[key] = os.environ[key]


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_ENV_FILE_CHARACTERS_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read --env-file {path}: {describe_errno(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read --env-file {path}: it is not UTF-8") from error
    if len(text) > _ENV_FILE_CHARACTERS_MAX:
        raise ConfigError(
            f"cannot read --env-file {path}: it is longer than {_ENV_FILE_CHARACTERS_MAX} characters"
        )
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]
