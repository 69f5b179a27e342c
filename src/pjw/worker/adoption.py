"""After a restart: the jobs of the worker before us, those that still run and those that ended meanwhile."""

import asyncio
import os
from pathlib import Path

from pjw.output import Inotify
from pjw.worker.endings import Endings
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient, readable
from pjw.worker.logs import live_job
from pjw.worker.quota import RunningJobs
from pjw.worker.record import parse_record
from pjw.worker.state_dir import StateDir


async def adopt(
    state: StateDir,
    launcher: LauncherClient,
    inotify: Inotify,
    live_jobs: dict[int, LiveJob],
    running: RunningJobs,
    endings: Endings,
) -> None:
    """Take over what still runs, write down what ended, and remove what nobody asks for any more.

    Call it once, before anything else.
    """
    boot_id = _boot_id()
    rebooted = await state.store.boot_id() not in (None, boot_id)
    ended: list[LiveJob] = []
    for job in await state.store.alive():
        live = live_jobs[job.id] = live_job(state, inotify, job)
        live.launch_over.set()
        running.adopt(job.client_name)
        _, pidfd = await launcher.request_adopt(job.id)
        if pidfd is None:
            ended.append(live)
            continue
        live.exec_seen(parse_record(state.read_status(job.id)).started_ns)
        endings.watch(live, pidfd)
    await asyncio.gather(*(endings.finish(live, rebooted=rebooted) for live in ended))
    for job_id in await launcher.request_job_ids():
        if job_id not in live_jobs:
            await _remove_stray(launcher, job_id)
    # Only now: whoever is killed before this has not told yet which jobs the last boot took.
    await state.store.set_boot_id(boot_id)


async def _remove_stray(launcher: LauncherClient, job_id: int) -> None:
    # A cgroup or scratch directory without an unfinished row: its job ended and was written
    # down, and only the removal is missing (or a power cut undid it); or the table was taken
    # away, and then nobody can ask for the job.
    _, pidfd = await launcher.request_adopt(job_id)
    if pidfd is not None:
        await launcher.request_kill(job_id, init_too=True)
        with os.fdopen(pidfd, "rb", closefd=True):
            await readable(pidfd)
    await launcher.request_remove(job_id)


def _boot_id() -> str:
    """Which boot of the host this is (random(4)): a new one each time."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
