"""Output that waits, since the disk of pjwd is full: told wherever somebody waits (U2)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.root.test_operator import scraped
from tests.root.test_sandbox import free_port
from tests.support.disks import MIB, fill, small_disk
from tests.support.service import Running, Service

WORDS = "waits: the disk of pjwd takes no more of its output"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 24 MB."""
    with small_disk(24) as point:
        yield point


def said(process: Running) -> str:
    """The next line on its stderr."""
    assert process.stderr is not None
    return process.stderr.readline().decode()


def test_a_full_disk_is_told_where_one_waits(disk: Path, make_service: Callable[..., Service]) -> None:
    """By `run`, `wait` and `logs`, in `get` and `list`, in the log once, by a metric; until there is room."""
    port = free_port()
    config = f'disk.free_bytes_min = 0\ndisk.free_inodes_min = 0\nmetrics.listen = "127.0.0.1:{port}"\n'
    service = make_service(config=config)
    service.state = disk / "state"
    service.start()

    def held() -> float:
        return scraped(port)["pjw_jobs_output_held", ()]

    assert held() == 0
    job = "1"
    fill(disk / "rest", leave=2 * MIB)
    with service.popen("run", f"head -c {4 * MIB} /dev/zero; exit 3") as run:
        words = said(run)
        assert words == f"pjw: job {job} {WORDS}\n"

        # two that look while it is so already, one of them at once
        with service.popen("wait", job) as wait, service.popen("logs", job) as logs:
            assert said(wait) == said(logs) == words
            assert json.loads(service.ok("get", job))["detail"] == WORDS
            assert WORDS in service.ok("list", "--format", "table")
            assert held() == 1
            # who comes later sees what was noted before
            service.stop()
            service.start()
            assert json.loads(service.ok("get", job))["detail"] == WORDS
            assert held() == 1
            (disk / "rest").unlink()
            output = [len(each.communicate(timeout=60)[0]) for each in (run, logs)]
            assert (run.returncode, wait.communicate(timeout=60)[0], output) == (3, b"3\n", [4 * MIB] * 2)
    assert json.loads(service.ok("get", job))["detail"] == ""
    assert held() == 0
    # by each of the two services
    assert service.log.read_text().count(f"job {job} of alice {WORDS}; so may others") == 2
