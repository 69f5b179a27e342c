"""What is shown: JSON and tables on stdout. The bytes of a job never come through here."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime

from pjw.cli.terminal import columns
from pjw.model import Job


def job_json(job: Job) -> str:
    """A job as the JSON of the seed, further keys behind its own."""
    status = job.exit_status
    members = {
        "id": str(job.id),  # an int64 is a string in protobuf's JSON mapping, and in the seed
        "command": job.command,
        "start": _time(job.start),
        "end": _time(job.end) if job.end else None,
        "exitCode": status.code if status else None,
        "state": job.state.value,
        "reason": job.reason.value if job.reason else None,
        "signal": status.signal if status else None,
        "clientName": job.client_name,
        "limits": {_camel(name): value for name, value in job.limits.items()},
        "usage": _usage(job),
        "outputBytes": job.output_bytes,
    }
    return json.dumps(members, indent=2, ensure_ascii=False)


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


def job_table(jobs: Iterable[Job], *, with_clients: bool = False) -> Iterable[str]:
    """Jobs as the lines of a table for a terminal; *with_clients*, each with whose it is."""
    width = columns()
    now = datetime.now(UTC)

    def line_of(job_id: object, client: str, state: str, age: str, ended: str) -> str:
        whose = f"{client:<20}  " if with_clients else ""
        return f"{job_id:>6}  {whose}{state:<8}  {age:>5}  {ended:<12}  "

    yield line_of("ID", "CLIENT", "STATE", "AGE", "EXIT") + "COMMAND"
    for job in jobs:
        line = line_of(job.id, printable(job.client_name), job.state, _age(now, job.start), _exit(job))
        yield line + printable(job.command)[: max(20, width - len(line))]


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control and other invisible characters are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def _exit(job: Job) -> str:
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


def _time(time: datetime) -> str:
    """RFC 3339 in UTC, to the second, as in the seed."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
