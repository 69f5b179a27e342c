"""The seed, line by line: its Getting Started session to the letter, and each thing that it puts in scope.

The table says which test shows a line; `test_every_line_of_the_scope_has_its_tests` keeps it true.

Library
    start, stop, query status, get the output     test_the_readme_program_uses_the_library
    stream the output of a running job            test_output_streams_while_the_job_runs
    output from the start of the execution        test_logs_are_whole_whenever_they_are_asked_for
    multiple concurrent clients                   test_followers_that_join_at_any_time_see_the_same_bytes
API
    gRPC: start, stop, get status, stream output  test_every_method_answers_over_grpc
    mTLS, client certificates verified            test_nobody_gets_in_with_a_bad_certificate
    strong cipher suites                          test_tls_1_2_is_refused_with_a_valid_certificate
    good crypto for certificates                  test_weak_certificates_are_refused_in_words
    no other authentication on top                test_every_method_answers_over_grpc
    simple authorization                          test_another_clients_job_is_answered_like_none
    CPU, memory and disk IO per job by cgroups    test_a_job_is_in_a_cgroup_with_all_its_limits
    PID, mount and network namespaces             test_a_job_has_its_own_namespaces
CLI
    connect, start, stop, status, output          test_getting_started_to_the_letter
    every action takes certificates as options    test_certificates_are_given_as_options
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, CALL_SECONDS, METHODS, Service, ask, wait_for

TESTS: Final = Path(__file__).parents[1]
LIMIT_FILES: Final = (
    *("cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.limit_in_bytes"),
    *("blkio.throttle.write_bps_device", "blkio.throttle.write_iops_device"),
    *("cpu.max", "memory.max", "io.max", "pids.max"),
)
TIME: Final = r'"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"'


def shown(job_id: int, command: str, end: str, code: str) -> str:
    """The seed's five keys in the seed's order and layout, as a pattern; more may follow."""
    return (
        rf'\A\{{\n  "id": "{job_id}",\n  "command": {re.escape(json.dumps(command))},\n'
        rf'  "start": {TIME},\n  "end": {end},\n  "exitCode": {code},\n'
    )


def test_getting_started_to_the_letter(make_service: Callable[..., Service]) -> None:
    """The session of the seed's first page, typed on a new service."""
    service = make_service().start()
    hello = 'echo "hello world"'
    assert service.ok("start", hello) == "1\n"
    assert service.ok("start", "sleep 300") == "2\n"
    assert service.ok("start", "trap 'exit 0' TERM; echo ready; sleep 300 & wait") == "3\n"
    assert service.ok("list") == "1\n2\n3\n"

    assert service.ok("logs", "1") == "hello world\n"
    got = service.ok("get", "1")
    assert re.match(shown(1, hello, TIME, "0"), got)
    assert list(json.loads(got))[:5] == ["id", "command", "start", "end", "exitCode"]
    assert re.match(shown(2, "sleep 300", "null", "null"), service.ok("get", "2"))

    with service.popen("logs", "3") as logs:
        assert logs.stdout is not None
        # from here on its trap is set
        assert logs.stdout.readline() == b"ready\n"
        stopped = service.ok("stop", "3")
        assert (logs.stdout.read(), logs.wait(10)) == (b"", 0)
    assert '"exitCode": 0,' in stopped
    assert service.ok("stop", "1") == got
    assert service.ok("logs", "1") == "hello world\n"


def test_stop_returns_once_the_process_has_terminated(service: Service) -> None:
    """When `pjw stop` is back the end is known, and neither process nor cgroup is left."""
    job_id = service.start_job("sleep 300 & sleep 300")
    groups = [group for group in service.job_cgroups() if group.name == f"job-{job_id}"]

    def pids() -> list[int]:
        return [int(pid) for pid in (groups[0] / "cgroup.procs").read_text().split()]

    # init, the shell, a sleep: the start is answered when the shell is executed, before it forks
    wait_for(lambda: len(pids()) >= 3)
    seen = pids()
    job = json.loads(service.ok("stop", str(job_id)))
    assert (job["state"], job["reason"], job["exitCode"], job["signal"]) == (
        "exited",
        "stopped",
        143,
        signal.SIGTERM,
    )
    assert job["end"] is not None
    assert not any(group.exists() for group in groups)
    assert not any(Path(f"/proc/{pid}/ns/pid").exists() for pid in seen)


def test_list_is_a_table_at_a_terminal_and_ids_in_a_pipe(make_service: Callable[..., Service]) -> None:
    """A person sees a table that fits the terminal, a script one id a line."""
    service = make_service().start()
    assert service.ok("list") == ""
    assert re.fullmatch(r" +ID  STATE +AGE  DURATION  EXIT +COMMAND\r\n", service.at_terminal("list"))
    service.start_job("exit 3")
    service.start_job("kill -9 $$")
    service.start_job("sleep 300; printf '\033[31m%s' " + "x" * 500)
    for job_id in "12":
        service.ok("logs", job_id)
    head, *lines = service.at_terminal("list", columns=90).replace("\r", "").splitlines()
    assert head.split() == ["ID", "STATE", "AGE", "DURATION", "EXIT", "COMMAND"]
    assert lines[0].split()[:2] == ["1", "exited"]
    assert lines[0].endswith(" 3             exit 3")
    assert " signal 9 " in lines[1]
    assert "running" in lines[2]
    assert max(map(len, lines)) == 90
    assert "\\x1b[31m" in lines[2]  # what a job is called cannot steer the terminal
    assert service.ok("list") == "1\n2\n3\n"


def test_certificates_are_given_as_options(service: Service) -> None:
    """Every action takes server, authority, certificate and key as options."""
    certs = service.certs
    options = ["--server", service.address, "--ca-crt", str(certs / "ca.crt")]
    options += ["--client-crt", str(certs / "alice.crt"), "--client-key", str(certs / "alice.key")]

    def pjw(*arguments: str) -> str:
        command = [str(BIN / "pjw"), *options, *arguments]
        return subprocess.run(
            command, env={"HOME": "/nonexistent"}, capture_output=True, check=True
        ).stdout.decode()

    job_id = pjw("start", "echo yes").strip()
    assert pjw("logs", job_id) == "yes\n"
    assert job_id in pjw("list").split()
    assert json.loads(pjw("get", job_id))["id"] == json.loads(pjw("stop", job_id))["id"] == job_id


def test_every_method_answers_over_grpc(service: Service) -> None:
    """Each method works with nothing but a certificate: no token, no header."""
    job_id, ended = service.start_job("echo hello; sleep 300"), service.start_job("true")
    service.ok("run", "--workspace", "kept", "true")
    held = pb.SubmitRequest(jobs=[pb.QueuedJob(start=pb.StartRequest(command="true"), held=True)])
    with service.stub() as stub:
        waiting = stub.Submit(held, timeout=CALL_SECONDS).jobs[0].id
    requests = {
        "Start": pb.StartRequest(command="true"),
        "Submit": held,
        "Hold": pb.HoldRequest(id=waiting),
        "Release": pb.ReleaseRequest(id=waiting),
        "Exec": pb.ExecRequest(id=job_id, command="true"),
        "Get": pb.GetRequest(id=job_id),
        "List": pb.ListRequest(),
        "Stop": pb.StopRequest(id=job_id),
        "Logs": pb.LogsRequest(id=job_id),
        "Wait": pb.WaitRequest(id=ended),
        "GetUsageHistory": pb.GetUsageHistoryRequest(id=ended),
        "GetQuota": pb.GetQuotaRequest(),
        "ListWorkspaces": pb.ListWorkspacesRequest(),
        "RemoveWorkspace": pb.RemoveWorkspaceRequest(name="kept"),
        "ListImages": pb.ListImagesRequest(),
        "Delete": pb.DeleteRequest(id=job_id),
    }
    # some do not end by themselves, some need more than a job: test_usage.py, test_watch.py, test_input.py,
    # test_terminals.py, test_forward.py, test_queue_service.py
    others = {"WatchUsage", "WatchJobs", "WriteInput", "Resize", "Forward", "Submit", "Hold", "Release"}
    others |= {"LoadImage", "RemoveImage"}  # test_images.py
    assert {*requests, *others} == {name for name, _ in METHODS}
    with service.channel() as channel:
        answers = {
            name: ask(channel, name, requests[name].SerializeToString())
            for name, _ in METHODS
            if name in requests
        }
    assert {name: answer[1].name for name, answer in answers.items()} == dict.fromkeys(requests, "OK")
    assert pb.LogsResponse.FromString(answers["Logs"][0][0]).data == b"hello\n"
    assert pb.StopResponse.FromString(answers["Stop"][0][0]).job.reason == pb.END_REASON_STOPPED


def test_output_streams_while_the_job_runs(service: Service) -> None:
    """A reader has the first line while the job waits for its end to be asked for."""
    job_id = service.start_job("echo first; sleep 300")
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"first\n"
        assert '"end": null' in service.ok("get", str(job_id))
        service.ok("stop", str(job_id))
        assert (logs.stdout.read(), logs.wait(10)) == (b"", 0)


def test_logs_are_whole_whenever_they_are_asked_for(service: Service) -> None:
    """While the job runs and after it, output begins with its first byte; both streams are in it."""
    job_id = service.start_job("echo one; echo two >&2; sleep 0.3; echo three")
    for _ in range(2):
        assert service.ok("logs", str(job_id)) == "one\ntwo\nthree\n"


def test_a_job_is_in_a_cgroup_with_all_its_limits(service: Service) -> None:
    """CPU, memory, disk IO and processes of a running job are limited by its cgroup, as `pjw get` tells."""
    job_id = service.start_job("sleep 300")
    groups = [group for group in service.job_cgroups() if group.name == f"job-{job_id}"]
    values = {
        name: file.read_text() for name in LIMIT_FILES for group in groups if (file := group / name).exists()
    }
    if "memory.limit_in_bytes" in values:
        assert int(values["cpu.cfs_quota_us"]) == int(values["cpu.cfs_period_us"])
        assert values["memory.limit_in_bytes"] == f"{512 * 1024**2}\n"
        assert values["blkio.throttle.write_bps_device"].split()[1] == f"{256 * 1024**2}"
        assert values["blkio.throttle.write_iops_device"].split()[1] == "10000"
    else:
        quota, period = values["cpu.max"].split()
        assert quota == period
        assert values["memory.max"] == f"{512 * 1024**2}\n"
        assert re.search(rf"\d+:\d+ rbps=max wbps={256 * 1024**2} .*wiops=10000", values["io.max"])
    assert values["pids.max"] == "512\n"
    assert json.loads(service.ok("get", str(job_id)))["limits"]["memoryMaxBytes"] == 512 * 1024**2
    service.ok("stop", str(job_id))


def test_a_job_has_its_own_namespaces(service: Service) -> None:
    """PID, mount and network of a job are not the host's, nor those of the job beside it."""
    names = ("pid", "mnt", "net")
    show = "; ".join(f"readlink /proc/self/ns/{name}" for name in names)
    # both live on while the other is looked at: the kernel gives a number to the next when one has ended
    jobs = [service.start_job(f"{show}; ls /sys/class/net; echo .; sleep 300") for _ in range(2)]
    seen = []
    for job_id in jobs:
        with service.popen("logs", str(job_id)) as logs:
            assert logs.stdout is not None
            seen.append(b"".join(iter(logs.stdout.readline, b".\n")).decode().split())
            logs.terminate()
    host = [os.readlink(f"/proc/self/ns/{name}") for name in names]
    for index in range(len(names)):
        assert len({host[index], seen[0][index], seen[1][index]}) == 3
    assert seen[0][3:] == seen[1][3:] == ["lo"]
    for job_id in jobs:
        service.ok("stop", str(job_id))


def test_the_readme_program_uses_the_library(tmp_path: Path) -> None:
    """The README's program starts a job, follows it and tells its end: no network, no certificate."""
    readme = (TESTS.parent / "README.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "Worker.open(" in program
    program = program.replace('"/var/lib/my-jobs"', repr(str(tmp_path / "state"))).replace(
        "sleep 1", "sleep 0.1"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    *dates, last = done.stdout.decode().splitlines()
    assert len(dates) == 3
    assert re.match(r"job 1 exited: ExitStatus\(code=0, signal=None\), Usage\(cpu_usage_usec=\d", last)


def test_every_line_of_the_scope_has_its_tests() -> None:
    """The table above names tests that exist, and at least one for each line."""
    assert __doc__ is not None
    there = {
        name
        for file in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    table = __doc__.split("\n\n", 2)[2]
    lines = [line for line in table.splitlines() if line.startswith(" ")]
    assert len(lines) == 14
    for line in lines:
        named = re.findall(r"test_\w+", line)
        assert named, line
        assert set(named) <= there, line
