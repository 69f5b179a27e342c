"""The alerts of packaging/prometheus, by Prometheus's own tool where it is (in Debian's prometheus)."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "packaging/prometheus/pjw.rules.yml"),
        ("test", "rules", "tests/data/pjw.rules.test.yml"),
    ],
)
def test_alerts_say_what_they_should(arguments: tuple[str, ...]) -> None:
    """They are well formed, silent when all is well, and come when it is not."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
