"""The library of jobs: `Worker` starts, shows, stops and follows them."""

from pjw.worker.reading import Part
from pjw.worker.settings import DiskMarks, QueueSlots, Quotas, Retention, Shares, WorkerSettings
from pjw.worker.worker import Worker

__all__ = [
    "DiskMarks",
    "Part",
    "QueueSlots",
    "Quotas",
    "Retention",
    "Shares",
    "Worker",
    "WorkerSettings",
]
