"""Starts one init to find out whether a job can be made on this host, and what it would see.

The init has the mounts and the kind of user of a job, but no scratch directory, and it runs in pjwd's cgroup.
It executes nothing but cat(1). `pjwd check` shows the result. `pjwd serve` runs the trial while gRPC is
imported, so it costs no time.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pjw.errors import ConfigError, describe_errno
from pjw.launcher.spawn import INIT_PROGRAM, place_words
from pjw.launcher.visible import Place, mounts_of, places_of, read_mounts
from pjw.server.config import ServerConfig

# Making a job takes milliseconds. An init that takes this long waits for a file system that does not answer.
INIT_SECONDS: Final = 10.0
# the directories that init mounts over on every host
NEEDED: Final = ("/dev", "/proc", "/run", "/sys", "/tmp")  # noqa: S108 - the host's, never opened
# with --tell, init writes this before each step that it is about to take (init/report.c)
_STEP: Final = "pjw-init: about to "
_EVERY_ID: Final = ["0", "0", "4294967295"]


class Trial:
    """An init that has been started; `finish` must be called."""

    def __init__(self, places: Sequence[Place], hidden: Sequence[str], uid: int) -> None:
        """Start an init as a job of user id *uid*. Raises ConfigError."""
        self.places: Final = places
        command = [INIT_PROGRAM, "--tell", "--uid", str(uid), "--gid", str(uid), *place_words(places)]
        command += [word for path in hidden for word in ("--hide", path)]
        command += ["--", "/bin/sh", "-c", "exec cat /proc/self/mountinfo"]
        try:
            self._init: Final = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # a process group of its own for the init and its first stage, which waits for the init
                process_group=0,
            )
        except OSError as error:
            raise ConfigError(f"cannot run {INIT_PROGRAM}: {describe_errno(error.errno or 0)}") from None

    def finish(self) -> bytes:
        """Wait for the table of mounts that the job saw. Raises ConfigError, which names the failed step."""
        with self._init as init:
            try:
                table, said = init.communicate(timeout=INIT_SECONDS)
            except subprocess.TimeoutExpired as hung:
                # The first stage ends at once. Do not wait for the init: it waits for the file system.
                os.killpg(init.pid, signal.SIGKILL)
                _, steps = _told(hung.stderr or b"")
                at = f": about to {steps[-1]}" if steps else ""
                why = f"the init does not end within {INIT_SECONDS:.0f} s{at}"
                raise ConfigError(f"no job can be made here: {why}") from None
        if init.returncode:
            words = _told(said)[0] or "the init ended without a word"
            raise ConfigError(f"no job can be made here: {words}", hint=_hint())
        return table


def trial_of(config: ServerConfig, uid: int) -> Trial:
    """Start a trial that has the view of jobs with this configuration. Raises PjwError."""
    hidden = (*filter(None, (config.state_dir, config.scratch_dir)), *config.hidden_paths)
    return Trial(places_of(config.visible_paths, hidden, read_mounts()), hidden, uid)


def _told(stderr: bytes) -> tuple[str, list[str]]:
    """Split the output of an init with --tell: its message, and the steps it was about to take."""
    lines = stderr.decode(errors="replace").splitlines()
    steps = [line.removeprefix(_STEP) for line in lines if line.startswith(_STEP)]
    return "\n".join(line for line in lines if not line.startswith(_STEP)).strip(), steps


def _hint() -> str | None:
    """Return a hint when this host has a known obstacle to making jobs."""
    if Path("/proc/self/uid_map").read_text().split() != _EVERY_ID:
        return (
            "this is a user namespace (an unprivileged container), which has no user ids for jobs:"
            " run pjwd in a privileged container, in a virtual machine or on the host"
        )
    if "/" not in mounts_of(read_mounts()):
        return "the root directory is no mount point (a chroot): mount --rbind DIR DIR, then chroot to DIR"
    if lacking := [path for path in NEEDED if not os.path.isdir(path)]:
        return f"jobs have their own directories at {', '.join(lacking)}: make them on the host"
    return None
