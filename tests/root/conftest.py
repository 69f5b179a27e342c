"""A service for all tests that need no other, and the proof that nothing stays behind."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service import Service


@pytest.fixture
def make_service() -> Iterator[Callable[..., Service]]:
    """Make services of one's own; each is ended, and must leave no cgroup, when its jobs were stopped."""
    made: list[Service] = []
    directories: list[Path] = []

    def make(**options: object) -> Service:
        # not tmp_path: pytest keeps the last three, and jobs write much
        directories.append(Path(tempfile.mkdtemp(prefix="pjw-test-")))
        service = Service(directories[-1], **options)  # type: ignore[arg-type]
        made.append(service)
        return service

    yield make
    try:
        for service in made:
            finish(service)
    finally:
        for directory in directories:
            shutil.rmtree(directory)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """One service for every test that is content with the defaults."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-"))
    service = Service(directory).start()
    yield service
    try:
        finish(service)
    finally:
        shutil.rmtree(directory)


def finish(service: Service) -> None:
    """Stop every job and the service; nothing of them may be left."""
    if service.process is None:
        return
    for client in ("alice", "bob"):
        if not (service.certs / f"{client}.crt").exists():
            continue
        for job_id in service.ok("list", client=client).split():
            service.ok("stop", job_id, client=client)
    left = service.job_cgroups()
    scratch = list((service.state / "scratch").iterdir())
    code = service.stop()
    assert (left, scratch, code) == ([], [], 0), service.log.read_text()
