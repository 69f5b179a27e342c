"""The program that unpacks archives in jobs: whatever it is given, nothing outside of its directory changes.

`PJW_ARCHIVE` may name another build of it, such as one with sanitizers.
"""

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from pjw.launcher.archive_program import ARCHIVE_PROGRAM

PROGRAM: Final = os.environ.get("PJW_ARCHIVE", ARCHIVE_PROGRAM)
_ALIVE: Final = "alive"
_SECONDS: Final = 30


def _entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), target
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def seeds() -> list[bytes]:
    """An archive of each kind of entry, hostile ones, and none."""
    end = bytes(2 * tarfile.BLOCKSIZE)
    whole = (
        _entry("d/", tarfile.DIRTYPE)
        + _entry("d/f", data=b"text\n")
        + _entry("s", tarfile.SYMTYPE, target="d")
    )
    return [
        whole + _entry("h", tarfile.LNKTYPE, target="d/f") + _entry("n" * 150, data=b"long") + end,
        _entry("up", tarfile.SYMTYPE, target="..") + _entry("up/canary", data=b"dead") + end,
        _entry("../canary", data=b"dead") + end,
        _entry("h", tarfile.LNKTYPE, target="../canary") + _entry("h", data=b"dead") + end,
        whole,
        b"no archive" * 60,
        b"",
    ]


def one_input(data: bytes) -> None:
    """Unpack it; it ends with 0 or with the reason, and the canary beside the directory is alive."""
    with tempfile.TemporaryDirectory(prefix="pjw-fuzz-") as scene:
        canary = Path(scene, "canary")
        canary.write_text(_ALIVE)
        command = [PROGRAM, "unpack", "", "in"]
        done = subprocess.run(
            command, cwd=scene, input=data, capture_output=True, timeout=_SECONDS, check=False
        )
        assert done.returncode in (0, 1), (done.returncode, done.stderr)
        assert done.returncode == 0 or b"error: cannot " in done.stderr, done.stderr
        assert canary.read_text() == _ALIVE and canary.stat().st_nlink == 1
        assert sorted(os.listdir(scene)) == ["canary", "in"]
