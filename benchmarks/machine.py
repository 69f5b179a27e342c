"""Describe the machine and its software: a figure without them says little."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path


def describe() -> dict[str, str]:
    """Return processor, cores, kernel, cgroup version and the versions of the important libraries."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("pjw", "grpcio", "protobuf")},
    }
