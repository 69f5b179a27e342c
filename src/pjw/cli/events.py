"""`pjw events`: changes of jobs, a line each for a person or as JSON."""

import sys
from argparse import Namespace
from typing import Any, Final

from pjw.cli import render
from pjw.cli.connection import connect, resolve_id
from pjw.cli.exits import say
from pjw.cli.terminal import columns
from pjw.model import JobChange

_STATE_COLUMNS: Final = 8


def show_events(arguments: Namespace) -> None:
    """Print changes of jobs until Ctrl-C, or only those so far."""
    as_json = arguments.format == "jsonl" or (arguments.format is None and not sys.stdout.isatty())
    with connect(arguments) as client:
        watch = client.watch_jobs(
            arguments.since,
            ids=[resolve_id(client, job) for job in arguments.job],
            states=arguments.state,
            labels=dict(arguments.label),
            name=arguments.name or "",
            snapshot=arguments.list,
            follow=arguments.follow,
        )
        try:
            for change in watch:
                print(json_line(change) if as_json else _line(change, with_client=arguments.all), flush=True)
        except KeyboardInterrupt:
            if not as_json and watch.sequence is not None:
                say(f"go on with --since {watch.sequence}")
            raise


def json_line(change: JobChange) -> str:
    """Return a change as one line of JSON."""
    members: dict[str, Any] = {
        "sequence": None if change.sequence is None else str(change.sequence),
        "time": f"{change.time:%Y-%m-%dT%H:%M:%S}.{change.time.microsecond // 1000:03}Z"
        if change.time
        else None,
        "removed": change.removed,
        "job": render.members(change.job),
    }
    return render.json_text(members)


def _line(change: JobChange, *, with_client: bool) -> str:
    job = change.job
    state = "removed" if change.removed else str(job.state)
    if job.state.final and not change.removed:
        state += f" {render.exit_words(job)}"
    time = f"{change.time.astimezone():%H:%M:%S}" if change.time else ""
    cells = [f"{change.sequence or '':>8}", f"{time:8}", f"{job.ref:>6}"]
    if with_client:
        cells.append(f"{render.printable(job.client_name):<12}")
    cells.append(f"{state:<{_STATE_COLUMNS}}")
    line = "  ".join(cells) + "  "
    named = f"{job.name}: {job.command}" if job.name else job.command
    return line + render.cut(render.printable(named), max(20, columns() - len(line)))
