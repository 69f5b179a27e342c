"""The date jumps, both ways, with jobs, limits, stops and readers under way. It sets the machine's clock."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from pjw.v1 import job_worker_pb2 as pb
from tests.support.scene import OTHERS_SECONDS, Scene, config_of
from tests.support.service import Service, wait_for
from tests.support.worker_harness import uid_range

HOUR = 3600
DAY = 24 * HOUR


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A service of its own with jobs and a reader under way; the machine is thrown away afterwards."""
    uid_first = uid_range()
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    # certificates that hold also when the date has gone back
    with clock_moved(-DAY):
        service = Service(directory, config=config_of(uid_first))
    scene = Scene(service.start(), uid_first)
    yield scene
    scene.close()
    assert scene.service.stop() == 0
    assert "Traceback" not in scene.service.log.read_text()


@contextmanager
def clock_moved(seconds: int) -> Iterator[None]:
    """Set the date by so much, and back at the end."""
    offset = time.time() - time.monotonic()
    subprocess.run(["date", "--set", f"@{time.time() + seconds}"], check=True, stdout=subprocess.DEVNULL)
    assert abs(time.time() - time.monotonic() - offset - seconds) < 5
    try:
        yield
    finally:
        now = time.monotonic() + offset
        subprocess.run(["date", "--set", f"@{now}"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("seconds", [HOUR, 30 * DAY, -HOUR // 2])
def test_the_date_jumps(scene: Scene, seconds: int) -> None:
    """Limits of time and grace periods are seconds that pass; streams go on; an end is by the clock."""
    stub = scene.stub("alice")
    limits = pb.Limits(time_max_seconds=8)
    began = time.monotonic()
    limited = stub.Start(
        pb.StartRequest(command="exec sleep 1000", limits=limits), timeout=OTHERS_SECONDS
    ).job
    deaf = "trap 'echo heard' TERM; echo ready; while :; do sleep 1; done"
    stubborn = stub.Start(pb.StartRequest(command=deaf)).job
    wait_for(lambda: scene.output_size(stubborn.id) > 0)
    stop = pb.StopRequest(id=stubborn.id)
    stop.grace.seconds = 6
    asked = time.monotonic()
    stopping = stub.Stop.future(stop, timeout=60)
    wait_for(lambda: scene.output_size(stubborn.id) > len("ready\n"))
    with clock_moved(seconds):
        assert scene.job_of(limited.id, "alice").state == pb.JOB_STATE_RUNNING
        scene.goes_on()
        scene.others_unharmed()
        assert stopping.result().job.reason == pb.END_REASON_STOPPED
        assert 5.5 < time.monotonic() - asked < 60
        wait_for(lambda: scene.job_of(limited.id, "alice").HasField("end"), 60)
        assert 7.5 < time.monotonic() - began < 90
        ended = scene.job_of(limited.id, "alice")
        assert ended.reason == pb.END_REASON_TIMED_OUT
        assert abs(ended.end.ToNanoseconds() / 1e9 - ended.start.ToNanoseconds() / 1e9 - seconds) < 90
        # and a restart meanwhile changes nothing of it
        scene.service.stop()
        scene.service.start()
        assert scene.job_of(limited.id, "alice") == ended
        scene.goes_on()
        scene.end_known(clock_moved=seconds)
        scene.output_whole()
        scene.nothing_left()


def test_the_date_jumps_past_every_certificate(scene: Scene) -> None:
    """Calls are refused, on any connection; jobs go on, and when the date is right again all is known."""
    with clock_moved(400 * DAY):
        with pytest.raises(grpc.RpcError) as caught:
            scene.stub("alice").Get(pb.GetRequest(id=scene.job), timeout=OTHERS_SECONDS)
        assert caught.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
        scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def put(scene: Scene, command: str, **waits: object) -> pb.Job:
    """Put a job of alice's into the queue."""
    job = pb.QueuedJob(start=pb.StartRequest(command=command), **waits)  # type: ignore[arg-type]
    [queued] = scene.stub("alice").Submit(pb.SubmitRequest(jobs=[job]), timeout=OTHERS_SECONDS).jobs
    return queued


def test_the_date_is_set_while_jobs_wait(scene: Scene) -> None:
    """A pause before an attempt is seconds that pass; a time not to be started before is by the clock."""
    later = put(scene, "true", not_before=Timestamp(seconds=int(time.time()) + 600))
    failed = put(scene, "[ $PJW_ATTEMPT = 2 ]", retry=pb.Retry(times=1, backoff=Duration(seconds=5)))
    wait_for(lambda: scene.job_of(failed.id, "alice").HasField("retried_as"))
    retried_as = scene.job_of(failed.id, "alice").retried_as
    with clock_moved(-HOUR):
        began = time.monotonic()
        wait_for(lambda: scene.job_of(retried_as, "alice").HasField("end"), 60)
        assert time.monotonic() - began > 2
        assert scene.job_of(retried_as, "alice").exit_code == 0
        # jobs that wait for nothing but their turn have it, and so they have after a restart
        scene.service.stop()
        scene.service.start()
        now = put(scene, "true")
        wait_for(lambda: scene.job_of(now.id, "alice").HasField("end"), 60)
        assert scene.job_of(later.id, "alice").state == pb.JOB_STATE_QUEUED
    with clock_moved(HOUR):
        # within a minute by itself; a look at the queue is what comes with a job
        put(scene, "true")
        wait_for(lambda: scene.job_of(later.id, "alice").HasField("end"), 60)
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()
