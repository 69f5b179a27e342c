"""Keeps an ended job's usage in its status file, where it outlives the job's cgroup.

The file's space is allocated before the job starts, so that a full disk cannot lose this. Init writes its
records at the beginning of the file (docs/launcher-protocol.md); worker/status_record.py reads all of it.
"""

import os
from contextlib import suppress
from typing import Final

from pjw.model import Usage

# Far behind all that init may write.
ACCOUNTS_OFFSET: Final = 1024


def keep_accounts(status: int, usage: Usage) -> bool:
    """Write a job's usage into its status file, by a descriptor; tell whether all of it is there.

    One pwrite(2), and no sync: it is to survive the kill of any process. A power cut takes the cgroup, too.
    """
    line = (
        f"used {usage.cpu_usage_usec} {usage.memory_peak_bytes} {usage.io_read_bytes}"
        f" {usage.io_write_bytes} {usage.oom_kills}\n"
    ).encode()
    with suppress(OSError):
        return os.pwrite(status, line, ACCOUNTS_OFFSET) == len(line)
    return False
