"""The options of `start` and `run`, as a JobSpec."""

import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Final

from pjw.cli import units
from pjw.errors import ConfigError, InvalidJobError, LimitRangeError, PjwError, describe_errno
from pjw.model import (
    LIMIT_MAXIMUM,
    LIMIT_MINIMUM,
    JobSpec,
    QueueSpec,
    Retry,
    TerminalSize,
    is_variable,
)

# For each option of a limit, by its attribute in argparse's result: the limits that it sets.
LIMITS: Final = {
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
    limit: "--" + option.replace("_", "-") for option, limits in LIMITS.items() for limit in limits
}
# Far more than an environment needs: it bounds the reading of a wrong path such as /dev/zero.
_ENV_FILE_CHARACTERS_MAX: Final = 1024 * 1024


def spec_from(arguments: Namespace) -> JobSpec:
    """Make the spec of the requested job. Raises InvalidJobError or ConfigError."""
    limits: dict[str, int] = {}
    for option, names in LIMITS.items():
        value = getattr(arguments, option)
        if value is not None:
            limits |= dict.fromkeys(names, value)
    terminal = terminal_size(arguments)
    return JobSpec(
        words_of(arguments.command),
        limits,
        name=arguments.name or "",
        labels=dict(arguments.label),
        env=environment(arguments, terminal),
        workdir=arguments.workdir or "",
        split_stderr=arguments.split_stderr,
        outputs=arguments.outputs,
        output_required=arguments.output_required,
        input=arguments.stdin is not None,
        terminal=terminal,
        queue=_queue(arguments),
        secrets=secrets(arguments),
        workspace=arguments.workspace or "",
        exclusive=arguments.exclusive,
        image=arguments.image or "",
        read_only=arguments.read_only,
        mounts=arguments.mounts,
        allow=arguments.allow,
        link=arguments.link or "",
        gpus=arguments.gpus,
        node=arguments.node or "",
        partition=arguments.partition or "",
        constraint=arguments.constraint or "",
    )


def _queue(arguments: Namespace) -> QueueSpec | None:
    """Return the job's conditions for the queue; None for a start at once. One option implies the queue."""
    given = {
        "priority": arguments.priority,
        "not_before": arguments.not_before,
        "held": arguments.hold or None,
        "after": arguments.after,
        "array": arguments.array,
        "retry": retry_from(
            arguments.retry,
            arguments.retry_on or frozenset(),
            arguments.backoff,
            if_lost=arguments.rerun_if_lost,
        ),
    }
    asked = {name: value for name, value in given.items() if value is not None}
    return QueueSpec(**asked) if asked or arguments.queue else None


def retry_from(
    times: int | None, ends: frozenset[str], backoff_seconds: float | None, *, if_lost: bool
) -> Retry | None:
    """Return the further attempts of a job, if there are any. Raises InvalidJobError."""
    if times is None and not if_lost:
        if ends or backoff_seconds is not None:
            raise InvalidJobError("--retry-on and --backoff need --retry", hint="--retry 3")
        return None
    backoff = {} if backoff_seconds is None else {"backoff_seconds": backoff_seconds}
    return Retry(
        times or 0,
        frozenset(int(each) for each in ends if each.isdecimal()),
        oom="oom" in ends,
        timeout="timeout" in ends,
        if_lost=if_lost,
        **backoff,
    )


def in_options(error: PjwError) -> PjwError:
    """Word an error about a limit after the option that set the limit; return all others as they are."""
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


def words_of(command: list[str]) -> str | list[str]:
    """Return a shell command, which is one word, or a program with its arguments."""
    words = command[1:] if command[:1] == ["--"] else command
    return words[0] if len(words) == 1 else words


def terminal_size(arguments: Namespace) -> TerminalSize | None:
    """Return the size of ours for the requested terminal; None when none is requested."""
    if not arguments.terminal:
        return None
    # only for -t
    from pjw.cli.local_terminal import size

    return size()


def environment(arguments: Namespace, terminal: TerminalSize | None = None) -> dict[str, str]:
    """Return the requested variables, and our kind of terminal. Raises InvalidJobError or ConfigError."""
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
    if terminal is not None and "TERM" in os.environ:
        found.setdefault("TERM", os.environ["TERM"])
    return found


def secrets(arguments: Namespace) -> dict[str, str]:
    """Return the requested secrets. Raises InvalidJobError or ConfigError, whose words hold no secret."""
    given = [("--secret", entry) for entry in arguments.secret]
    for path in arguments.secret_file:
        given = [
            *((f"{path}, line {number}", line) for number, line in _lines(path, "--secret-file")),
            *given,
        ]
    found: dict[str, str] = {}
    for where, entry in given:
        key, equals, value = entry.partition("=")
        if not is_variable(key):
            raise InvalidJobError(
                f"{where}: that is not the name of an environment variable",
                hint="a secret is KEY=VALUE, or KEY for the value here",
            )
        if not equals and key not in os.environ:
            raise InvalidJobError(f"{where}: the variable {key} is not set here, so the job would lack it")
        found[key] = value if equals else os.environ[key]
    return found


def _add(found: dict[str, str], entries: Iterable[str]) -> None:
    """Add `KEY=VALUE`, or `KEY` with the value that it has here; leave out one that is not set here."""
    for entry in entries:
        key, given, value = entry.partition("=")
        if given:
            found[key] = value
        elif key in os.environ:
            found[key] = os.environ[key]


def _lines(path: str, option: str = "--env-file") -> list[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_ENV_FILE_CHARACTERS_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {option} {path}: {describe_errno(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {option} {path}: it is not UTF-8") from error
    if len(text) > _ENV_FILE_CHARACTERS_MAX:
        raise ConfigError(
            f"cannot read {option} {path}: it is longer than {_ENV_FILE_CHARACTERS_MAX} characters"
        )
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
