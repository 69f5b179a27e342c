"""What tests of the kernel share: a service, a state directory, pjw-init; and that nothing stays behind."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker
from tests.support.init_harness import JOB_UID, Harness, build_init, processes_of
from tests.support.scene import Scene, config_of
from tests.support.service import Service, end_all, instance_cgroups, wait_for
from tests.support.worker_harness import Bench, open_bench, uid_range

# The marks of tests that run only when -m names them. CI runs the slow ones, but not the long ones.
ASKED_FOR: Final = {"slow": "a minute or more", "long": "many minutes"}


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks of tests that take long; make Ctrl-C testable."""
    for mark, takes in ASKED_FOR.items():
        config.addinivalue_line("markers", f"{mark}: takes {takes}; runs only when asked for with -m {mark}")
    # a shell starts what is in its background with SIGINT ignored, and our children would inherit that
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests that take long, unless -m names their mark."""
    for item in items:
        for mark in ASKED_FOR:
            if item.get_closest_marker(mark) and mark not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: ask for it with -m {mark}"))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A state directory, and the proof that nothing stays behind."""
    async with open_bench() as bench:
        yield bench


@pytest.fixture
async def worker(bench: Bench) -> Worker:
    """A worker with the default settings."""
    return await bench.open()


@pytest.fixture
def make_service() -> Iterator[Callable[..., Service]]:
    """Make services of one's own; each is ended, and must leave no cgroup, when its jobs were stopped."""
    made: list[Service] = []
    directories: list[Path] = []

    def make(**options: object) -> Service:
        # not tmp_path: pytest keeps the last three, jobs write much, and /tmp may be no disk
        directories.append(Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib")))
        service = Service(directories[-1], **options)  # type: ignore[arg-type]
        made.append(service)
        return service

    yield make
    with ExitStack() as stack:
        for directory in directories:
            stack.callback(shutil.rmtree, directory)
        for service in made:
            stack.callback(finish, service)


@pytest.fixture
def scene(make_service: Callable[..., Service]) -> Iterator[Scene]:
    """A service of its own, with jobs and a reader under way, for a fault to happen to."""
    uid_first = uid_range()
    scene = Scene(make_service(config=config_of(uid_first)).start(), uid_first)
    yield scene
    scene.close()


@contextmanager
def shared_service() -> Iterator[Service]:
    """A service with the defaults for many tests, which leaves nothing behind."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    service = Service(directory).start()
    yield service
    try:
        finish(service)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """One service for every test that is content with the defaults."""
    with shared_service() as made:
        yield made


@pytest.fixture
def idle_service(service: Service) -> Service:
    """The same service, without running jobs that other tests have left."""
    _stop_jobs(service)
    return service


def finish(service: Service) -> None:
    """Stop every job and the service; nothing of them may be left, and the log shows no bug of ours."""
    if service.process is None:
        # its launcher tidies up when it sees that the server was killed, unless it was killed as well
        with suppress(AssertionError):
            wait_for(lambda: not instance_cgroups(service.state), 5)
        end_all(service.state)
        return
    try:
        _stop_jobs(service)
    except grpc.RpcError:
        # a test that failed half way: the next one must not find what it left
        service.stop()
        end_all(service.state)
        raise
    # some tests have clients of their own, whose last job may be about to end
    with suppress(AssertionError):
        wait_for(lambda: not service.job_cgroups() and not service.scratch(), 30)
    left = service.job_cgroups()
    scratch = service.scratch()
    code = service.stop()
    log = service.log.read_text()
    # the launcher ends when it sees that its server has
    wait_for(lambda: not instance_cgroups(service.state), 10)
    assert (left, scratch, code) == ([], [], 0), log
    assert os.listdir(service.state / "scratch") == []
    assert "Traceback" not in log, log


def _stop_jobs(service: Service) -> None:
    for crt in service.certs.glob("*.crt"):
        if crt.stem in ("ca", "server"):
            continue
        with service.stub(crt.stem) as stub:
            for job in stub.List(pb.ListRequest()).jobs:
                if not job.HasField("end"):
                    stub.Stop(pb.StopRequest(id=job.id, grace=Duration()), timeout=30)


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pjw-init, built once."""
    return build_init(tmp_path_factory.mktemp("init"))


@pytest.fixture
def init(binary: Path, tmp_path: Path) -> Iterator[Harness]:
    """A harness whose inits are gone afterwards, and their jobs' processes with them."""
    harness = Harness(binary, tmp_path)
    yield harness
    harness.close()
    # the kernel may still be about to collect them
    wait_for(lambda: processes_of(JOB_UID) == [])


@pytest.fixture
def visible() -> Iterator[Path]:
    """A directory of the host's that a job can see: not below /tmp or /run."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
