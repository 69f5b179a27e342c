"""What a job says: the file that init appends to, and those who follow it."""

from pjw.output.follower import follow
from pjw.output.inotify import Inotify
from pjw.output.log import OutputLog

__all__ = ["Inotify", "OutputLog", "follow"]
