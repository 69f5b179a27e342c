"""A neighbour that means harm, with legal jobs or at the port, and everything that pjw promises to others."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from tests.support.scene import OTHERS_SECONDS, Scene, config_of
from tests.support.service import Service
from tests.support.worker_harness import uid_range

NEIGHBOUR: Final = "mallory"
ATTACK_SECONDS: Final = 6
# each with the least disk IO that a client may ask for
HARM: Final = (
    "while :; do :; done",
    "while :; do dd if=/dev/zero of=f bs=1M count=8 conv=fsync 2>/dev/null; done",
    "f() { f | f & }; f; sleep 1000",
    "exec /usr/bin/python3 -I -S -c 'a = []\nwhile True: a.append(b\"x\" * (1 << 20))'",
    "yes",
)
LEAST: Final = pb.Limits(io_wbps_max=1 << 20, io_wiops_max=100, output_max_bytes=64 << 20)


@pytest.fixture
def three(make_service: Callable[..., Service]) -> Iterator[Scene]:
    """A scene whose service has a third client."""
    uid_first = uid_range()
    service = make_service(clients=("alice", "bob", NEIGHBOUR), config=config_of(uid_first))
    scene = Scene(service.start(), uid_first)
    yield scene
    scene.close()


def finish(scene: Scene) -> None:
    """Afterwards: every promise."""
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def test_jobs_of_a_hostile_neighbour(three: Scene) -> None:
    """They compute, write, fork, fill memory and write output as fast as they may; each can be stopped."""
    stub = three.stub(NEIGHBOUR)
    started = [
        stub.Start(pb.StartRequest(command=command, limits=LEAST), timeout=OTHERS_SECONDS).job.id
        for command in HARM
    ]
    for _ in range(3):
        three.goes_on()
        three.others_unharmed()
    for job_id in started:
        ended = stub.Stop(pb.StopRequest(id=job_id, grace=Duration()), timeout=OTHERS_SECONDS).job
        assert ended.state == pb.JOB_STATE_EXITED
    finish(three)


@contextmanager
def attack(service: Service, name: str) -> Iterator[None]:
    """An attacker of the port, in a process of its own, beside the block."""
    command = [sys.executable, "-m", "tests.support.http2", name, service.address, str(service.certs)]
    with subprocess.Popen([*command, str(ATTACK_SECONDS), NEIGHBOUR], stdout=subprocess.DEVNULL) as attacker:
        yield
    assert attacker.returncode == 0


@pytest.mark.parametrize("name", ["idle", "reset", "pipelined"])
def test_a_port_under_attack(three: Scene, name: str) -> None:
    """Connections without a word, calls that are taken back, more calls than can be answered."""
    with attack(three.service, name):
        for _ in range(3):
            three.goes_on()
            three.others_unharmed()
    finish(three)
