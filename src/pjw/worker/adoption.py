"""After a restart: the jobs of the worker before us, those that still run and those that ended meanwhile."""

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pjw.errors import KernelError, LauncherGoneError, PjwError
from pjw.launcher.protocol import LAUNCH_SECONDS
from pjw.output import Inotify
from pjw.worker.endings import Endings
from pjw.worker.gpus import Gpus
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import Ended, LauncherClient, RunningInit
from pjw.worker.network import Network
from pjw.worker.parts import Parts
from pjw.worker.reading import live_job
from pjw.worker.state_dir import StateDir
from pjw.worker.status_record import parse_record
from pjw.worker.stopping import within
from pjw.worker.tasks import Background, Flag

# Seconds to wait for the removal of jobs that are in no table; then we serve while it goes on.
STRAYS_SECONDS: Final = 5

log: Final = logging.getLogger(__name__)


async def adopt(
    parts: Parts,
    endings: Endings,
    gpus: Gpus,
    network: Network,
) -> None:
    """Take over the jobs that still run, record those that ended, and remove strays.

    A stray is a job that no client can ask for any more. Call it once, before anything else.
    """
    state, launcher, inotify, jobs = parts.state, parts.launcher, parts.inotify, parts.jobs
    await state.store.forget_secrets()
    boot_id = _boot_id()
    rebooted = await state.store.boot_id() not in (None, boot_id)
    await gpus.begin()
    admitted = await state.store.admitted()
    ended: list[LiveJob] = []
    for job in await state.store.alive():
        # the operator may have taken names back meanwhile
        withdrawn = network.withdrawn(job.client_name, job.allow)
        init = await launcher.request_adopt(job.id, job, withdrawn)
        if withdrawn and init is not None:
            log.warning("job %d may not reach %s any more: not offered now", job.id, ", ".join(withdrawn))
        if job.id in admitted:
            if not await _is_executed(state, inotify, job.id, init, rebooted=rebooted):
                await _put_back(state, launcher, job.id, init)
                continue
            await state.store.settled(job.id)
        live = live_job(state, inotify, job)
        live.launch_over.set()
        jobs.adopt(live)
        if init is None:
            ended.append(live)
            continue
        live.exec_seen(parse_record(state.read_status(job.id)).started_ns)
        endings.watch(live, init)
    await asyncio.gather(*(endings.finish(live, rebooted=rebooted) for live in ended))
    await _remove_strays(launcher, jobs.live, parts.background)
    # Only now: a worker that is killed before this has not reported yet which jobs the last boot took.
    await state.store.set_boot_id(boot_id)


async def _is_executed(
    state: StateDir, inotify: Inotify, job_id: int, init: RunningInit | None, *, rebooted: bool
) -> bool:
    """Return whether the command of a job admitted from the queue was executed, or may have been.

    Its init records that at once, and no kill of pjwd takes it back. After a power cut it is unknown.
    """
    if rebooted:
        return True
    if init is not None and not _has_begun(state, job_id):
        # It has its order, and is about to execute the command; or it has none, and ends with its launcher.
        await _begun_or_ended(state, inotify, job_id, init)
        if not init.ended.done():
            return True
    return _has_begun(state, job_id)


def _has_begun(state: StateDir, job_id: int) -> bool:
    return parse_record(state.read_status(job_id)).started_ns is not None


async def _begun_or_ended(state: StateDir, inotify: Inotify, job_id: int, init: RunningInit) -> None:
    """Return when an init has executed its command, or has ended, and after LAUNCH_SECONDS at the latest."""
    changed = asyncio.Event()
    init.ended.add_done_callback(lambda _: changed.set())
    watch = None
    # without it: the files of a job are made before its init can have an order, so it ends
    with suppress(KernelError):
        watch = inotify.watch(state.status_path(job_id), changed.set)
    try:
        async with asyncio.timeout(LAUNCH_SECONDS):
            while not (init.ended.done() or _has_begun(state, job_id)):
                await changed.wait()
                changed.clear()
    except TimeoutError:
        log.warning("job %d, which was being started from the queue, has neither begun nor ended", job_id)
    finally:
        if watch is not None:
            inotify.unwatch(watch)


async def _put_back(state: StateDir, launcher: LauncherClient, job_id: int, init: RunningInit | None) -> None:
    """Put a job that was admitted and not executed back into the queue; its init and files go first."""
    if init is not None:
        os.close(init.pidfd)
    try:
        await launcher.request_remove(job_id)
    except LauncherGoneError:
        raise
    except PjwError as error:
        log.error("cannot remove what was made for job %d of the queue: %s", job_id, error)
    await state.in_thread(state.remove_job, job_id)
    await state.store.put_back(job_id)
    log.info("job %d is in the queue again: pjwd ended before its command was executed", job_id)


async def _remove_strays(
    launcher: LauncherClient, live_jobs: Mapping[int, LiveJob], background: Background
) -> None:
    """Remove jobs that no client can ask for any more; a slow removal does not delay the start."""
    over = asyncio.get_running_loop().time() + STRAYS_SECONDS
    for job_id in await launcher.request_job_ids():
        if job_id not in live_jobs:
            removed = Flag()
            background.spawn(_remove_stray(launcher, job_id, removed))
            await within(max(0.0, over - asyncio.get_running_loop().time()), removed)


async def _remove_stray(launcher: LauncherClient, job_id: int, removed: Flag) -> None:
    # A cgroup or scratch directory without an unfinished row: its job ended and was recorded, and only the
    # removal is missing (or a power cut undid it); or the table was taken away, and then no client can ask
    # for the job.
    try:
        init = await launcher.request_adopt(job_id)
        if init is not None:
            os.close(init.pidfd)
            await launcher.request_kill(job_id, init_too=True)
            await _wait_for_end(launcher, job_id, init.ended)
        await launcher.request_remove(job_id)
    except LauncherGoneError:
        raise
    except PjwError as error:
        log.error("cannot remove what is left of job %d, of which no table knows: %s", job_id, error)
    finally:
        removed.set()


async def _wait_for_end(launcher: LauncherClient, job_id: int, ended: Ended) -> None:
    """Return when a job that was killed has ended; say so when that takes long."""
    _, late = await asyncio.wait({ended}, timeout=STRAYS_SECONDS)
    if late:
        words = (await launcher.request_remaining(job_id)).words
        log.error("job %d, of which no table knows, was killed and does not end: %s", job_id, words)
        await asyncio.wait({ended})


def _boot_id() -> str:
    """Return the id of this boot of the host (random(4)): a new one each time."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
