"""The output for users: JSON and tables on stdout, but never the bytes that a job writes."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any, Final

from pjw.cli.terminal import columns
from pjw.cli.units import duration_in_words
from pjw.model import ArrayCounts, EndReason, Job, JobState, Limits, Sums

# The most columns of a table that a name takes.
NAME_COLUMNS: Final = 24
_GREEN, _RED, _YELLOW, _DIM = "32", "31", "33", "2"


def job_json(job: Job) -> str:
    """Return a job as the JSON of the seed, further keys behind its own."""
    return json_text(members(job), indent=2)


def members(job: Job) -> dict[str, Any]:
    """Return the keys and values of a job's JSON."""
    status = job.exit_status
    return {
        "id": str(job.id),  # an int64 is a string in protobuf's JSON mapping, and in the seed
        "command": job.command,
        "start": time_text(job.start) if job.was_started else None,
        "end": time_text(job.end) if job.end else None,
        "exitCode": status.code if status else None,
        "state": job.state.value,
        "reason": job.reason.value if job.reason else None,
        "signal": status.signal if status else None,
        "clientName": job.client_name,
        "limits": limits_members(job.limits),
        "usage": _usage(job),
        "outputBytes": job.output_bytes,
        "artifacts": _artifacts(job),
        "name": job.name,
        "labels": dict(job.labels),
        "splitStderr": job.split_stderr,
        "input": job.input,
        "detail": job.detail,
        "workdir": job.workdir,
        "usageNow": _usage_now(job),
        "queued": time_text(job.queued) if job.queued else None,
        "priority": job.priority,
        "notBefore": time_text(job.not_before) if job.not_before else None,
        "held": job.held,
        "after": list(map(str, job.after)),
        "unmet": job.unmet,
        "attempt": job.attempt,
        "retriedAs": None if job.retried_as is None else str(job.retried_as),
        "array": _array(job),
        "arrayId": None if job.array_id is None else str(job.array_id),
        "arrayIndex": job.array_index,
        "workspace": job.workspace,
        "exclusive": job.exclusive,
        "node": job.node,
        "image": job.image,
        "readOnly": job.read_only,
        "mounts": list(job.mounts),
        "allow": list(job.allow),
        "link": job.link,
        "gpus": job.gpus,
    }


def _artifacts(job: Job) -> dict[str, str | bool] | None:
    artifacts = job.artifacts
    if artifacts is None:
        return None
    return {
        "state": artifacts.state.value,
        "bytes": str(artifacts.bytes),
        "detail": artifacts.detail,
        "required": artifacts.required,
    }


def limits_members(limits: Limits | Sums) -> dict[str, int]:
    """Return the keys and values of the JSON of limits, or of sums."""
    return {_camel(name): value for name, value in limits.items()}


def _array(job: Job) -> dict[str, int | str] | None:
    array = job.array
    if array is None:
        return None
    return {
        "indices": array.indices,
        "count": array.count,
        "waiting": array.waiting,
        "running": array.running,
        "succeeded": array.succeeded,
        "failed": array.failed,
        "cancelled": array.cancelled,
    }


def array_counts(array: ArrayCounts) -> str:
    """Return the progress of the elements of an array, on a line for a person."""
    named = {
        "wait": array.waiting,
        "run": array.running,
        "ok": array.succeeded,
        "failed": array.failed,
        "cancelled": array.cancelled,
    }
    return f"array {array.indices}: " + ", ".join(f"{count} {name}" for name, count in named.items() if count)


def _usage(job: Job) -> dict[str, int] | None:
    usage = job.usage
    if usage is None:
        return None
    return {
        "cpuUsageUsec": usage.cpu_usage_usec,
        "memoryPeakBytes": usage.memory_peak_bytes,
        "ioReadBytes": usage.io_read_bytes,
        "ioWriteBytes": usage.io_write_bytes,
        "oomKills": usage.oom_kills,
    }


def _usage_now(job: Job) -> dict[str, int | str] | None:
    sample = job.usage_now
    if sample is None:
        return None
    return {
        "time": time_text(sample.time),
        "cpuUsageUsec": sample.cpu_usage_usec,
        "memoryBytes": sample.memory_bytes,
        "ioReadBytes": sample.io_read_bytes,
        "ioWriteBytes": sample.io_write_bytes,
        "pids": sample.pids,
    }


def json_text(value: object, indent: int | None = None) -> str:
    """Format JSON with readable characters; escape those that would steer a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # the only newlines are those between members
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def job_line(job: Job) -> str:
    """Return a job as one line of JSON."""
    return json_text(members(job))


def jobs_json(jobs: Iterable[Job]) -> Iterator[str]:
    """Yield jobs as pieces of one array of JSON, each piece as soon as its job is there."""
    before = "[\n"
    for job in jobs:
        yield before + "  " + job_json(job).replace("\n", "\n  ")
        before = ",\n"
    yield "\n]" if before.startswith(",") else "[]"


def job_table(
    jobs: Iterable[Job], *, with_clients: bool = False, with_colours: bool = False
) -> Iterator[str]:
    """Yield jobs as the lines of a table for a terminal; *with_clients*, each with its owner."""
    width, now = columns(), datetime.now(UTC)
    rest = iter(jobs)
    # the first jobs decide how wide the columns are, so that a list of a million begins at once
    first = list(islice(rest, 1000))
    name_width = min(NAME_COLUMNS, max((len(job.name) for job in first), default=0))
    whose_width = min(NAME_COLUMNS, max([6, *(len(printable(job.client_name)) for job in first)]))

    def line_of(job: Job | None) -> str:
        cells = [f"{job.ref if job else 'ID':>6}"]
        if with_clients:
            cells.append(f"{printable(job.client_name) if job else 'CLIENT':<{whose_width}}")
        if name_width:
            cells.append(f"{job.name if job else 'NAME':<{max(4, name_width)}}")
        cells += [
            _painted(f"{job.state if job else 'STATE':<8}", _colour(job) if with_colours else ""),
            f"{_age(now, job.start) if job else 'AGE':>5}",
            f"{lasted(job, now) if job else 'DURATION':>8}",
            f"{exit_words(job) if job else 'EXIT':<12}",
        ]
        return "  ".join(cells) + "  "

    yield line_of(None) + "COMMAND"
    for job in chain(first, rest):
        line = line_of(job)
        used = len(line) - (len(_painted("", _colour(job))) if with_colours else 0)
        yield line + cut(printable(job.command), max(20, width - used))
        if job.array is not None:
            yield f"{'':>6}  {array_counts(job.array)}"
        if job.detail:
            yield printable(f"{'':>6}  {job.detail}")


def queue_table(jobs: Iterable[Job], *, with_clients: bool = False) -> Iterator[str]:
    """Yield waiting jobs as the lines of a table for a terminal: their wait, priority, and reason."""
    width, now = columns(), datetime.now(UTC)
    head = f"{'ID':>6}  " + (f"{'CLIENT':<{NAME_COLUMNS}}  " if with_clients else "")
    yield f"{head}{'PRIORITY':>8}  {'WAITS':>6}  COMMAND"
    for job in jobs:
        line = f"{job.ref:>6}  "
        if with_clients:
            line += f"{cut(printable(job.client_name), NAME_COLUMNS):<{NAME_COLUMNS}}  "
        line += f"{job.priority:>8}  {_age(now, job.asked):>6}  "
        named = f"{job.name}: {job.command}" if job.name else job.command
        yield line + cut(printable(named), max(20, width - len(line)))
        if job.array is not None:
            yield f"{'':>6}  {array_counts(job.array)}"
        yield printable(f"{'':>6}  {job.detail}")


def end_line(job: Job) -> str:
    """Describe the end of a job, on one line for a person."""
    if not job.was_started:
        return printable(f"{job.ref}{f' {job.name}' if job.name else ''}: {job.state} without a start")
    after = duration_in_words(((job.end or job.start) - job.start).total_seconds())
    how = f"exit {exit_words(job)}" if job.exit_status and job.exit_status.signal is None else exit_words(job)
    return printable(f"{job.ref}{f' {job.name}' if job.name else ''}: {job.state} after {after}, {how}")


def cut(text: str, width: int) -> str:
    """Cut a text to *width* columns."""
    return text if len(text) <= width else text[: width - 1] + "…"


def printable(text: str) -> str:
    """Escape control and other invisible characters, so that a text cannot steer a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def lasted(job: Job, now: datetime) -> str:
    """Return the duration of a job's run, in words; empty when it was not started."""
    return duration_in_words(duration(job, now)) if job.was_started else ""


def duration(job: Job, now: datetime) -> float:
    """Return how many seconds a job has run."""
    return ((job.end or now) - job.start).total_seconds()


def is_failure(job: Job) -> bool:
    """Return whether a job is lost, or ended with an exit code other than 0 or without its required files."""
    missing = job.reason is EndReason.ARTIFACTS_MISSING
    return job.state.final and (missing or job.exit_status is None or job.exit_status.code != 0)


def _colour(job: Job | None) -> str:
    if job is None:
        return "1"
    if not job.state.final:
        return _GREEN if job.state is JobState.RUNNING else _YELLOW
    return _RED if is_failure(job) else _DIM


def _painted(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def exit_words(job: Job) -> str:
    """Describe the end of a job: its exit code, its signal, or why it has neither."""
    if job.exit_status is None:
        return job.reason or ""
    ended = (
        str(job.exit_status.code) if job.exit_status.signal is None else f"signal {job.exit_status.signal}"
    )
    return ended if job.reason in (None, "completed", "stopped") else str(job.reason)


def _age(now: datetime, start: datetime) -> str:
    seconds = max(0, int((now - start).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def time_text(time: datetime) -> str:
    """Format a time by RFC 3339 in UTC, to the second, as in the seed."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
