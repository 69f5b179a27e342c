"""A soak: mixed load on a real pjwd over loopback with random faults; at the end nothing may be lost or left.

    python -m tests.soak [--seconds 1800] [--seed N]

The seed repeats what is asked and what is broken, not when exactly the machine gets to it. It ends with 1 and
the findings, or with 0 and a table of figures.
"""

import argparse
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from google.protobuf.duration_pb2 import Duration

from pjw.v1 import job_worker_pb2 as pb
from tests.soak.faults import Faults, Reading, read
from tests.soak.load import BAD_PROGRAM, CUT_SHORT, Client, Ledger, Reader
from tests.support.scene import config_of
from tests.support.service import Service, end_all, instance_cgroups, wait_for
from tests.support.worker_harness import UIDS, processes_where, uid_range

CLIENTS: Final = ("alice", "bob", "carol", "dave")
READERS_OF_EACH: Final = 2
# The last part is without kills of server and launcher, so that what one process holds can be followed.
KILLING_PART: Final = 0.6
# What a server may have grown by while the same load went on: caches fill, allocators keep.
GROWTH_KIB: Final = 8 * 1024
IDLE_GROWTH_KIB: Final = 32 * 1024


def main() -> int:
    """Run a soak; the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    arguments = parser.parse_args()
    print(f"soak: seed {arguments.seed}, {arguments.seconds:.0f} s", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="pjw-soak-", dir="/var/lib"))
    uid_first = uid_range()
    service = Service(directory, CLIENTS, config_of(uid_first))
    ledger = Ledger()
    try:
        service.start()
        idle = idle_reading(service)
        clients, faults = run(service, ledger, arguments.seed, arguments.seconds)
        check_jobs(service, ledger, clients)
        check_remains(service, ledger, uid_first)
        final = idle_reading(service)
        check_growth(ledger, faults.readings, idle, final)
        code = service.stop()
        check_internal_errors(service, ledger)
        if code or "Traceback" in service.log.read_text():
            ledger.find(
                f"pjwd ended with {code}, or its log has a traceback: {service.log.read_text()[-3000:]}"
            )
        wait_for(lambda: not instance_cgroups(service.state))
        report(ledger, faults.readings, idle, final)
    finally:
        ledger.stop.set()
        if service.process is not None:
            service.stop()
        end_all(service.state)
        if ledger.findings:
            print(f"soak: what it left is in {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory)
    return 1 if ledger.findings else 0


def idle_reading(service: Service) -> Reading:
    """What a server holds that was used and has nothing to do."""
    for client in CLIENTS:
        service.ok("list", client=client)
        service.ok("logs", str(service.start_job("echo warm", client)), client=client)
    wait_for(lambda: not service.job_cgroups())
    # connections that were closed may still be there for a moment
    readings = [read(service, 0)]
    while len(readings) < 5 or readings[-1].server_descriptors < readings[-5].server_descriptors:
        time.sleep(0.2)
        readings.append(read(service, 0))
    return readings[-1]


def run(service: Service, ledger: Ledger, seed: str, seconds: float) -> tuple[list[Client], Faults]:
    """Let it all happen, until the time is over and every thread has ended."""
    clients = [Client(service, ledger, name, f"{seed}/{name}") for name in CLIENTS]
    readers = [
        Reader(client, f"{seed}/{client.client}/reader {n}")
        for client in clients
        for n in range(READERS_OF_EACH)
    ]
    faults = Faults(service, ledger, f"{seed}/faults", kill_seconds=seconds * KILLING_PART)
    threads = [*clients, *readers, faults]
    for thread in threads:
        thread.start()
    ledger.stop.wait(seconds)
    ledger.stop.set()
    for thread in threads:
        thread.join(120)
        if thread.is_alive():
            ledger.find(f"{thread.name} hangs")
    return clients, faults


def check_jobs(service: Service, ledger: Ledger, clients: list[Client]) -> None:
    """Stop what still runs; then every job that was acknowledged is there, with its end and its output."""
    directories = {int(path.name) for path in (service.state / "jobs").iterdir()}
    known: set[int] = set()
    # a kill between the row of a job and its directory leaves the one without the other
    without_files: set[int] = set()
    for client in clients:
        with service.stub(client.client) as stub:
            by_id = {task.job_id: task for task in client.tasks.values() if task.job_id is not None}
            by_command = {task.command: task for task in client.tasks.values()}
            jobs: list[pb.Job] = []
            token = ""
            while True:
                page = stub.List(pb.ListRequest(page_token=token), timeout=60)
                jobs += page.jobs
                if not (token := page.next_page_token):
                    break
            for lost in by_id.keys() - {job.id for job in jobs}:
                ledger.find(f"job {lost} of {client.client} was acknowledged, and is not there")
            known |= {job.id for job in jobs}
            for job in jobs:
                if job.command == "echo warm":
                    continue
                if job.command == BAD_PROGRAM and job.state == pb.JOB_STATE_LOST:
                    # its start was cut off before anybody could tell that it cannot be executed
                    ledger.count("bad starts that were cut off")
                    without_files.add(job.id)
                    continue
                task = by_command.get(job.command)
                if task is None or (task.job_id is not None and task.job_id != job.id):
                    ledger.find(f"job {job.id} of {client.client} was never asked for: {job.command[:100]}")
                    continue
                if not job.HasField("end"):
                    task.stop_asked = True
                    request = pb.StopRequest(id=job.id, grace=Duration())
                    job = stub.Stop(request, timeout=60).job  # noqa: PLW2901
                logs = stub.Logs(pb.LogsRequest(id=job.id), timeout=60)
                output = b"".join(response.data for response in logs)
                ledger.count("bytes of output", len(output))
                ledger.count("jobs that were lost with their init", job.state == pb.JOB_STATE_LOST)
                ledger.count("jobs whose start was not answered", task.job_id is None)
                if not output or (task.job_id is None and job.state == pb.JOB_STATE_LOST):
                    # a job that has ended without output has no files either
                    without_files.add(job.id)
                if wrong := task.complaint(job, output, init_killed=job.id in ledger.init_killed):
                    ledger.find(f"job {job.id} of {client.client} ({job.command[:100]}): {wrong}")
    ledger.count("jobs", len(known))
    if not known - without_files <= directories <= known:
        ledger.find(f"the table and the directories of jobs differ: {sorted(directories ^ known)[:20]}")


def check_internal_errors(service: Service, ledger: Ledger) -> None:
    """A start ends so only when its init was killed by us before the command was executed."""
    killed = re.findall(r"cannot hear from the init of job (\d+)", service.log.read_text())
    # a call may have been cut off for another reason before it could be answered so
    if len(killed) < ledger.counts.get(CUT_SHORT, 0) or not ledger.init_killed.issuperset(map(int, killed)):
        ledger.find(f"internal errors: {ledger.counts.get(CUT_SHORT, 0)}, by killed inits {killed}")


def check_remains(service: Service, ledger: Ledger, uid_first: int) -> None:
    """No job runs: no cgroup, scratch directory, process or mount is left."""

    def remains() -> list[str]:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        uids = range(uid_first, uid_first + UIDS)
        return [
            *map(str, service.job_cgroups()),
            *map(str, service.scratch()),
            *[f"process {pid}" for pid in processes_where(lambda s: int(s["Uid"].split()[0]) in uids)],
            *[line for line in mounts if f" {service.state}/" in line],
        ]

    try:
        wait_for(lambda: not remains())
    except AssertionError:
        ledger.find(f"left behind: {remains()}")


def check_growth(ledger: Ledger, readings: list[Reading], idle: Reading, final: Reading) -> None:
    """Descriptors are as before; the memory of the last server did not go on growing under the same load."""
    for name in ("server_descriptors", "launcher_descriptors"):
        if getattr(final, name) > getattr(idle, name) + 2:
            ledger.find(f"{name}: {getattr(idle, name)} at first, {getattr(final, name)} in the end")
    early, late = halves(readings)
    if late - early > GROWTH_KIB:
        ledger.find(f"the server grew from {early:.0f} to {late:.0f} KiB while the load was the same")
    if final.server_kib - idle.server_kib > IDLE_GROWTH_KIB:
        ledger.find(f"an idle server has {final.server_kib} KiB, and had {idle.server_kib} at first")


def last_server(readings: list[Reading]) -> list[Reading]:
    """The readings of the server that was killed by nobody, without its first tenth: it fills its caches."""
    own = [reading for reading in readings if reading.pid == readings[-1].pid]
    return own[len(own) // 10 :]


def halves(readings: list[Reading]) -> tuple[float, float]:
    """The median of what the last server held, in the first and in the second half of its time."""
    own = [reading.server_kib for reading in last_server(readings)]
    middle = max(1, len(own) // 2)
    return statistics.median(own[:middle]), statistics.median(own[middle:] or own)


def report(ledger: Ledger, readings: list[Reading], idle: Reading, final: Reading) -> None:
    """The table for docs/reliability.md."""
    own = last_server(readings)
    early, late = halves(readings)
    minutes = (own[-1].at - own[0].at) / 60
    print("| figure | value |\n| --- | --- |")
    for name, value in sorted(ledger.counts.items()):
        print(f"| {name} | {value:,} |")
    print(f"| servers that were started | {len({reading.pid for reading in readings}):,} or more |")
    print(f"| memory of the server, idle: first, last | {idle.server_kib:,}, {final.server_kib:,} KiB |")
    print(
        f"| the same under load, {minutes:.0f} minutes without a kill: first half, second half (median) |",
        end="",
    )
    print(f" {early:,.0f} KiB, {late:,.0f} KiB |")
    print(f"| memory of the launcher, the same | {idle.launcher_kib:,}, {final.launcher_kib:,} KiB |")
    for who in ("server", "launcher"):
        name = f"{who}_descriptors"
        most = max(getattr(reading, name) for reading in readings)
        print(f"| descriptors of the {who}: idle at first, in the end; most under load |", end="")
        print(f" {getattr(idle, name)}, {getattr(final, name)}; {most} |")
    print(f"| findings | {len(ledger.findings)} |", flush=True)


if __name__ == "__main__":
    assert os.geteuid() == 0, "a soak needs root"
    sys.exit(main())
