"""`pjw top`: the running jobs, their usage, and keys to stop and to follow them, on the whole terminal."""

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Label, Log, Sparkline, Static

from pjw.cli import local_terminal
from pjw.cli.connection import find_settings, options_of, warn_of_ends
from pjw.cli.plain import PlainText
from pjw.cli.render import array_counts, printable
from pjw.cli.stats import Reading, nothing_at, reading
from pjw.cli.units import SIGNALS, duration_in_words, size_in_words
from pjw.client.aio import AsyncClient
from pjw.client.requests import JobUsage, UsageSnapshot
from pjw.errors import PjwError, TerminalError
from pjw.model import Job, JobSpec, JobState, UsageSample

INTERVAL_SECONDS: Final = 2.0
# The user looks at the screen and decides when to give up.
RECONNECT_SECONDS: Final = 7 * 86_400
# No user reads more of them, and each costs time at every snapshot.
ROWS_MAX: Final = 500
HISTORY: Final = 8
TOTALS_HISTORY: Final = 80
FOLLOW_LINES: Final = 1000
COMMAND_MAX: Final = 200
BARS: Final = "▁▂▃▄▅▆▇█"
# The user's shell on this machine, where the job has it too. By its name: it may be elsewhere there.
SHELL: Final = 'command -v -- "$0" >/dev/null && exec "$0"; exec /bin/sh'

# of a job that waits in the queue
NOTHING: Final = Reading(datetime.min.replace(tzinfo=UTC), 0.0, 0, 0.0, 0.0, 0)

Order = tuple[str, Callable[["Row"], float]]
ORDERS: Final[tuple[Order, ...]] = (
    ("id", lambda row: row.job.id),
    ("CPU", lambda row: -row.last.cpu_percent),
    ("memory", lambda row: -row.last.memory_bytes),
    ("disk", lambda row: -(row.last.read_rate + row.last.write_rate)),
)


def show_top(arguments: argparse.Namespace) -> None:
    """Show the jobs until `q`. Raises PjwError when there is no service to ask."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise TerminalError(
            "cannot show top: stdin and stdout are not a terminal", hint="`pjw list` writes to anything"
        )
    settings = find_settings(arguments)
    warn_of_ends(settings)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    everybody = bool(arguments.all)

    def connect() -> AsyncClient:
        return AsyncClient(
            settings.server, *files, all_clients=everybody, reconnect_seconds=RECONNECT_SECONDS
        )

    # by a process of its own: it reads keys as long as it lives, and then they are ours again
    pjw = [sys.executable, "-P", "-m", "pjw.cli.main", *options_of(arguments)]
    failure = Top(connect, settings.server, everybody=everybody, pjw=pjw).run()
    if failure is not None:
        raise failure


class Row:
    """A job, and its last readings."""

    def __init__(self, job: Job) -> None:
        self.job: Job = job
        self._sample: UsageSample = nothing_at(job.start)
        self.readings: Final[deque[Reading]] = deque(maxlen=HISTORY)

    def take(self, usage: JobUsage) -> None:
        """Add the job's usage since the last snapshot."""
        self.job = usage.job
        self.readings.append(reading(self._sample, usage.sample))
        self._sample = usage.sample

    @property
    def last(self) -> Reading:
        """The newest reading; of a job that waits that of nothing."""
        return self.readings[-1] if self.readings else NOTHING

    def cells(self, now: datetime, *, with_client: bool, wide: bool) -> list[Text]:
        """Return the cells of the table."""
        job, last = self.job, self.last
        if job.state is JobState.QUEUED:
            return self._cells_of_waiting(now, with_client=with_client, wide=wide)
        cpu_plot = memory_plot = ""
        if wide:
            cpu_plot = " " + bars([one.cpu_percent for one in self.readings], 100)
            memory = [one.memory_bytes for one in self.readings]
            memory_plot = " " + bars(memory, job.limits.memory_max_bytes)
        texts = [job.ref]
        if with_client:
            texts.append(printable(job.client_name))
        texts += [
            printable(job.name),
            job.state,
            duration_in_words((now - job.start).total_seconds()),
            f"{last.cpu_percent:>4.0f} %{cpu_plot}",
            f"{size_in_words(last.memory_bytes):>5}{memory_plot}",
            f"{size_in_words(round(last.read_rate)):>6}",
            f"{size_in_words(round(last.write_rate)):>7}",
            *([str(last.pids)] if wide else []),
            printable(job.command[:COMMAND_MAX]),
        ]
        # Text, since a plain string would be taken for markup
        return [Text(text, no_wrap=True) for text in texts]

    def _cells_of_waiting(self, now: datetime, *, with_client: bool, wide: bool) -> list[Text]:
        job = self.job
        texts = [job.ref, *([printable(job.client_name)] if with_client else []), printable(job.name)]
        texts += [job.state, duration_in_words((now - job.asked).total_seconds()), "", "", "", ""]
        command = job.command[:COMMAND_MAX]
        if job.array is not None:
            command = f"{array_counts(job.array)}: {command}"
        texts += [*([""] if wide else []), printable(command)]
        return [Text(text, no_wrap=True) for text in texts]


COLUMNS: Final = ("ID", "NAME", "STATE", "AGE", "CPU", "MEM", "READ/s", "WRITE/s", "PIDS", "COMMAND")
# On a narrower terminal the table has neither plots nor PIDS, to make room for the commands.
WIDE_COLUMNS: Final = 110


def bars(values: Iterable[float], full: float = 0) -> str:
    """Plot in one line; *full* is a full bar, or the highest value when that is more."""
    found = list(values)
    top = max(*found, full, 1)
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in found).rjust(HISTORY)


def shell_spec() -> JobSpec:
    """Make the spec of a shell at a terminal like ours."""
    shell = os.path.basename(os.environ.get("SHELL", "")) or "sh"
    return JobSpec(
        ["/bin/sh", "-c", SHELL, shell],
        env={"TERM": os.environ["TERM"]} if "TERM" in os.environ else {},
        input=True,
        terminal=local_terminal.size(),
    )


class Confirm(ModalScreen[bool]):
    """A question that is answered with y or n."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question: Final = question

    def compose(self) -> ComposeResult:
        """Yield the question, and the keys."""
        yield Label(Text(f"{self._question}  [y/n]"))

    def action_answer(self, answer: bool) -> None:  # noqa: FBT001  textual passes it so
        """Close with the answer."""
        self.dismiss(answer)


class Top(App[PjwError]):
    """The screen. Its result is the error that ended it, when it was not ended by a key."""

    TITLE = "pjw top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #totals { height: 3; }
    #totals Vertical { width: 1fr; padding: 0 1; }
    Sparkline { height: 2; }
    #state { height: 1; padding: 0 1; background: $panel; }
    DataTable { height: 1fr; scrollbar-size-horizontal: 0; }
    #output { height: 1fr; display: none; border-top: solid $primary; scrollbar-size-horizontal: 0; }
    Confirm { align: center middle; }
    Confirm Label { padding: 1 3; background: $panel; border: solid $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "end(False)", "stop"),
        Binding("k", "end(True)", "kill"),
        Binding("l,enter", "follow", "output", priority=False),
        Binding("e", "enter", "shell"),
        Binding("escape", "unfollow", "close output", show=False),
        Binding("o", "order", "order"),
        Binding("q,ctrl+c", "quit", "quit"),
    ]

    def __init__(
        self,
        connect: Callable[[], AsyncClient],
        server: str,
        *,
        everybody: bool,
        pjw: Sequence[str] = ("pjw",),
    ) -> None:
        """Prepare the screen; *pjw* is a command line that runs pjw as we connect."""
        super().__init__()
        self._pjw: Final = pjw
        self._connect: Final = connect
        self._client: AsyncClient
        self._server: Final = server
        self._everybody: Final = everybody
        self._rows: dict[int, Row] = {}
        self._queued = 0
        self._shown: set[int] = set()
        self._totals: Final = {
            name: deque[float](maxlen=TOTALS_HISTORY) for name in ("cpu", "memory", "disk")
        }
        self._order = 0
        self._wide: bool | None = None
        self._heard = time.monotonic()
        self._followed: int | None = None

    def compose(self) -> ComposeResult:
        """Yield totals above the table, and the output of a job below it."""
        yield Static(id="state")
        with Horizontal(id="totals"):
            for name in self._totals:
                with Vertical():
                    yield Static(id=f"{name}-total")
                    yield Sparkline([], id=f"{name}-plot")
        table: DataTable[Text] = DataTable(id="jobs", cursor_type="row", zebra_stripes=True)
        yield table
        yield Log(id="output", max_lines=FOLLOW_LINES)
        yield Footer()

    def on_resize(self, event: Resize) -> None:
        """Choose the columns that fit the terminal."""
        wide = event.size.width >= WIDE_COLUMNS
        if wide is self._wide:
            return
        self._wide, self._shown = wide, set()
        table = self._table
        table.clear(columns=True)
        names = [*COLUMNS[:1], "CLIENT", *COLUMNS[1:]] if self._everybody else COLUMNS
        for number, name in enumerate(name for name in names if wide or name != "PIDS"):
            table.add_column(name, key=str(number))
        self._show_jobs()

    def on_mount(self) -> None:
        """Begin to watch."""
        self._show_state()
        # only the ages on the screen; the data come by themselves
        self.set_interval(1, self._show_state)
        self.run_worker(self._watch())

    async def _watch(self) -> None:
        try:
            # not before: a connection belongs to the event loop that it was made in
            self._client = self._connect()
            async for snapshot in self._client.watch_usage(INTERVAL_SECONDS):
                self._heard = time.monotonic()
                self._take(snapshot)
        except PjwError as error:
            self.exit(error)

    def _take(self, snapshot: UsageSnapshot) -> None:
        rows: dict[int, Row] = {}
        for usage in snapshot:
            before = self._rows.get(usage.job.id)
            rows[usage.job.id] = before if before is not None and before.readings else Row(usage.job)
        for usage in snapshot:
            rows[usage.job.id].take(usage)
        self._rows, self._queued = rows, snapshot.queued
        for job in snapshot.waiting:
            # between two looks it may have begun
            if job.id not in rows:
                rows[job.id] = Row(job)
        self._show_jobs()
        self._show_totals()
        self._show_state()

    def _show_jobs(self) -> None:
        table = self._table
        if self._wide is None:
            # the size of the terminal is not known yet
            return
        _, key = ORDERS[self._order]
        ordered = sorted(self._rows.values(), key=key)[:ROWS_MAX]
        ids = {row.job.id for row in ordered}
        for job_id in self._shown - ids:
            table.remove_row(str(job_id))
        now = datetime.now(UTC)
        for row in ordered:
            cells = row.cells(now, with_client=self._everybody, wide=bool(self._wide))
            if row.job.id in self._shown:
                for number, cell in enumerate(cells):
                    table.update_cell(str(row.job.id), str(number), cell, update_width=True)
            else:
                table.add_row(*cells, key=str(row.job.id))
        self._shown = ids
        rank = {str(row.job.id): number for number, row in enumerate(ordered)}
        table.sort("0", key=lambda cell: rank[str(cell)])

    def _show_totals(self) -> None:
        last = [row.last for row in self._rows.values()]
        cpu = sum(one.cpu_percent for one in last)
        memory = sum(one.memory_bytes for one in last)
        read, written = sum(one.read_rate for one in last), sum(one.write_rate for one in last)
        for name, value, text in (
            ("cpu", cpu, f"CPU {cpu:.0f} %"),
            ("memory", memory, f"memory {size_in_words(memory)}"),
            (
                "disk",
                read + written,
                f"disk {size_in_words(round(read))}/s read, {size_in_words(round(written))}/s written",
            ),
        ):
            self._totals[name].append(value)
            self.query_one(f"#{name}-total", Static).update(Text(text))
            # from zero on, and not from the lowest value
            self.query_one(f"#{name}-plot", Sparkline).data = [0.0, *self._totals[name]]

    def _show_state(self) -> None:
        order, _ = ORDERS[self._order]
        whose = "jobs of all clients" if self._everybody else "jobs"
        count = sum(row.job.state is not JobState.QUEUED for row in self._rows.values())
        shown = f", {ROWS_MAX} of them shown" if count > ROWS_MAX else ""
        if self._queued:
            shown += f", {self._queued} in the queue"
        silent = time.monotonic() - self._heard
        text = Text(f"pjw top  {self._server}  {count} {whose}{shown}, by {order}")
        if silent > 2 * INTERVAL_SECONDS + 1:
            text.append(f"  no answer for {silent:.0f} s, trying again", style="bold red")
        self.query_one("#state", Static).update(text)

    @property
    def _table(self) -> "DataTable[Text]":
        return self.query_one("#jobs", DataTable)

    def _chosen(self) -> Job | None:
        """Return the job under the cursor."""
        table = self._table
        if not table.row_count:
            return None
        cell, *_ = table.get_row_at(table.cursor_row)
        row = self._rows.get(int(str(cell)))
        return row.job if row else None

    def action_order(self) -> None:
        """Sort by the next possible order."""
        self._order = (self._order + 1) % len(ORDERS)
        self._show_jobs()
        self._show_state()

    def action_end(self, kill: bool) -> None:  # noqa: FBT001  textual passes it so
        """Stop or kill the chosen job, when the user confirms that."""
        job = self._chosen()
        if job is None:
            return
        verb = "Kill" if kill else "Stop"

        def answered(yes: bool | None) -> None:  # noqa: FBT001  textual passes it so
            if yes:
                self.run_worker(self._end(job, kill=kill))

        self.push_screen(Confirm(f"{verb} job {job.ref}: {printable(job.command[:60])}?"), answered)

    async def _end(self, job: Job, *, kill: bool) -> None:
        try:
            await self._client.stop(job.id, signal=SIGNALS["KILL"] if kill else 0)
        except PjwError as error:
            self.notify(printable(str(error)), severity="error", markup=False)
        else:
            self.notify(f"job {job.ref} has ended", markup=False)

    def action_enter(self) -> None:
        """Open a shell in the chosen job, on the whole terminal; come back when it ends or is left."""
        if job := self._chosen():
            self.run_worker(self._enter(job), group="enter", exclusive=True)

    async def _enter(self, job: Job) -> None:
        try:
            local_terminal.require_terminal()
            session = await self._client.exec(job.id, shell_spec())
        except PjwError as error:
            self.notify(printable(f"no shell: {error}"), severity="error", markup=False)
            return
        with self.suspend():
            command = [*self._pjw, "attach", f"{job.id}/{session.number}"]
            # the event loop has to wait: it would write to the terminal
            subprocess.run(command, check=False)  # noqa: ASYNC221
        # no data were read meanwhile
        self._heard = time.monotonic()

    def on_data_table_row_selected(self) -> None:
        """Enter on a row."""
        self.action_follow()

    def action_follow(self) -> None:
        """Show the output of the chosen job below the table; the same job again closes it."""
        job = self._chosen()
        if job is None or job.id == self._followed:
            self.action_unfollow()
            return
        self._followed = job.id
        log = self.query_one("#output", Log)
        log.clear()
        log.border_title = f"job {job.ref}"
        log.display = True
        # one at a time: the job followed before is released
        self.run_worker(self._follow(job, log), group="follow", exclusive=True)

    async def _follow(self, job: Job, log: Log) -> None:
        plain = PlainText()
        try:
            async for data in self._client.logs(job.id, tail=FOLLOW_LINES):
                log.write(plain.feed(data))
            log.border_title = f"job {job.ref}, ended"
        except PjwError as error:
            log.write_line(printable(f"pjw: error: {error}"))

    def action_unfollow(self) -> None:
        """Close the output."""
        self._followed = None
        self.workers.cancel_group(self, "follow")
        self.query_one("#output", Log).display = False

    async def action_quit(self) -> None:
        """End, without waiting for calls that are under way."""
        self.exit()

    async def on_unmount(self) -> None:
        """Close the connection."""
        if hasattr(self, "_client"):
            await self._client.close()
