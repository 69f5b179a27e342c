"""The parts that a worker's starts, sessions, endings and adoption share."""

from dataclasses import dataclass

from pjw.output import Inotify
from pjw.worker.jobs import Jobs
from pjw.worker.launch_turns import LaunchTurns
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.quota import StoredBytes
from pjw.worker.state_dir import StateDir
from pjw.worker.store import Users
from pjw.worker.tasks import Background


@dataclass(frozen=True, slots=True)
class Parts:
    """Each has one owner, the worker, which also closes it."""

    state: StateDir
    launcher: LauncherClient
    inotify: Inotify
    background: Background
    users: Users
    jobs: Jobs
    stored: StoredBytes
    turns: LaunchTurns
