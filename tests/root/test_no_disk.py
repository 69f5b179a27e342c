"""A state directory that is on no disk: limits of disk IO cannot be, at the start and at a reload."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import Service, instance_cgroups, wait_for

NO_IO_LIMITS: Final = "[limits]\nio_wbps_max = 0\nio_wiops_max = 0\n"
HINT: Final = "put the state directory on a disk, or set the io limits to 0"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A file system without a disk."""
    point = tmp_path / "memory"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "pjw-test", point], check=True)
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.fixture
def diskless(memory: Path, make_service: Callable[..., Service]) -> Service:
    """A service whose state is there, not yet started."""
    service = make_service(clients=("alice",))
    service.state = memory / "state"
    return service


def test_a_start_with_them_is_refused_in_words(diskless: Service) -> None:
    """The defaults have them; nothing of the launcher that was asked is left."""
    done = subprocess.run(diskless.command(), capture_output=True, text=True, timeout=60, check=False)
    why = f"cannot find the disk of {diskless.state}: tmpfs has none"
    assert (done.returncode, done.stderr) == (1, f"pjwd: error: {why}\nhint: {HINT}\n")
    assert instance_cgroups(diskless.state) == []


def test_they_cannot_come_by_a_reload(diskless: Service) -> None:
    """The reload says so and takes nothing, and jobs start as before; a file without them is taken."""
    diskless.config = NO_IO_LIMITS
    diskless.start()
    why = f"cannot find the disk of {diskless.state}: tmpfs has none"
    assert reloaded(diskless, "[clients]\nrunning_max = 1\n", f"hint: {HINT}") == [
        f"ERROR: reload: kept the old configuration: {why}",
        f"ERROR: reload: hint: {HINT}",
    ]
    with diskless.stub() as stub:
        jobs = [stub.Start(pb.StartRequest(command="sleep 100")).job for _ in range(2)]
        assert [job.limits.io_wbps_max for job in jobs] == [0, 0]
        asked = pb.StartRequest(command="true", limits=pb.Limits(io_wbps_max=1024**2))
        with pytest.raises(grpc.RpcError, match="cannot limit the disk IO of job 3: no disk was named"):
            stub.Start(asked)
        assert reloaded(diskless, NO_IO_LIMITS + "pids_max = 77\n", "is new") == [
            "INFO: reload: the configuration is new: limits"
        ]
        assert stub.Start(pb.StartRequest(command="true")).job.limits.pids_max == 77


def test_where_there_is_a_disk_they_come_by_a_reload(make_service: Callable[..., Service]) -> None:
    """Also when there were none at the start: they are in the cgroup of the next job."""
    service = make_service(clients=("alice",), config=NO_IO_LIMITS).start()
    reloaded(service, "[limits]\nio_wbps_max = 1048576\n", "is new")
    service.start_job("sleep 100")
    names = ("blkio.throttle.write_bps_device", "io.max")
    paths = [group / name for group in service.job_cgroups() for name in names]
    [text] = [path.read_text() for path in paths if path.exists()]
    assert "1048576" in text


def reloaded(service: Service, config: str, last: str) -> list[str]:
    """What the log says, until it says the last of it, of a configuration that has become this."""
    start = service.log.stat().st_size
    (service.directory / "pjwd.toml").write_text(config)
    os.kill(service.pid, signal.SIGHUP)

    def said() -> list[str]:
        lines = service.log.read_bytes()[start:].decode().splitlines(keepends=True)
        return [line.strip().removeprefix("pjwd: ") for line in lines if line.endswith("\n")]

    wait_for(lambda: any(last in line for line in said()[1:]))
    return said()[1:]
