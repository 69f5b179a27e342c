"""What a job says: the file that init appends to, and those who follow it."""

from pjw.output.follower import follow
from pjw.output.inotify import Inotify
from pjw.output.log import Head, OutputLog, no_head

__all__ = ["Head", "Inotify", "OutputLog", "follow", "no_head"]
