"""Images where the kernel's module of overlays is on the list of those that nobody may load: takes it out."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import have_image, small_root
from tests.support.service import BIN, Service

# scripts/test-vm gives it to a machine whose own modules it is not among
MODULE = Path("overlay.ko")
FORBIDDEN = Path("/etc/modprobe.d/pjw-test.conf")


@pytest.fixture
def without_overlays() -> Iterator[None]:
    """As long as this is there, no overlay can be mounted."""
    FORBIDDEN.parent.mkdir(exist_ok=True)
    FORBIDDEN.write_text("blacklist overlay\ninstall overlay /bin/false\n")
    subprocess.run(["rmmod", "overlay"], check=True)
    yield
    FORBIDDEN.unlink()
    load = ["insmod", str(MODULE)] if MODULE.exists() else ["modprobe", "overlay"]
    subprocess.run(load, check=True)


@pytest.mark.usefixtures("without_overlays")
def test_a_start_is_refused_in_words() -> None:
    """`pjwd check` names it, jobs without an image run, and one with an image is refused."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    try:
        service = Service(directory)
        service.state.mkdir()
        have_image(service.state, "small", small_root(directory / "root"))
        check = [str(BIN / "pjwd"), "check", "--state-dir", str(service.state)]
        said = subprocess.run(check, capture_output=True, text=True, check=False).stdout
        assert "images: jobs cannot have one: " in said
        service.start()
        assert service.ok("run", "echo without") == "without\n"
        code, words = service.refused("run", "--image", "small", "true")
        said = "pjw: error: cannot mount the overlay of the image: no such device (ENODEV)"
        assert (code, words) == (1, f"{said}\nhint: ask the operator: pjwd check\n")
        assert service.stop() == 0
    finally:
        shutil.rmtree(directory)
