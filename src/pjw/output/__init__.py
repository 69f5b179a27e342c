"""The output of a job: the file that init appends to, and the readers that follow it."""

from pjw.output.follower import follow
from pjw.output.inotify import Inotify
from pjw.output.log import FramePrefix, OutputLog, describe_job_file, is_cut_short, no_head
from pjw.output.tail import start_of_tail
from pjw.output.times import follow_with_times, start_of_time

__all__ = [
    "FramePrefix",
    "Inotify",
    "OutputLog",
    "describe_job_file",
    "follow",
    "follow_with_times",
    "is_cut_short",
    "no_head",
    "start_of_tail",
    "start_of_time",
]
