"""What a process has used, and holds, by the kernel's own count."""

import re
import time
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """The processor time of all threads so far, those that have ended included."""
    # clock_getcpuclockid(3) has no binding; /proc/PID/stat counts in hundredths of a second
    return time.clock_gettime((~pid << 3) | 2)


def pss_bytes(pid: int) -> int:
    """Memory, with each shared page divided among those who share it."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss") * 1024


def peak_rss_bytes(pid: int) -> int:
    """The most memory that it had at once since `forget_peak`."""
    return _kib(f"/proc/{pid}/status", "VmHWM") * 1024


def forget_peak(pid: int) -> None:
    """Begin anew with the peak (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _kib(path: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    assert found, (path, name)
    return int(found[1])
