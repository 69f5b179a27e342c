"""Arrays as a client has them: a real pjwd, a real pjw, the library, and kills with an array half done."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from pjw import AsyncClient, JobSpec, QueueSpec
from pjw.errors import JobNotFoundError
from pjw.model import After, JobState
from pjw.v1 import job_worker_pb2 as pb
from tests.root.test_queue_service import MANY, Executions
from tests.support.service import CALL_SECONDS, Service, wait_for


def test_a_sweep(make_service: Callable[..., Service]) -> None:
    """Start, look, follow, stop and remove, the whole and one of it, as somebody types it."""
    service = make_service(config=MANY).start()
    sweep = service.ok(
        "start", "--array", "1-6%2", "--name", "sweep", "echo $PJW_ARRAY_INDEX; exec sleep 300"
    ).strip()
    wait_for(lambda: json.loads(service.ok("get", "sweep"))["array"]["running"] == 2)
    assert json.loads(service.ok("get", sweep))["array"] == {
        "indices": "1-6%2",
        "count": 6,
        "waiting": 4,
        "running": 2,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
    }
    assert service.ok("queue").split() == [sweep]
    assert "array 1-6%2: 4 wait, 2 run" in service.at_terminal("queue")
    assert "array 1-6%2: 4 wait, 2 run" in service.at_terminal("list")
    waits = json.loads(service.ok("get", f"{sweep}_5"))
    assert (waits["id"], waits["state"], waits["arrayId"], waits["arrayIndex"]) == ("0", "queued", sweep, 5)
    element = json.loads(service.ok("get", f"{sweep}_2"))
    assert (element["state"], element["arrayIndex"], element["array"]) == ("running", 2, None)
    assert re.search(rf"^ +{sweep}_2 ", service.at_terminal("list", "--array", sweep), re.MULTILINE)
    assert len(service.ok("list", "--array", sweep).split()) == 2
    assert service.ok("logs", "--no-follow", f"{sweep}_2") == "2\n"
    assert service.ok("hold", f"{sweep}_4") == f"{sweep}_4\n"
    stopped = json.loads(service.ok("stop", "--grace", "0", f"{sweep}_1", f"{sweep}_5"))
    assert [(job["arrayIndex"], job["reason"]) for job in stopped] == [(1, "stopped"), (5, "cancelled")]
    wait_for(lambda: json.loads(service.ok("get", f"{sweep}_3"))["state"] == "running")
    assert json.loads(service.ok("get", f"{sweep}_4"))["held"]
    assert service.ok("release", f"{sweep}_4") == f"{sweep}_4\n"
    code, words = service.refused("logs", sweep)
    assert code == 1
    assert f"job {sweep} is an array, and has no output of its own" in words
    assert f"name one of its elements, 1-6%2: {sweep}_INDEX" in words
    assert service.refused("rm", f"{sweep}_3")[0] == 1
    assert service.refused("get", f"{sweep}_7") == (1, f"pjw: error: no job {sweep}_7\n")
    after = service.ok("start", "--after", f"{sweep}_2:any", "true").strip()
    last = service.ok("start", "--after", f"{sweep}:failed", "true").strip()
    service.ok("stop", "--grace", "0", f"{sweep}_2")
    assert service.ok("wait", after) == "0\n"
    assert json.loads(service.ok("stop", "--grace", "0", "sweep"))["array"]["waiting"] == 0
    done = service.pjw("wait", sweep)
    assert done.stdout in (b"137\n", b"143\n")
    assert re.fullmatch(
        rf"pjw: of the 6 elements of array {sweep} \d failed, \d were cancelled\n", done.stderr.decode()
    )
    assert service.ok("wait", last) == "0\n"
    assert service.pjw("wait", f"{sweep}_5").stderr.decode() == (
        f"pjw: error: job {sweep}_5 was never started: it was stopped before its turn came\n"
    )
    lines = [
        json.loads(line)
        for line in service.ok("events", "--since", "0", "--no-follow", "--job", sweep).splitlines()
    ]
    assert [line["job"]["state"] for line in lines] == ["queued", "running", "exited"]
    elements = [
        json.loads(line)
        for line in service.ok("events", "--since", "0", "--no-follow", "--job", f"{sweep}_2").splitlines()
    ]
    assert [line["job"]["state"] for line in elements][:3] == ["queued", "starting", "running"]
    assert {line["job"]["arrayIndex"] for line in elements} == {2}
    assert service.ok("rm", f"{sweep}_2") == f"{sweep}_2\n"
    assert service.ok("rm", sweep) == f"{sweep}\n"
    assert service.ok("list", "--array", sweep) == ""
    removed = [
        json.loads(line)["job"] for line in service.ok("events", "--since", "0", "--no-follow").splitlines()
    ]
    assert {job["arrayIndex"] for job in removed if job["arrayId"] == sweep} >= {1, 2, 3, 5}
    assert "pjw run shows the output of one job" in service.refused("run", "--array", "1-2", "true")[1]
    assert "'1-' is neither an index nor a range" in service.refused("start", "--array", "1-", "true")[1]


def test_a_file_with_arrays(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """An array is a key of a job; what comes after it waits for all of it, or for one element."""
    service = make_service(config=MANY).start()
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        '[[job]]\nname = "sweep"\ncommand = "exit $((PJW_ARRAY_INDEX == 3))"\narray = "1-3"\nhold = true\n'
        '[[job]]\ncommand = "true"\nafter = "sweep:failed"\n'
        '[[job]]\ncommand = "true"\nafter = ["sweep_2"]\n'
    )
    sweep, whole, one = service.ok("submit", str(jobs)).split()
    assert service.ok("release", "sweep") == "sweep\n"
    assert service.ok("wait", whole, one) == "0\n0\n"
    jobs.write_text('[[job]]\ncommand = "true"\narray = "3-1"\n')
    assert "'3-1' has no element" in service.refused("submit", str(jobs))[1]
    assert (
        service.ok("list", "--array", sweep, "--failed").strip()
        == json.loads(service.ok("get", f"{sweep}_3"))["id"]
    )


async def test_both_libraries(make_service: Callable[..., Service]) -> None:
    """An element is named where an id is."""
    service = make_service(config=MANY).start()
    with service.client() as alice:
        array = alice.start(JobSpec("echo $PJW_ARRAY_INDEX", queue=QueueSpec(array="1-3", held=True)))
        [after] = alice.submit([JobSpec("true", queue=QueueSpec(after=[After(array.id, element=3)]))])
        assert alice.hold(f"{array.id}_2").held
        assert alice.stop(f"{array.id}_1").reason == "cancelled"
        alice.release(array.id)
        assert alice.wait(f"{array.id}_2").succeeded
        assert b"".join(alice.logs(f"{array.id}_3")) == b"3\n"
        assert alice.wait(after.id).succeeded
        assert {job.array_index for job in alice.list(array_id=array.id)} == {1, 2, 3}
        with pytest.raises(JobNotFoundError, match=f"no job {array.id}_9"):
            alice.get(f"{array.id}_9")
    async with AsyncClient(service.address, *service.files()) as alice:
        assert (await alice.get(f"{array.id}_2")).ref == f"{array.id}_2"
        assert b"".join([each async for each in alice.logs(f"{array.id}_2")]) == b"2\n"
        assert {job.array_index async for job in alice.list(array_id=array.id)} == {1, 2, 3}
        await alice.delete(f"{array.id}_2")
        done = await alice.wait(array.id)
        assert done.array is not None
        assert (done.array.succeeded, done.array.cancelled) == (2, 1)
        await alice.delete(array.id)
        with pytest.raises(JobNotFoundError):
            await alice.get(f"{array.id}_3")


def test_arrays_of_others(make_service: Callable[..., Service]) -> None:
    """NOT_FOUND for another client, whatever is asked, of the whole and of one; bad indices are refused."""
    service = make_service(clients=("alice", "bob")).start()
    start = pb.StartRequest(command="true")
    with service.stub() as stub:
        request = pb.SubmitRequest(jobs=[pb.QueuedJob(start=start, array="1-9", held=True)])
        [array] = stub.Submit(request, timeout=CALL_SECONDS).jobs
        for wrong in ("1-", "1,1", "0-1000000"):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Submit(
                    pb.SubmitRequest(jobs=[pb.QueuedJob(start=start, array=wrong)]), timeout=CALL_SECONDS
                )
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with service.stub("bob") as stub:
        for element in (None, 1):
            after = pb.QueuedJob(start=start, after=[pb.Dependency(id=array.id, element=element)])
            asked: list[tuple[Callable[..., object], Message]] = [
                (stub.Get, pb.GetRequest(id=array.id, element=element)),
                (stub.Wait, pb.WaitRequest(id=array.id, element=element)),
                (stub.Stop, pb.StopRequest(id=array.id, element=element)),
                (stub.Hold, pb.HoldRequest(id=array.id, element=element)),
                (stub.Release, pb.ReleaseRequest(id=array.id, element=element)),
                (stub.Delete, pb.DeleteRequest(id=array.id, element=element)),
                (stub.Submit, pb.SubmitRequest(jobs=[after])),
            ]
            for call, message in asked:
                with pytest.raises(grpc.RpcError) as refused:
                    call(message, timeout=CALL_SECONDS)
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Logs(pb.LogsRequest(id=array.id, element=element), timeout=CALL_SECONDS))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert not stub.List(pb.ListRequest(array_id=array.id), timeout=CALL_SECONDS).jobs
    service.ok("stop", str(array.id))


def test_each_element_runs_once_whatever_is_killed(make_service: Callable[..., Service]) -> None:
    """Server, launcher or both, with the array half done: no element is lost, none runs twice."""
    service = make_service(config=MANY).start()
    chance, count = random.Random(), 300
    array = service.ok("start", "--array", f"1-{count}%6", "echo ran").strip()
    executions = Executions(service.state / "jobs", service.directory / "kept")
    with executions.watched(0.02):
        for kills in range(1, 7):
            # when another part of it has ended
            wait_for(lambda part=kills * count // 10: _ended(service, array) >= part, 300)  # type: ignore[misc]
            service.kill(chance.choice(["server", "launcher", "both"]))
            service.start()
        assert service.ok("wait", array) == "0\n"
    with service.client() as alice:
        done = alice.get(array)
        jobs = list(alice.list(array_id=array))
    assert done.array is not None
    assert (done.array.succeeded, done.array.failed, done.array.cancelled) == (count, 0, 0)
    assert Counter(job.array_index for job in jobs) == Counter(range(1, count + 1))
    assert {(job.state, job.reason) for job in jobs} == {(JobState.EXITED, "completed")}
    assert executions.counted() == dict.fromkeys((job.id for job in jobs), 1)


def _ended(service: Service, array: str) -> int:
    counts = service.job(int(array)).array
    return counts.succeeded + counts.failed + counts.cancelled
