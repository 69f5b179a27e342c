"""What a job is: the library. `Worker` starts, shows, stops and follows jobs."""

from pjw.worker.logs import Part
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
