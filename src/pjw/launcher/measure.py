"""The usage of jobs while they run: read from their cgroups, and nothing changed there."""

import errno
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from pjw.errors import KernelError
from pjw.launcher.cgroup import Cgroup
from pjw.launcher.protocol import Measured, Measurement

_EPOCH: Final = datetime.fromtimestamp(0, UTC)


def measure(jobs: Iterable[tuple[int, Cgroup]]) -> Measured:
    """Measure jobs of this launcher; leave out those that have ended meanwhile. Raises KernelError."""
    found = []
    for job_id, cgroup in jobs:
        try:
            sample = cgroup.measure()
        except KernelError as error:
            # half removed; ENODEV: between the open and the read
            if error.errno in (errno.ENOENT, errno.ENODEV):
                continue
            raise
        found.append(
            Measurement(
                job_id=job_id,
                time_ns=(sample.time - _EPOCH) // timedelta(microseconds=1) * 1000,
                cpu_usage_usec=sample.cpu_usage_usec,
                memory_bytes=sample.memory_bytes,
                io_read_bytes=sample.io_read_bytes,
                io_write_bytes=sample.io_write_bytes,
                pids=sample.pids,
            )
        )
    return Measured(tuple(found))
