"""What each client may use of the host beside others (S5): weights, sums, promised memory."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from pjw.worker.settings import WAITING_INITS
from tests.support.service import CALL_SECONDS, Service, instance_cgroups, reloaded, wait_for, waiting_ids

MIB: Final = 1024**2
BURN: Final = "while :; do :; done"
# So much processor time of both together is measured: ticks and bursts of the machine are small beside it.
BURNT_USEC: Final = 1_500_000
HOLD: Final = (
    "/usr/bin/python3",
    "-ISc",
    "x = b'x' * (64 << 20); print('up', flush=True); __import__('time').sleep(1000)",
)


@contextmanager
def on_one_processor() -> Iterator[None]:
    """What is started meanwhile has one: there weights say who gets it."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def quota(stub: JobWorkerServiceStub) -> pb.GetQuotaResponse:
    """What a client is told of itself."""
    return stub.GetQuota(pb.GetQuotaRequest(), timeout=CALL_SECONDS)


def part_of(one: JobWorkerServiceStub, other: JobWorkerServiceStub) -> float:
    """The part that one client gets of what both use, for a while from now on."""

    def used() -> tuple[int, int]:
        first, second = (quota(stub).use.cpu_usage_usec for stub in (one, other))
        return first - began[0], second - began[1]

    began = (0, 0)
    began = used()
    wait_for(lambda: sum(used()) > BURNT_USEC, 60)
    mine, others = used()
    return mine / (mine + others)


def client_value(service: Service, names: set[str]) -> set[int]:
    """The values of files of one of these names in the cgroups of clients."""
    return {
        int(path.read_text().split()[0])
        for top in instance_cgroups(service.state)
        for path in top.glob("client-*/*")
        if path.name in names
    }


def test_clients_weigh_what_the_operator_says_however_many_jobs_they_have(
    make_service: Callable[..., Service],
) -> None:
    """Six jobs of 100 beside one of 300 get a quarter; a reload has the same jobs weigh the same."""
    with on_one_processor():
        service = make_service(config="[clients.by_name.bob]\nweight = 300\n").start()
    with service.stub("alice") as alice, service.stub("bob") as bob:
        for stub, count in ((alice, 6), (bob, 1)):
            for _ in range(count):
                stub.Start(pb.StartRequest(command=BURN), timeout=CALL_SECONDS)
        assert (quota(bob).weight, quota(bob).total_weight) == (300, 400)
        assert 0.6 < part_of(bob, alice) < 0.9
        assert reloaded(service, "[clients]\nweight = 50\n")[-1].endswith("is new: clients")
        assert (quota(bob).weight, quota(bob).total_weight) == (50, 100)
        assert 0.35 < part_of(bob, alice) < 0.65
        # cpu.shares of v1, cpu.weight of v2
        assert client_value(service, {"cpu.shares", "cpu.weight"}) in ({512}, {50})
        service.stop()
        service.config = "[clients]\nweight = 200\n"
        service.start()
        assert client_value(service, {"cpu.shares", "cpu.weight"}) in ({2048}, {200})


def test_an_init_is_quick_beside_busy_jobs_and_its_job_is_like_the_others(
    make_service: Callable[..., Service],
) -> None:
    """A launch holds locks of the kernel that the launches of all other clients wait for (S5)."""
    service = make_service(config="").start()
    number = service.start_job("exec sleep 1000")
    wait_for(lambda: len(waiting_ids(service.state)) == WAITING_INITS)
    [path] = [
        path
        for top in instance_cgroups(service.state)
        for name in ("cpu.shares", "cpu.weight")
        for path in top.glob(f"client-*/job-{number}/{name}")
    ]
    weights = {int(each.read_text()) for each in path.parent.parent.glob(f"job-*/{path.name}")}
    usual, most = (1024, 262_144) if path.name == "cpu.shares" else (100, 10_000)
    assert weights == {usual, most}
    assert int(path.read_text()) == usual
    # as it is when the launcher is killed between the command's exec and this
    path.write_text(str(most))
    service.stop(signal.SIGKILL)
    service.start()
    assert int(path.read_text()) == usual


def test_a_client_s_sum_of_memory_ends_its_own_job(make_service: Callable[..., Service]) -> None:
    """Though the job's limit and the host's sum are higher; the neighbour's jobs go on."""
    service = make_service(config="[clients]\nmemory_max_bytes = 67108864\n").start()
    other = service.start_job("exec sleep 1000", "bob")
    with service.stub() as stub:
        request = pb.StartRequest(argv=pb.Argv(arguments=HOLD))
        job = stub.Start(request, timeout=CALL_SECONDS).job
        job = stub.Wait(pb.WaitRequest(id=job.id), timeout=CALL_SECONDS).job
    assert (job.signal, job.reason) == (9, pb.END_REASON_OOM_KILLED)
    assert service.job(other, "bob").state == pb.JOB_STATE_RUNNING


def test_a_reload_says_which_sums_it_cannot_set(make_service: Callable[..., Service]) -> None:
    """Less memory than is in use, less processor time than a running job has (v1). Nobody is ended."""
    service = make_service(config="").start()
    with service.stub() as stub:
        job = stub.Start(pb.StartRequest(argv=pb.Argv(arguments=HOLD)), timeout=CALL_SECONDS).job
        assert next(stub.Logs(pb.LogsRequest(id=job.id), timeout=CALL_SECONDS)).data == b"up\n"
        sums = "cpu_max_millicores = 300\n[clients.by_name.alice]\nmemory_max_bytes = 20971520\n"
        *words, last = reloaded(service, f"[clients]\n{sums}")
        assert last == "INFO: reload: the configuration is new: clients"
        begin = "WARNING: reload: share of alice: cannot set"
        memory = [line for line in words if line.startswith(f"{begin} memory_max_bytes of client ")]
        assert len(memory) == 1
        assert memory[0].endswith("are used")
        on_v1 = bool(client_value(service, {"cpu.shares"}))
        assert len(words) == 1 + on_v1
        assert not on_v1 or any(line.endswith("a running job may use more") for line in words)
        # what has been started since has no more than it should have, and so does not keep it from being set
        other = stub.Start(pb.StartRequest(command="exec sleep 1000"), timeout=CALL_SECONDS).job
        assert service.job(job.id).state == pb.JOB_STATE_RUNNING
        stub.Stop(pb.StopRequest(id=job.id), timeout=CALL_SECONDS)
        assert reloaded(service, f"stop_grace_seconds = 1\n[clients]\n{sums}") == [
            "INFO: reload: the configuration is new: stop_grace_seconds"
        ]
        assert client_value(service, {"cpu.cfs_quota_us", "cpu.max"}) == {6000}
        assert service.job(other.id).state == pb.JOB_STATE_RUNNING


def test_inits_that_wait_keep_no_sum_from_being_lowered(make_service: Callable[..., Service]) -> None:
    """They wait for jobs like the last one, which had more processor time than its client has from now on."""
    service = make_service(config="[limits]\ncpu_max_millicores = 100\n").start()
    with service.stub() as stub:
        stub.Start(pb.StartRequest(command="exec sleep 1000"), timeout=CALL_SECONDS)
        more = pb.Limits(cpu_max_millicores=900)
        job = stub.Start(pb.StartRequest(command="true", limits=more), timeout=CALL_SECONDS).job
        # a stop waits for the removal, too
        stub.Stop(pb.StopRequest(id=job.id), timeout=CALL_SECONDS)
        said = reloaded(service, "[limits]\ncpu_max_millicores = 100\n[clients]\ncpu_max_millicores = 300\n")
        assert said == ["INFO: reload: the configuration is new: clients"]


def test_memory_is_promised_once(make_service: Callable[..., Service]) -> None:
    """Starts at once get no further than the factor allows, nor after a restart; of others no word."""
    service = make_service(config="memory_overcommit = 0.5\n[host]\nmemory_max_bytes = 2147483648\n").start()
    words = (
        "cannot start the job with a memory limit of 512M (536870912 bytes): this server has no room for"
        " that now"
    )
    hint = "hint: ask for less memory, or wait for a job to end; the operator sets memory_overcommit"
    with ExitStack() as stack:
        stubs = [stack.enter_context(service.stub(name)) for name in ("alice", "bob")]

        def start(number: int) -> tuple[int, str]:
            """The id, or what is said instead."""
            request = pb.StartRequest(command="sleep 1000")
            try:
                return stubs[number % 2].Start(request, timeout=CALL_SECONDS).job.id, ""
            except grpc.RpcError as error:
                return 0, f"{error.code().name}: {error.details()}"

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(start, range(8)))
        assert answers.count((0, f"RESOURCE_EXHAUSTED: {words}")) == 6
        [(number, job_id), _] = [(number, answer[0]) for number, answer in enumerate(answers) if answer[0]]
        service.stop()
        service.start()
        assert service.refused("start", "true") == (1, f"pjw: error: {words}\n{hint}\n")
        whole = pb.StartRequest(command="true", limits=pb.Limits(memory_max_bytes=2**31))
        with pytest.raises(grpc.RpcError, match=r"all jobs of this server together may have 1G \(107"):
            stubs[0].Start(whole, timeout=CALL_SECONDS)
        stubs[number % 2].Stop(pb.StopRequest(id=job_id), timeout=CALL_SECONDS)
        assert start(0)[0]


def test_a_client_is_told_its_own_quota(make_service: Callable[..., Service]) -> None:
    """By pjw, as a table and as JSON; nobody is told another's but by a role."""
    service = make_service(
        clients=("alice", "bob", "vic"),
        config="memory_overcommit = 2\n[host]\nmemory_max_bytes = 4294967296\npids_max = 0\n"
        "[roles]\nviewers = ['vic']\n"
        "[clients]\nrunning_max = 7\n[clients.by_name.alice]\nweight = 300\nmemory_max_bytes = 1073741824\n",
    ).start()
    before = json.loads(service.ok("quota", "--format", "json"))
    assert before["use"] == {"memoryBytes": 0, "pids": 0, "cpuUsageUsec": 0}
    assert (before["weight"], before["totalWeight"], before["running"]) == (300, 300, 0)
    service.start_job("exec sleep 1000", "bob")
    service.start_job("echo four; exec sleep 1000")
    told = json.loads(service.ok("quota", "--format", "json"))
    assert (told["clientName"], told["weight"], told["totalWeight"]) == ("alice", 300, 400)
    assert (told["running"], told["runningMax"]) == (1, 7)
    assert (told["memoryPromisedBytes"], told["memoryPromisedMaxBytes"]) == (512 * MIB, 2048 * MIB)
    assert told["sums"]["memoryMaxBytes"] == 1024 * MIB
    assert told["ceilings"]["memoryMaxBytes"] == 1024 * MIB
    assert told["defaults"]["memoryMaxBytes"] == 512 * MIB
    assert told["use"]["memoryBytes"] > 0
    # init and the command; others wait for the next jobs
    assert told["use"]["pids"] >= 2
    wait_for(lambda: json.loads(service.ok("quota", "--format", "json"))["storedBytes"] == len("four\n"))
    table = service.at_terminal("quota").splitlines()
    assert max(map(len, table)) <= 80
    assert table[:3] == [
        "client  alice",
        "weight  300: 75 % of the processors while all clients with jobs are busy",
        "jobs    1 running, at most 7",
    ]
    assert [line.split() for line in table if line.startswith("promised")] == [["promised", "512M", "2G"]]
    code, words = service.refused("quota", "alice", client="bob")
    assert (code, words.splitlines()[0]) == (1, "pjw: error: bob may not see the quota of another client")
    assert service.refused("--all", "quota", "alice", client="bob")[1].startswith(
        "pjw: error: bob may not use GetQuota on the jobs of every client\n"
    )
    seen = json.loads(service.ok("--all", "quota", "alice", "--format", "json", client="vic"))
    assert {**seen, "use": 0} == {**told, "use": 0, "storedBytes": seen["storedBytes"]}
    assert service.refused("--all", "quota", "a b", client="vic")[1].startswith(
        "pjw: error: 'a b' is no client name"
    )
    # what nobody can be given is not promised either, though the operator has set no ceiling
    code, words = service.refused("start", "--memory", "1T", "true")
    assert words.splitlines()[0] == (
        "pjw: error: cannot start the job: --memory may be at most 4G on this server"
    )
