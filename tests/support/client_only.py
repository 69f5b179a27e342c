"""A client without the packages of the service: what `pip install pjw-client` brings, of what is here.

With *as_windows* its interpreter also lacks modules, and names of `os` and `signal`, that Windows lacks.
"""

import os
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME: Final = "pjw-client"
# What `from pjw.cli.main import run` and the library may not need.
_AS_WINDOWS: Final = """\
import os
import signal
import sys

for name in ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"):
    # an import raises ModuleNotFoundError
    sys.modules[name] = None
for name in (
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "fchown", "getegid", "geteuid",
    "getgid", "getgroups", "getuid", "memfd_create", "mkfifo", "openpty", "pidfd_open", "pipe2",
    "set_blocking",
):
    delattr(os, name)
os.supports_dir_fd.clear()
for name in ("SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGTTOU", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
    delattr(signal, name)
"""


def install(directory: Path, *, extra: str = "", as_windows: bool = False) -> Path:
    """Make the environment in a new directory; its directory of programs, with `python` and `pjw`."""
    venv.create(directory, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))
    for package in packages(extra):
        for file in package.files or ():
            # not its programs, which are outside of the directory of packages
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(str(file.locate()))
    programs = directory / "bin"
    [entry] = metadata.distribution(NAME).entry_points.select(group="console_scripts")
    program = programs / entry.name
    program.write_text(f"#!{programs}/python\nfrom {entry.module} import {entry.attr}\n{entry.attr}()\n")
    program.chmod(0o755)
    if as_windows:
        (site / "as_windows.py").write_text(_AS_WINDOWS)
        # not sitecustomize, of which some systems have one of their own
        (site / "as_windows.pth").write_text("import as_windows\n")
    return programs


def packages(extra: str = "") -> list[metadata.Distribution]:
    """The package itself and all that it needs, each once."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(NAME, one) for one in {"", extra}]
    while left:
        name, of = left.pop()
        if (name, of) in seen:
            continue
        seen.add((name, of))
        package = found.setdefault(name, metadata.distribution(name))
        for needed in map(Requirement, package.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": of}):
                left += [(canonicalize_name(needed.name), one) for one in ("", *needed.extras)]
    return list(found.values())


def environment(home: Path) -> dict[str, str]:
    """The variables of somebody whose home that is, and who has no settings yet."""
    return {"PATH": os.environ["PATH"], "HOME": str(home)}
