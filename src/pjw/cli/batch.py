"""`pjw submit`: put the jobs of a file into the queue, all or none. The format of such a file."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from pjw.cli import units
from pjw.cli.connection import connect
from pjw.cli.spec import LIMITS, retry_from, secrets
from pjw.errors import ConfigError, InvalidJobError, PjwError, describe_errno
from pjw.model import After, Condition, JobSpec, QueueSpec, Retry

T = TypeVar("T")

# the most that one message carries
_FILE_BYTES_MAX: Final = 4 * 1024**2
# how a limit is typed: the same as its option
_TYPED: Final[Mapping[str, Callable[[str], int]]] = {
    "cpus": units.millicores,
    "memory": units.size,
    "pids": units.count,
    "io_read": units.size,
    "io_write": units.size,
    "iops": units.count,
    "output": units.size,
    "timeout": units.whole_seconds,
}
_TEXTS: Final = ("name", "workdir", "workspace", "image", "link", "node", "partition", "constraint")
_FLAGS: Final = ("split_stderr", "hold", "rerun_if_lost", "exclusive", "output_required", "read_only")
_RETRY: Final = ("retry", "retry_on", "backoff")
_WAITS: Final = ("priority", "not_before", "after", "array")
_TABLES: Final = ("env", "labels")
_LISTS: Final = ("outputs", "mounts", "allow")
KEYS: Final = ("command", "gpus", *_LISTS, *_TEXTS, *_FLAGS, *_TABLES, *_WAITS, *_RETRY, *_TYPED)


def submit_file(arguments: argparse.Namespace) -> None:
    """Put the jobs of a file into the queue; print the id of each, in the order of the file."""
    given = secrets(arguments)
    specs = [replace(spec, secrets=given) for spec in read_jobs(arguments.file)]
    with connect(arguments) as client:
        if arguments.upload:
            # only for --upload
            from pjw.cli.copy import upload

            name = upload(client, arguments.upload)
            specs = [replace(spec, upload=name) for spec in specs]
        if arguments.outputs:
            # these come on top of the outputs that the file names
            specs = [replace(spec, outputs=[*spec.outputs, *arguments.outputs]) for spec in specs]
        if arguments.output_required:
            specs = [replace(spec, output_required=True) for spec in specs]
        for job in client.submit(specs):
            print(job.id)


def read_jobs(path: str) -> list[JobSpec]:
    """Read the jobs of a file: a line of JSON for each, or TOML with a table [[job]] for each.

    `-` is stdin, with lines of JSON. Raises ConfigError that names the file and the job.
    """
    data = _read(path)
    jobs = _of_toml(path, data) if path.endswith(".toml") else _of_lines(path, data)
    if not jobs:
        raise ConfigError(f"{path} has no jobs", hint="a job is a line of JSON, or a table [[job]] of TOML")
    specs: list[JobSpec] = []
    # the place of each job with a name, for jobs that wait for it
    named: dict[str, int] = {}
    for place, (where, job) in enumerate(jobs):
        try:
            specs.append(_spec(job, named))
        except (argparse.ArgumentTypeError, PjwError, ValueError) as error:
            raise ConfigError(f"{path}, {where}: {error}") from None
        if specs[-1].name:
            named[specs[-1].name] = place
    return specs


def _read(path: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {describe_errno(error.errno or 0)}") from error
    if len(data) > _FILE_BYTES_MAX:
        raise ConfigError(f"cannot read {path}: it is longer than {_FILE_BYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: it is not UTF-8") from error


def _of_lines(path: str, data: str) -> list[tuple[str, object]]:
    jobs: list[tuple[str, object]] = []
    for number, line in enumerate(data.split("\n"), 1):
        if not line.strip():
            continue
        try:
            jobs.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: it is not JSON: {error}") from error
    return jobs


def _of_toml(path: str, data: str) -> list[tuple[str, object]]:
    # only for a file of TOML
    import tomllib

    try:
        values = tomllib.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    jobs = values.pop("job", [])
    if values or not isinstance(jobs, list):
        raise ConfigError(f"{path}: only tables [[job]] are known", hint=f"keys of a job: {', '.join(KEYS)}")
    return [(f"job {number}", job) for number, job in enumerate(jobs, 1)]


def _spec(job: object, named: Mapping[str, int]) -> JobSpec:
    if not isinstance(job, dict):
        raise InvalidJobError("a job is an object with keys such as command, name and after")
    if unknown := sorted(set(job) - set(KEYS)):
        raise InvalidJobError(f"no key of a job is called {unknown[0]!r:.80}; there are {', '.join(KEYS)}")
    if "command" not in job and "image" not in job:
        raise InvalidJobError("a job needs a command")
    limits: dict[str, int | str] = {}
    for option, parse in _TYPED.items():
        if option in job:
            limits |= dict.fromkeys(LIMITS[option], _parsed(option, job[option], parse))
    for flag in _FLAGS:
        if not isinstance(job.get(flag, False), bool):
            raise InvalidJobError(f"{flag} is true or false, not {job[flag]!r:.80}")
    queue = QueueSpec(
        priority=job.get("priority", 0),
        not_before=units.coming(str(job["not_before"])) if "not_before" in job else None,
        held=job.get("hold", False),
        after=_after(job.get("after", []), named),
        retry=_retry(job),
        array=_parsed("array", job["array"], units.array) if "array" in job else "",
    )
    return JobSpec(
        job.get("command", ()),
        limits,
        **{name: job[name] for name in (*_TEXTS, *_TABLES, *_LISTS) if name in job},
        split_stderr=job.get("split_stderr", False),
        exclusive=job.get("exclusive", False),
        read_only=job.get("read_only", False),
        gpus=job.get("gpus", 0),
        output_required=job.get("output_required", False),
        allow=job.get("allow", ()),
        queue=queue,
    )


def _retry(job: Mapping[str, Any]) -> Retry | None:
    ends = job.get("retry_on", [])
    listed = ",".join(map(str, ends if isinstance(ends, list) else [ends]))
    return retry_from(
        _parsed("retry", job["retry"], units.count) if "retry" in job else None,
        _parsed("retry_on", listed, units.ends) if listed else frozenset(),
        _parsed("backoff", job["backoff"], units.seconds) if "backoff" in job else None,
        if_lost=job.get("rerun_if_lost", False),
    )


def _parsed(option: str, value: object, parse: Callable[[str], T]) -> T:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidJobError(f"{option} is a number or text, not {value!r:.80}")
    try:
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise InvalidJobError(f"{option}: {error}") from None


def _after(value: Any, named: Mapping[str, int]) -> Sequence[After]:  # noqa: ANN401  a value of the file
    """Return the jobs that a job waits for: names above it in the file, and ids, maybe with a condition.

    `NAME_5` and `17_5` are elements of arrays.
    """
    found: list[After] = []
    for each in value if isinstance(value, list) else [value]:
        name, _, condition = str(each).partition(":")
        if condition not in ("", *Condition):
            raise InvalidJobError(
                f"a job waits for an end that is {', '.join(Condition)}, not {condition!r:.80}"
            )
        how = Condition(condition or "ok")
        job, element = name, None
        if name not in named and (of_array := re.fullmatch(r"(.+)_([0-9]{1,10})", name)) is not None:
            job, element = of_array[1], int(of_array[2])
        if job in named:
            found.append(After(condition=how, earlier=named[job], element=element))
        elif job.isascii() and job.isdecimal() and len(job) <= 18:
            found.append(After(int(job), how, element=element))
        else:
            raise InvalidJobError(f"no job above it is called {name!r:.80}")
    return found
