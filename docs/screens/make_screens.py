"""Draw top.svg, session.svg, programs.svg: a real pjwd on loopback, real jobs, what pjw shows of them."""

import asyncio
import os
import shlex
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from pjw.cli.top import Top
from pjw.client.aio import AsyncClient
from tests.support.service import BIN, Service, wait_for

HERE: Final = Path(__file__).parent
COLUMNS: Final = 100
SNAPSHOTS: Final = 6
JOBS: Final = (
    ("start", "--name", "build", "while :; do :; done # make -j1 all"),
    ("start", "--name", "backup", "while :; do head -c 20000000 /dev/zero > x; sync; sleep 1; done"),
    ("start", "head -c 150000000 /dev/zero | tail | sleep 1000"),
    ("start", "--name", "web", "while :; do sleep 1; echo $(date) GET /; done"),
)
SESSION: Final = (
    "pjw start 'echo \"hello world\"'",
    "pjw logs 1",
    "pjw run --name build --memory 256M 'for i in 1 2 3; do echo step $i; sleep 1; done'",
    "pjw start --name web 'while :; do echo GET /; sleep 1; done'",
    "pjw list",
    "pjw stop web | head -n 7",
)
# In a job: a program that draws the screen, what is typed into it, and words that it shows then.
PROGRAMS: Final = (
    (("top", "-d", "1"), (), "sleep"),
    (("less", "/usr/share/common-licenses/Apache-2.0"), (" ",), ":"),
    (("vi", "notes"), ("i", "step 3 waits for the lock", "Enter", "of step 2"), "of step 2"),
)
PROGRAM_LINES: Final = 11


def main() -> None:
    """Draw all."""
    with tempfile.TemporaryDirectory(prefix="pjw-screens-", dir="/var/lib") as directory:
        service = Service(Path(directory), clients=("alice",)).start()
        try:
            draw_session(service)
            draw_programs(service)
            for job in JOBS:
                service.ok(*job)
            asyncio.run(draw_top(service))
        finally:
            for job_id in service.ok("list", "--state", "running").split():
                service.ok("stop", "--grace", "0", job_id)
            service.stop()


def draw_session(service: Service) -> None:
    """Make the session at a terminal that the README shows."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, legacy_windows=False)
    for line in SESSION:
        console.print(Text.assemble(("$ ", "bold green"), line))
        words = shlex.split(line.partition(" | ")[0])[1:]
        shown = service.at_terminal(*words, columns=COLUMNS).replace("\r\n", "\n")
        if " | head -n 7" in line:
            shown = "".join(shown.splitlines(keepends=True)[:7])
        console.print(Text.from_ansi(shown.rstrip("\n")))
    console.save_svg(str(HERE / "session.svg"), title="pjw")


def draw_programs(service: Service) -> None:
    """Programs at terminals in a job, as tmux has them."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, legacy_windows=False)
    service.ok("start", "--name", "build", "while :; do sleep 1; done")
    for command, keys, words in PROGRAMS:
        line = ["pjw", "exec", "-it", "build", *command]
        console.print(Text.assemble(("$ ", "bold green"), shlex.join(line)))
        console.print(Text.from_ansi(screen_of([str(BIN / "pjw"), *line[1:]], keys, words, service)))
    service.ok("stop", "--grace", "0", "build")
    console.save_svg(str(HERE / "programs.svg"), title="programs in a job")


def screen_of(command: list[str], keys: tuple[str, ...], words: str, service: Service) -> str:
    """Return what a terminal shows, with its colours, when *keys* were typed and *words* are there."""
    tmux = ["tmux", "-L", f"pjw-screens-{os.getpid()}", "-f", os.devnull]
    env = service.environment() | {"TERM": "xterm-256color", "LANG": "C.UTF-8"}

    def shown(*how: str) -> str:
        return subprocess.check_output([*tmux, "capture-pane", "-p", *how], text=True, env=env)

    size = ("-x", str(COLUMNS), "-y", str(PROGRAM_LINES))
    subprocess.run([*tmux, "new-session", "-d", *size, shlex.join(command)], check=True, env=env)
    try:
        subprocess.run([*tmux, "set", "status", "off"], check=True, env=env)
        wait_for(lambda: shown().strip())
        for key in keys:
            subprocess.run([*tmux, "send-keys", key], check=True, env=env)
        wait_for(lambda: words in shown())
        return shown("-e").rstrip("\n")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, env=env)


async def draw_top(service: Service) -> None:
    """`pjw top` with jobs of several kinds, and the output of one."""
    keys = ("PJW_CA_CRT", "PJW_CLIENT_CRT", "PJW_CLIENT_KEY")
    files = [service.environment()[key] for key in keys]
    seen = asyncio.Event()

    class Watched(Top):
        """Tells when there have been enough snapshots for plots."""

        snapshots = 0

        def _show_totals(self) -> None:
            super()._show_totals()
            self.snapshots += 1
            if self.snapshots % SNAPSHOTS == 0:
                seen.set()

    app = Watched(lambda: AsyncClient(service.address, *files), service.address, everybody=False)
    async with app.run_test(size=(COLUMNS + 10, 26)) as pilot:
        await seen.wait()
        await pilot.press("down", "down", "down", "l")
        seen.clear()
        await seen.wait()
        await pilot.pause()
        app.save_screenshot("top.svg", path=str(HERE))
        await pilot.press("q")


if __name__ == "__main__":
    sys.exit(main())
