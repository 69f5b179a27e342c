"""Images on kernels that lack something: `pjwd check` names it, and a start is read-only or refused in words.

A filter of system calls has this kernel answer as one that lacks the feature (tests/support/denied.py).
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import denied
from tests.support.images import have_image, small_root
from tests.support.service import BIN, Service

WRITE: Final = "touch /etc/made 2>/dev/null && echo written || echo refused; cat /etc/os-release; id -un"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A root with a shell."""
    if why := denied.why_not():
        pytest.skip(why)
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield small_root(where / "root")
    shutil.rmtree(where)


@pytest.fixture
def lacking(make_service: Callable[..., Service], root: Path) -> Callable[[str], Service]:
    """Start a service on a kernel that lacks something, and has an image of the operator's."""

    def start(kind: str) -> Service:
        service = make_service()
        service.state.mkdir()
        have_image(service.state, "small", root)
        service.pjwd = service.directory / "pjwd"
        words = " ".join(denied.command(kind, str(BIN / "pjwd")))
        service.pjwd.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        service.pjwd.chmod(0o755)
        return service.start()

    return start


def check(service: Service) -> list[str]:
    """What `pjwd check` says of images there."""
    done = subprocess.run(
        [service.pjwd, "check", "--state-dir", service.state], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if "images: " in line)
    return [line.strip() for line in lines[at : at + 2]]


def test_no_mounts_that_map_users(lacking: Callable[[str], Service], root: Path) -> None:
    """The operator's images are read-only, with or without an init that waited; a client's own is not."""
    service = lacking("maps")
    assert check(service) == [
        "warning  images: the root that jobs have of one is read-only",
        "hint: this takes Linux 5.19, and scratch directories on ext4, xfs or btrfs (docs/images.md)",
    ]
    for _ in range(2):
        assert service.ok("run", "--image", "small", WRITE) == "refused\nID=small\npjw-job\n"
    assert service.ok("run", "--image", "small", "touch /tmp/a /run/job/b && echo own") == "own\n"
    service.ok("image", "load", "mine", f"dir:{root}")
    assert service.ok("run", "--image", "mine", WRITE) == "written\nID=small\npjw-job\n"
    service.ok("image", "rm", "mine")


def test_no_overlays(lacking: Callable[[str], Service]) -> None:
    """A job with an image is refused in words, at once and in the queue, and leaves nothing; others run."""
    service = lacking("overlays")
    finding, hint = check(service)
    assert finding.startswith("warning  images: jobs cannot have one: ")
    assert ("overlay" in finding, hint) == (True, "hint: jobs without an image need nothing of this")
    words = "cannot mount the overlay of the image: no such device (ENODEV)"
    for _ in range(2):
        code, said = service.refused("run", "--image", "small", "true")
        assert (code, said) == (1, f"pjw: error: {words}\nhint: ask the operator: pjwd check\n")
    assert service.ok("run", "echo without") == "without\n"
    queued = service.ok("start", "--queue", "--image", "small", "true").strip()
    service.pjw("wait", queued)
    shown = json.loads(service.ok("get", queued))
    assert (shown["reason"], shown["detail"]) == ("start_failed", words)
    assert service.scratch() == []
