"""What `start` and `run` are told, as a JobSpec."""

import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Final

from pjw.cli import units
from pjw.errors import ConfigError, InvalidJobError, LimitRangeError, PjwError, describe_errno
from pjw.model import LIMIT_MAXIMUM, LIMIT_MINIMUM, JobSpec

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
_OPTION_OF: Final = {
    limit: "--" + option.replace("_", "-") for option, limits in _LIMITS.items() for limit in limits
}
# Far above what a command may be given; a wrong path (/dev/zero) ends here.
_ENV_FILE_CHARACTERS_MAX: Final = 1024 * 1024


def spec_from(arguments: Namespace) -> JobSpec:
    """The job that is asked for. Raises InvalidJobError or ConfigError."""
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
    if not isinstance(error, LimitRangeError) or error.limit not in _OPTION_OF:
        return error
    limit, least, most = error.limit, error.least, error.most
    option = _OPTION_OF[limit]
    if least is not None and least >= LIMIT_MAXIMUM:
        return InvalidJobError(
            f"cannot start the job: this server lets no client limit reads from disk ({option})",
            hint=f"leave it out, and limit writes with --io-write; the operator allows it by floors.{limit}",
        )
    if most is not None:
        said = units.limit_in_words(limit, most)
        return InvalidJobError(
            f"cannot start the job: {option} may be at most {said} on this server",
            hint=f"give {option} {said} or less; the operator's ceiling for {limit} is {most}",
        )
    if least is None:
        return error
    of_the_operator = least > LIMIT_MINIMUM.get(limit, 0)
    return InvalidJobError(
        f"cannot start the job: {option} must be at least {units.limit_in_words(limit, least)},"
        " or 0 for no limit",
        hint=f"the operator's floor for {limit} is {least}" if of_the_operator else None,
    )


def _environment(arguments: Namespace) -> dict[str, str]:
    from pjw.model import is_variable

    found: dict[str, str] = {}
    for path in arguments.env_file:
        for number, line in _lines(path):
            key = line.partition("=")[0]
            if not is_variable(key):
                raise InvalidJobError(
                    f"{path}, line {number}: {key[:80]!r} is no name of an environment variable",
                    hint="a line is KEY=VALUE, KEY for the value that it has here, or begins with #",
                )
            _add(found, [line])
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


def _lines(path: str) -> list[tuple[int, str]]:
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
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
