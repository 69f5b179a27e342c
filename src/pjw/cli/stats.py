"""`pjw stats`: the usage of a job over its life, and between two moments, in numbers and in plots."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from pjw.cli.connection import connect, resolve_id
from pjw.cli.exits import INSTALL_TOP, say
from pjw.cli.render import json_text, members, printable
from pjw.cli.terminal import columns, has_colours
from pjw.cli.units import duration_in_words, size_in_words
from pjw.model import Job, UsageSample

if TYPE_CHECKING:
    from pjw.client.requests import UsageHistory

# The usage of a job between two moments, from its totals at each of them.

# A rate over less time means nothing: the kernel grants and counts processor time in periods of this length.
PERIOD_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Reading:
    """The usage of a job up to a moment, per second; its memory and processes at that moment."""

    time: datetime
    cpu_percent: float
    memory_bytes: int
    read_rate: float
    write_rate: float
    pids: int


def reading(before: UsageSample, now: UsageSample) -> Reading:
    """Return the usage between two samples. A clock set back, or a counter begun anew, is no use."""
    seconds = (now.time - before.time).total_seconds()

    def rate(count: int) -> float:
        return max(0, count) / max(seconds, PERIOD_SECONDS) if seconds > 0 else 0.0

    return Reading(
        time=now.time,
        cpu_percent=rate(now.cpu_usage_usec - before.cpu_usage_usec) / 10_000,
        memory_bytes=now.memory_bytes,
        read_rate=rate(now.io_read_bytes - before.io_read_bytes),
        write_rate=rate(now.io_write_bytes - before.io_write_bytes),
        pids=now.pids,
    )


def readings(start: datetime, samples: Iterable[UsageSample]) -> Iterator[Reading]:
    """Yield the usage over a job's life: nothing was used when it began."""
    before = nothing_at(start)
    for sample in samples:
        yield reading(before, sample)
        before = sample


def nothing_at(start: datetime) -> UsageSample:
    """Return the sample of a job that has just begun."""
    return UsageSample(start, cpu_usage_usec=0, memory_bytes=0, io_read_bytes=0, io_write_bytes=0, pids=0)


PLOT_LINES: Final = 10
PLOT_COLUMNS_MIN: Final = 40
TICKS: Final = 5


def show_stats(arguments: argparse.Namespace) -> None:
    """Print a job's totals and plots, or all samples as JSON."""
    with connect(arguments) as client:
        history = client.usage_history(resolve_id(client, arguments.job))
    if arguments.format == "json":
        print(_json(history))
        return
    try:
        for line in stats_lines(history.job, history.samples):
            print(line)
    except ModuleNotFoundError as error:
        if error.name != "plotext":
            raise
        say(f"without plots: the package plotext is not installed; {INSTALL_TOP}")


def stats_lines(job: Job, samples: Sequence[UsageSample]) -> Iterator[str]:
    """Yield the totals of a job, and plots of its usage in between."""
    rows = list(readings(job.start, samples))
    yield _headline(job, samples)
    if not rows:
        yield "no samples yet"
        return
    yield from _totals(job, samples[-1], rows)
    if len(rows) < 2:
        # a line needs two points
        return
    seconds = [(row.time - job.start).total_seconds() for row in rows]
    for title, color, values in (
        ("CPU, percent of a processor", "green", [row.cpu_percent for row in rows]),
        ("memory, bytes", "cyan", [float(row.memory_bytes) for row in rows]),
        ("read from disk, bytes a second", "magenta", [row.read_rate for row in rows]),
        ("written to disk, bytes a second", "yellow", [row.write_rate for row in rows]),
    ):
        # a plot of nothing is ten lines that say it
        if any(values):
            yield from _plot(title, color, seconds, values, percent="percent" in title)


def _headline(job: Job, samples: Sequence[UsageSample]) -> str:
    until: datetime | None = job.end or (samples[-1].time if samples else None)
    lasted = f" after {duration_in_words((until - job.start).total_seconds())}" if until else ""
    name = f" {job.name}" if job.name else ""
    state = f"{job.state}{lasted}" + (f", {job.reason}" if job.reason else "")
    return f"job {job.ref}{name}: {state}: {printable(job.command)}"[: max(PLOT_COLUMNS_MIN, columns())]


def _totals(job: Job, last: UsageSample, rows: Sequence[Reading]) -> Iterator[str]:
    used = last.cpu_usage_usec / 1_000_000
    lasted = ((job.end or last.time) - job.start).total_seconds()
    highest = max(row.cpu_percent for row in rows)
    peak = max(row.memory_bytes for row in rows)
    if job.usage:
        # the kernel's own mark, which no sample may have met
        peak = max(peak, job.usage.memory_peak_bytes)
    limits = job.limits
    cpu_limit = f" of {limits.cpu_max_millicores / 10:.0f}" if limits.cpu_max_millicores else ""
    memory_limit = f" of {size_in_words(limits.memory_max_bytes)}" if limits.memory_max_bytes else ""
    cpu = f"{used * 1000:.0f}ms" if used < 1 else duration_in_words(used)
    if lasted >= PERIOD_SECONDS:
        cpu += f"; {100 * used / lasted:.0f} % on average, {highest:.0f}{cpu_limit} % at most"
    yield f"CPU        {cpu}"
    yield f"memory     {size_in_words(peak)}{memory_limit} at most"
    yield f"disk       {size_in_words(last.io_read_bytes)} read, {size_in_words(last.io_write_bytes)} written"
    # counted only while it runs: a job that was over at once has no samples
    if processes := max(row.pids for row in rows):
        yield f"processes  {processes} at most"


def _plot(
    title: str, color: str, seconds: Sequence[float], values: Sequence[float], *, percent: bool
) -> Iterator[str]:
    """Yield a plot as lines of text, as wide as the terminal."""
    import plotext

    plot: Any = plotext
    plot.clear_figure()
    plot.theme("clear")
    plot.plotsize(max(PLOT_COLUMNS_MIN, columns()), PLOT_LINES)
    plot.plot(list(seconds), list(values), marker="braille", color=color)
    top = max(values)
    plot.ylim(0, top)
    marks = [0, top / 2, top]
    plot.yticks(marks, [f"{mark:.0f} %" if percent else size_in_words(round(mark)) for mark in marks])
    first, last = seconds[0], seconds[-1]
    moments = [first + (last - first) * number / (TICKS - 1) for number in range(TICKS)]
    plot.xticks(moments, [f"{moment:.1f}s" if last < 10 else duration_in_words(moment) for moment in moments])
    text: str = plot.build()
    if not has_colours():
        text = plot.uncolorize(text)
    yield ""
    yield title
    yield from text.rstrip("\n").split("\n")


def _json(history: "UsageHistory") -> str:
    samples = [
        {
            "time": sample.time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "cpuUsageUsec": sample.cpu_usage_usec,
            "memoryBytes": sample.memory_bytes,
            "ioReadBytes": sample.io_read_bytes,
            "ioWriteBytes": sample.io_write_bytes,
            "pids": sample.pids,
        }
        for sample in history.samples
    ]
    return json_text({"job": members(history.job), "samples": samples}, indent=2)
