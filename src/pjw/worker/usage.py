"""The usage of jobs over their lives: samples, in a file for each job, of bounded length.

The longer a job has run, the further apart they are: from one a second, to SAMPLES_MAX for any life.
"""

import os
import struct
from collections.abc import Sequence
from typing import Final

from pjw.model import Job, UsageSample
from pjw.worker.job_rows import from_ns, to_ns

# At its fullest a file has three blocks of most file systems.
SAMPLES_MAX: Final = 256
# time in ns, then the members of UsageSample in their order
_SAMPLE: Final = struct.Struct("<6q")


def interval_seconds(age_seconds: float) -> int:
    """Return the seconds between the samples of a job of that age: a power of two."""
    interval = 1
    while age_seconds >= interval * SAMPLES_MAX:
        interval *= 2
    return interval


def append_sample(path: str, sample: UsageSample) -> None:
    """Add a sample; when the file is full, every second one goes first. Raises OSError.

    No crash between two steps of this costs more than samples: see `read_samples`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # bytes behind the last whole one were not written to its end
        count = os.fstat(descriptor).st_size // _SAMPLE.size
        if count >= SAMPLES_MAX:
            data = os.pread(descriptor, count * _SAMPLE.size, 0)
            # the later one of two, so that the newest stays
            kept = b"".join(
                data[start : start + _SAMPLE.size]
                for start in range(_SAMPLE.size, len(data), 2 * _SAMPLE.size)
            )
            os.pwrite(descriptor, kept, 0)
            os.ftruncate(descriptor, len(kept))
            count = len(kept) // _SAMPLE.size
        os.pwrite(descriptor, _packed(sample), count * _SAMPLE.size)
    finally:
        os.close(descriptor)


def read_samples(path: str) -> Sequence[UsageSample]:
    """Return the samples in a file, in the order of their times; none without a file. Raises OSError.

    A sample that is not later than the one before is left out: a power cut may leave zeros, a crash samples
    that were about to go, and a clock may be set back.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        data = os.pread(descriptor, 2 * SAMPLES_MAX * _SAMPLE.size, 0)
    finally:
        os.close(descriptor)
    samples: list[UsageSample] = []
    last_ns = 0
    for time_ns, *used in _SAMPLE.iter_unpack(data[: len(data) // _SAMPLE.size * _SAMPLE.size]):
        if time_ns > last_ns:
            samples.append(UsageSample(from_ns(time_ns), *used))
            last_ns = time_ns
    return samples


def with_end(samples: Sequence[UsageSample], job: Job) -> Sequence[UsageSample]:
    """Return the samples of a job, and its usage at its end when it has one."""
    if job.usage is None or job.end is None:
        return samples
    used = job.usage
    end = UsageSample(job.end, used.cpu_usage_usec, 0, used.io_read_bytes, used.io_write_bytes, 0)
    # one that was taken while it ended says less
    return [*(sample for sample in samples if sample.time < job.end), end]


def _packed(sample: UsageSample) -> bytes:
    return _SAMPLE.pack(
        to_ns(sample.time),
        sample.cpu_usage_usec,
        sample.memory_bytes,
        sample.io_read_bytes,
        sample.io_write_bytes,
        sample.pids,
    )
