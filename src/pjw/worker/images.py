"""Images: which jobs have them, and their removal.

The operator's are in the launcher's table, by their digests (launcher/image_store.py). What a client has
loaded lies among its workspaces, by a key that is the name of none: a job of the client's has unpacked it
there. So it counts, is counted, and goes as they do. Nobody writes to it any more once that job has ended.
"""

import asyncio
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from pjw.errors import (
    ImageNotFoundError,
    InvalidJobError,
    LauncherGoneError,
    PjwError,
    WorkspaceBusyError,
    WorkspaceNotFoundError,
)
from pjw.model import Image, ImageConfig, JobSpec, check_image, is_image_key
from pjw.worker import image_rows
from pjw.worker.job_rows import from_ns
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.settings import WorkerSettings
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background
from pjw.worker.workspaces import Workspaces

# Nothing tells when a failing disk works again.
_RETRY_SECONDS: Final = 60
# The end of a job is reported when it is on the disk, and a failed start before its row is gone.
_PAUSE_SECONDS: Final = 0.2

# a client's name, and the key of one of its images
_Key = tuple[str, str]

log: Final = logging.getLogger(__name__)


class ImageReplacedError(Exception):
    """While a job was about to have an image, its name was given to another one, and the first one went."""


class Images:
    """Those of the operator and of all clients of one worker."""

    def __init__(
        self,
        store: JobStore,
        launcher: LauncherClient,
        workspaces: Workspaces,
        settings: WorkerSettings,
        background: Background,
    ) -> None:
        self._store: Final = store
        self._launcher: Final = launcher
        self._workspaces: Final = workspaces
        self._settings = settings
        self._background: Final = background
        # jobs that have one, or are about to
        self._uses: Final[Counter[_Key]] = Counter()
        self._of_job: Final[dict[int, _Key]] = {}
        # which have no name any more, and which of these are being removed
        self._nameless: Final[set[_Key]] = set()
        self._going: Final[set[_Key]] = set()
        self._due: Final = asyncio.Event()
        # the operator's table as it was last read, and how to tell whether it still is so
        self._table: tuple[tuple[int, int, int], dict[str, Any]] = ((0, 0, 0), {"names": {}, "images": {}})
        workspaces.left.append(self._give_back_of)
        workspaces.freed.append(self._on_freed)

    def reconfigure(self, settings: WorkerSettings) -> None:
        """From now on this number, this age and this default."""
        self._settings = settings
        self._due.set()

    # --- who has them

    @asynccontextmanager
    async def taken(self, client_name: str, spec: JobSpec) -> AsyncGenerator[tuple[JobSpec, str], None]:
        """Yield what is executed for a spec, and the key of the image that the job has meanwhile, or "".

        Raises ImageNotFoundError and InvalidJobError; ImageReplacedError in the place of a refusal that the
        image which has the name now may not meet.
        """
        default = self._settings.default_image
        if default and not spec.image:
            spec = replace(spec, image=default)
        if not spec.image:
            yield spec, ""
            return
        key, config = await self._find(client_name, spec.image)
        if not is_image_key(spec.workspace):
            spec = config.applied_to(spec)
        use = (client_name, key)
        # no await since it was found: a removal sees it
        self._uses[use] += 1
        try:
            yield spec, key
        except InvalidJobError:
            if await self.is_replaced(client_name, spec.image, key):
                raise ImageReplacedError from None
            raise
        finally:
            self._give_back(use)

    async def is_replaced(self, client_name: str, name: str, key: str) -> bool:
        """Whether another image has the name now of one that a job was about to have; "" without one."""
        if not key:
            return False
        try:
            return (await self._find(client_name, name))[0] != key
        except ImageNotFoundError:
            return False

    async def _find(self, client_name: str, name: str) -> tuple[str, ImageConfig]:
        found = await self._store.transact(image_rows.find, client_name, name, time.time_ns())
        if found is not None:
            return found
        table = await self._operators()
        if name not in table["names"]:
            raise ImageNotFoundError(name)
        digest: str = table["names"][name]
        return digest, _config_of(table["images"][digest])

    async def _operators(self) -> dict[str, Any]:
        """Return the operator's table, as it is now."""
        descriptor = await self._launcher.request_image_table()
        try:
            status = os.fstat(descriptor)
            key = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._table[0] != key:
                self._table = (key, json.loads(os.pread(descriptor, status.st_size, 0)))
        finally:
            os.close(descriptor)
        return self._table[1]

    def begun(self, client_name: str, key: str, job_id: int) -> None:
        """Note that a job has an image, from before its launch to after its end."""
        if key:
            self._of_job[job_id] = (client_name, key)
            self._uses[client_name, key] += 1

    def of(self, job_id: int) -> str:
        """Return the key of the image that a job has; "" without one."""
        return self._of_job.get(job_id, ("", ""))[1]

    def _give_back_of(self, job_id: int) -> None:
        if (use := self._of_job.pop(job_id, None)) is not None:
            self._give_back(use)

    def _give_back(self, use: _Key) -> None:
        self._uses[use] -= 1
        if not self._uses[use]:
            del self._uses[use]
            self._remove_if_unused(use)

    async def config_of(self, job_id: int) -> ImageConfig:
        """How the job began that has an image: for another command in it."""
        client_name, key = self._of_job[job_id]
        if is_image_key(key):
            own = await self._store.transact(image_rows.config, client_name, key)
            return own or ImageConfig()
        facts = (await self._operators())["images"].get(key)
        return ImageConfig() if facts is None else _config_of(facts)

    async def listed(self, owner: str | None) -> Sequence[Image]:
        """Return the images of a client, or with None of all clients, and the operator's."""
        own = await self._store.transact(image_rows.listed, owner)
        found = [replace(image, jobs=self._uses[image.client_name, key]) for image, key in own]
        table = await self._operators()
        for name, digest in sorted(table["names"].items()):
            facts = table["images"][digest]
            made = from_ns(facts["made_ns"])
            jobs = sum(
                count for use, count in self._uses.items() if use[1] == digest and owner in (None, use[0])
            )
            found.append(
                Image(name, digest, made, made, facts["bytes"], facts["inodes"], jobs, "", _config_of(facts))
            )
        # of one name a client's own goes first, as it does for its jobs
        return sorted(found, key=lambda image: (image.name, not image.client_name, image.client_name))

    # --- loading

    async def begin_load(self, client_name: str, name: str) -> str:
        """Return the key of an image that will be unpacked. Raises LimitReachedError for too many."""
        check_image(name)
        await self._store.transact(image_rows.require_room, client_name, name, self._settings.quotas)
        return f"@{secrets.token_hex(8)}"

    async def keep(self, client_name: str, key: str, name: str, digest: str, config: ImageConfig) -> Image:
        """Give an image that was unpacked its name; it is on the disk then."""
        now = datetime.now(UTC)
        image = Image(name, digest, now, now, client_name=client_name, config=config)
        await self._store.transact(image_rows.require_room, client_name, name, self._settings.quotas)
        before = await self._store.transact(image_rows.keep, client_name, key, image, time.time_ns())
        await self._store.sync()
        if before is not None:
            self._leave(client_name, before)
        return next(
            (each for each in await self.listed(client_name) if each.name == name and each.client_name), image
        )

    def drop(self, client_name: str, key: str) -> None:
        """Remove what was unpacked for nothing, when the job that unpacked it has ended."""
        self._leave(client_name, key)

    # --- removal

    async def remove(self, client_name: str, name: str) -> None:
        """Take the name from an image of a client's own; it goes with the last job that has it.

        Raises ImageNotFoundError.
        """
        key = await self._store.transact(image_rows.take_name, client_name, name)
        await self._store.sync()
        self._leave(client_name, key)

    def _leave(self, client_name: str, key: str) -> None:
        self._nameless.add((client_name, key))
        self._remove_if_unused((client_name, key))

    def _on_freed(self, client_name: str) -> None:
        for use in [use for use in self._nameless if use[0] == client_name]:
            self._remove_if_unused(use)

    def _remove_if_unused(self, use: _Key) -> None:
        is_used = use in self._uses or use[1] in self._workspaces.busy(use[0])
        if use in self._nameless and use not in self._going and not is_used:
            self._going.add(use)
            self._background.spawn(self._remove_or_log(use))

    async def _remove_or_log(self, use: _Key) -> None:
        client_name, key = use
        try:
            with suppress(WorkspaceNotFoundError):
                # that is so where the job that was to unpack it did not come to be
                while await self._is_named_by_job(use):  # noqa: ASYNC110  no event tells
                    await asyncio.sleep(_PAUSE_SECONDS)
            await self._store.transact(image_rows.gone, client_name, key)
            self._nameless.discard(use)
        except LauncherGoneError:
            raise
        except PjwError as error:
            log.error("cannot remove an image of %s: %s", client_name, error)
            # the next event, or the next worker, tries again
            self._going.discard(use)
        else:
            self._going.discard(use)

    async def _is_named_by_job(self, use: _Key) -> bool:
        """Remove the directory of an image; true while a job that has ended has a row that says otherwise."""
        try:
            await self._workspaces.remove(*use)
        except WorkspaceBusyError:
            return True
        return False

    async def begin(self) -> list[tuple[int, str, str]]:
        """Find which images jobs have, and remove those without a name that none has.

        Gives jobs that unpack what nobody waits for any more, with their clients and keys.
        """
        for job_id, client_name, key in await self._store.transact(image_rows.running):
            self.begun(client_name, key, job_id)
        for lost in self._workspaces.missing:
            await self._store.transact(image_rows.lose, *lost)
        unpacking = []
        for client_name, key, unpacked_by in await self._store.transact(image_rows.nameless):
            if unpacked_by is not None:
                unpacking.append((unpacked_by, client_name, key))
            else:
                self._leave(client_name, key)
        return unpacking

    async def run(self) -> None:
        """Remove what no job has been started with for too long; for ever."""
        while True:
            self._due.clear()
            seconds: float | None = _RETRY_SECONDS
            try:
                seconds = await self._remove_unused()
            except LauncherGoneError:
                raise
            except PjwError as error:
                log.error("cannot look after images: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._due.wait()

    async def _remove_unused(self) -> float | None:
        age = self._settings.retention.image_age_seconds
        if not age:
            return None
        before_ns = time.time_ns() - age * 1_000_000_000
        for client_name, name, key in await self._store.transact(image_rows.unused, before_ns):
            if (client_name, key) in self._uses:
                # a job that has it was started long ago
                await self._store.transact(image_rows.find, client_name, name, time.time_ns())
                continue
            log.info("removing the image %s of %s: it is unused for longer than is kept", name, client_name)
            await self.remove(client_name, name)
        first_ns = await self._store.transact(image_rows.first_unused_ns)
        if first_ns is None:
            # the next one to be loaded becomes too old no sooner
            return min(float(age), 86_400.0)
        return min(max(first_ns / 1e9 + age - time.time() + 1, 1.0), 86_400.0)


def _config_of(facts: dict[str, Any]) -> ImageConfig:
    return image_rows.config_of(json.dumps(facts["config"]))
