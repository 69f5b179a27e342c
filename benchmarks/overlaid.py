"""`crun run` in a root as engines make it: an overlay of an image and of the container's directory.

An engine mounts that overlay, has crun run in it, and removes the container's files. A separate program does
so here, one life after the other. It counts the processor time of all its children, and its own for the two
mounts; it leaves the other work of an engine out.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.peers import NAME, bundle_config, why_missing, within

_LIVES: Final = """
import ctypes, json, os, resource, shutil, sys, time
own, lower, command, count = json.loads(sys.argv[1])
os.chdir(own)
libc, used = ctypes.CDLL(None, use_errno=True), 0.0
layers = f"lowerdir={lower},upperdir=upper,workdir=work,volatile".encode()
for _ in range(count):
    for name in ("upper", "work"):
        os.mkdir(name)
    began = time.process_time()
    assert libc.mount(b"overlay", b"rootfs", b"overlay", 6, layers) == 0, os.strerror(ctypes.get_errno())
    used += time.process_time() - began
    pid = os.posix_spawnp(command[0], command, os.environ)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    began = time.process_time()
    assert libc.umount2(b"rootfs", 0) == 0
    used += time.process_time() - began
    assert code == 0, code
    for name in ("upper", "work"):
        shutil.rmtree(name)
children = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used + children.ru_utime + children.ru_stime)
"""


class Overlaid:
    """A container that is ready to be run."""

    def __init__(self, bundle: Path, image: Path) -> None:
        self._bundle: Final = bundle
        self._image: Final = image

    def seconds(self, count: int) -> float:
        """Return the processor time of some lives."""
        crun = [
            "crun",
            "--root",
            str(self._bundle / "state"),
            "run",
            "--bundle",
            str(self._bundle),
            f"{NAME}-overlaid",
        ]
        told = json.dumps([str(self._bundle), str(self._image), crun, count])
        command = [*within("crun"), sys.executable, "-I", "-S", "-c", _LIVES, told]
        return float(subprocess.check_output(command, stdin=subprocess.DEVNULL))


@contextmanager
def opened(directory: Path, image: Path) -> Iterator[Overlaid | None]:
    """Give a container of `/bin/true` in an image; None, with the reason on stderr, if that fails."""
    bundle = directory / "overlaid"
    (bundle / "rootfs").mkdir(parents=True)
    config = bundle_config(["/bin/true"], f"{NAME}-overlaid")
    config["root"] = {"path": "rootfs", "readonly": False}
    # the image has its own
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/usr"]
    (bundle / "config.json").write_text(json.dumps(config))
    why = why_missing("crun")
    found = Overlaid(bundle, image)
    if why is None:
        try:
            found.seconds(1)
        except subprocess.CalledProcessError as error:
            why = f"it ends with {error.returncode}"
    if why is not None:
        print(f"no crun run with an overlay beside pjw: {why}", file=sys.stderr)
    try:
        yield None if why else found
    finally:
        shutil.rmtree(bundle)
