"""pjwd as a service of systemd, on pure cgroup v2: the unit file as it is shipped."""

import os
import pwd
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service import job_cgroups, wait_for
from tests.vm import systemd_harness as host
from tests.vm.systemd_harness import get, pjw

ROOT = Path(__file__).resolve().parents[2]
# Prints a number a second, and never ends by itself.
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done"


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The service, installed and started once; its journal goes to where the machine's results go."""
    host.install()
    yield
    Path("/out/journal.txt").write_text(host.journal())


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test begins with the service active, and must leave no job running and no cgroup."""
    host.run("systemctl", "reset-failed", host.UNIT)
    host.run("systemctl", "start", host.UNIT)
    yield
    host.run("systemctl", "start", host.UNIT)
    for cgroup in job_cgroups(host.STATE):
        pjw("stop", cgroup.name.removeprefix("job-"))
    # of one that had ended by itself the last removals may still be under way
    wait_for(lambda: job_cgroups(host.STATE) == [])


def test_the_server_is_nobody_and_the_launcher_root() -> None:
    """The process on the network is pjw, without capabilities; the launcher has what the unit grants."""
    server, launcher = host.status(host.server_pid()), host.status(host.launcher_pid())
    uid = str(pwd.getpwnam("pjw").pw_uid)
    assert server["Uid"].split() == [uid] * 4
    assert (server["CapEff"], server["CapPrm"], server["NoNewPrivs"], server["Groups"]) == (
        "0" * 16,
        "0" * 16,
        "1",
        "",
    )
    assert launcher["Uid"].split() == ["0"] * 4
    granted = host.shown("CapabilityBoundingSet").split()
    assert int(launcher["CapEff"], 16).bit_count() == len(granted) < 15


def test_the_unit_is_exposed_no_more_than_documented() -> None:
    """The sum that systemd makes of what the unit leaves open: docs/security.md names it."""
    said = host.run("systemd-analyze", "security", "--no-pager", host.UNIT).splitlines()[-1]
    found = re.search(r"Overall exposure level for pjwd.service: (\d+\.\d)", said)
    assert found is not None, said
    documented = re.search(r"an exposure of (\d+\.\d)", (ROOT / "docs/security.md").read_text())
    assert documented is not None
    assert float(found[1]) <= float(documented[1])


def test_a_user_starts_reads_and_stops_jobs() -> None:
    """The seed's commands, typed by a user of the host."""
    job_id = pjw("start", "id -u; echo hello; exit 3")
    uid, word = pjw("logs", job_id).split()
    assert (int(uid) >= 1_900_000_000, word) == (True, "hello")
    assert get(job_id)["exitCode"] == 3
    other = pjw("start", "sleep 1000")
    assert other in pjw("list").split()
    assert pjw("exec", other, "hostname") == f"job-{other}"
    pjw("stop", other)
    assert get(other)["reason"] == "stopped"


def test_every_limit_is_in_the_cgroup_of_a_job() -> None:
    """The files of cgroup v2 hold what the configuration says, io.max on the disk under the root."""
    job_id = pjw("start", "sleep 1000")
    cgroup = host.cgroup_of(job_id)
    # Where systemd knows DelegateSubgroup (254), jobs are in the cgroup of the unit: the unit file says why.
    delegated = host.shown("ControlGroup") if host.shown("DelegateSubgroup") else ""
    assert str(cgroup.parents[2]) == f"/sys/fs/cgroup{delegated}/pjw"
    assert cgroup.parent.name.startswith("client-")
    values = {
        name: (cgroup / name).read_text().strip()
        for name in ("cpu.max", "memory.max", "memory.swap.max", "pids.max", "io.max")
        if (cgroup / name).exists() or name != "memory.swap.max"
    }
    device = os.stat("/").st_dev
    disk = f"{os.major(device)}:{os.minor(device)}"
    assert values.pop("memory.swap.max", "0") == "0"
    assert values.pop("io.max") == f"{disk} rbps=max wbps=268435456 riops=max wiops=10000"
    assert values == {
        "cpu.max": "100000 100000",
        "memory.max": "536870912",
        "pids.max": "512",
    }


def test_lines_arrive_while_the_job_runs() -> None:
    """A follower is woken by each line: none of them waits for a next one, or for the end."""
    job_id = pjw("start", "echo first; sleep 5; echo second; sleep 1000")
    with host.follower(job_id) as output:
        assert output.readline() == b"first\n"
        assert output.readline() == b"second\n"
        assert get(job_id)["state"] == "running"


def test_a_reload_takes_a_new_certificate_and_cuts_nothing() -> None:
    """systemctl reload: the same server shows the new certificate, and a follower misses nothing."""
    job_id, server = pjw("start", COUNT), host.server_pid()
    with host.follower(job_id) as output:
        assert output.readline() == b"0\n"
        for name in ("server.crt", "server.key"):
            (host.ETC / name).unlink()
        host.run(host.BIN / "pjwd", "certs", "server", host.ETC, "localhost")
        host.run("systemctl", "reload", host.UNIT)
        wait_for(lambda: "reload: the certificates are new" in host.journal())
        assert pjw("list").split()[-1] == job_id
        assert [output.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
    assert (host.server_pid(), host.shown("ActiveState")) == (server, "active")
    pjw("stop", job_id)


def test_a_job_goes_on_while_the_service_restarts() -> None:
    """systemd starts a new server beside the living job, which it adopts; a follower misses nothing."""
    job_id = pjw("start", COUNT)
    processes, server = host.processes_of(job_id), host.server_pid()
    with host.follower(job_id) as output:
        assert output.readline() == b"0\n"
        host.run(
            "systemctl", "daemon-reexec"
        )  # as after an upgrade of systemd: it must not take our cgroups for its own
        host.run("systemctl", "restart", host.UNIT)
        assert host.server_pid() != server
        assert (host.cgroup_of(job_id) / "memory.max").read_text() == "536870912\n"
        assert processes[0] in host.processes_of(job_id)
        assert (get(job_id)["state"], get(job_id)["exitCode"]) == ("running", None)
        numbers = [output.readline() for _ in range(8)]
    assert numbers == [b"%d\n" % n for n in range(1, 9)]
    pjw("stop", job_id)
    assert get(job_id)["reason"] == "stopped"


def test_calls_are_in_the_audit_log() -> None:
    """The unit makes its directory and lets pjwd write there; it is root's alone, and no job sees it."""
    path = Path("/var/log/pjw/audit.jsonl")
    job_id = pjw("start", f"cat {path}; ls {path.parent}")
    started = f'"method": "Start", "job_id": {job_id}, "all_clients": false, "code": "OK"'
    wait_for(lambda: started in path.read_text())
    assert (path.stat().st_uid, path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (
        0,
        0o600,
        0o700,
    )
    assert "Start" not in pjw("logs", job_id)


def test_jobs_outlive_a_stopped_service() -> None:
    """One that ends meanwhile is told of as if the service had been there: output, code, usage."""
    until_end = "until [ -e end ]; do sleep 0.1; done; echo last words; exit 7"
    living, ending = pjw("start", COUNT), pjw("start", until_end)
    processes = host.processes_of(living)
    host.run("systemctl", "stop", host.UNIT)
    assert host.shown("ActiveState") == "inactive"
    assert processes[0] in host.processes_of(living)
    (host.STATE / "scratch" / ending / "end").touch()
    wait_for(lambda: not host.processes_of(ending))
    host.run("systemctl", "start", host.UNIT)
    assert get(living)["state"] == "running"
    assert (get(ending)["state"], get(ending)["exitCode"]) == ("exited", 7)
    assert get(ending)["usage"]["memoryPeakBytes"] != 0
    assert pjw("logs", ending) == "last words"


@pytest.mark.parametrize("victim", ["server", "launcher"])
def test_systemd_brings_a_killed_service_back(victim: str) -> None:
    """kill -9 of either process ends both; the job goes on and is adopted by the next ones."""
    job_id = pjw("start", COUNT)
    processes, server, launcher = host.processes_of(job_id), host.server_pid(), host.launcher_pid()
    os.kill(server if victim == "server" else launcher, signal.SIGKILL)
    wait_for(lambda: host.server_pid() not in (0, server) and host.shown("ActiveState") == "active", 60)
    assert not Path(f"/proc/{launcher}").exists()
    assert processes[0] in host.processes_of(job_id)
    assert get(job_id)["state"] == "running"
    pjw("stop", job_id)


def test_memory_of_a_job_is_its_own_trouble() -> None:
    """The OOM killer ends the job, and systemd does not end the service for it."""
    server = host.server_pid()
    job_id = pjw("start", "python3 -c 'b = [bytearray(1 << 20) for _ in range(10_000)]'")
    pjw("logs", job_id)
    assert get(job_id)["reason"] == "oom_killed"
    assert host.server_pid() == server


def test_a_job_sees_nothing_of_the_service() -> None:
    """Neither its keys and state, nor systemd's variables, nor the homes of users, nor a writable host."""
    script = (
        "env; for path in /etc/pjw /var/lib/pjw /home /root; do ls -A $path 2>/dev/null; done;"
        " for path in / /usr /var /etc /opt; do touch $path/mine 2>/dev/null && echo wrote $path; done;"
        " grep CapBnd /proc/self/status"
    )
    lines = set(pjw("logs", pjw("start", script)).splitlines())
    names = {line.partition("=")[0] for line in lines if "=" in line} - {"_", "PWD", "OLDPWD", "SHLVL"}
    assert names == {"PATH", "HOME", "TMPDIR", "SHELL", "LANG", "PJW_JOB_ID"}
    assert {line for line in lines if "=" not in line} == {"CapBnd:\t0000000000000000"}


def test_a_service_that_hangs_is_started_again() -> None:
    """While it lives it says so; stopped in mid-run it is killed by the watchdog, and its jobs go on."""
    drop_in = Path(f"/run/systemd/system/{host.UNIT}.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    # two minutes would be long to wait for
    drop_in.write_text("[Service]\nWatchdogSec=10\n")
    try:
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", host.UNIT)
        server, job_id = host.server_pid(), pjw("start", COUNT)
        # init and the shell; its sleep is another one each second
        processes = host.processes_of(job_id)[:2]
        # half an interval each, and more than one in all
        for _ in range(3):
            last = host.shown("WatchdogTimestampMonotonic")
            wait_for(lambda last=last: host.shown("WatchdogTimestampMonotonic") != last, 60)  # type: ignore[misc]
        assert host.server_pid() == server
        assert host.shown("StatusText") == "serving on localhost:50051; jobs that have not ended: 1"
        os.kill(server, signal.SIGSTOP)
        wait_for(lambda: host.server_pid() not in (0, server) and host.shown("ActiveState") == "active", 120)
        assert "Watchdog timeout" in host.journal()
        assert host.processes_of(job_id)[:2] == processes
        assert get(job_id)["state"] == "running"
        # and so is a launcher that hangs: the next one takes its place
        server, launcher = host.server_pid(), host.launcher_pid()
        os.kill(launcher, signal.SIGSTOP)
        wait_for(lambda: host.server_pid() not in (0, server) and host.shown("ActiveState") == "active", 120)
        assert f"killed launcher {launcher}, which hung" in host.journal()
        assert not Path(f"/proc/{launcher}").exists()
        assert host.processes_of(job_id)[:2] == processes
        assert get(job_id)["state"] == "running"
    finally:
        drop_in.unlink()
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", host.UNIT)


def test_hardening_breaks_no_ordinary_job() -> None:
    """What the unit forbids is inherited: generated code, set-id bits, tracing and threads still work."""
    script = (
        "import mmap, os, ctypes, subprocess, threading\n"
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "open('tool', 'w').close(); os.chmod('tool', 0o6755)\n"
        "assert os.stat('tool').st_mode & 0o7777 == 0o6755\n"
        "assert ctypes.CDLL(None).personality(0x0040000) != -1\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(ctypes.CDLL(None).ptrace(0, 0, 0, 0) != 0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "t = threading.Thread(target=print, args=['thread']); t.start(); t.join()\n"
        "subprocess.run(['true'], check=True)\n"
        "open('/tmp/x', 'w').close(); open('/run/job/y', 'w').close(); open('/dev/shm/z', 'w').close()\n"
    )
    job_id = pjw("start", "--", "/usr/bin/python3", "-c", script)
    assert (pjw("logs", job_id), get(job_id)["exitCode"]) == ("thread", 0)


def test_a_pipeline_every_night() -> None:
    """The units of docs/queue.md as they are written: the timer fires, the steps run, in their order."""
    document = (ROOT / "docs/queue.md").read_text()
    written = re.findall(r"^```(?:ini|toml)\n# (/\S+)\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    assert len(written) == 3
    for path, text in written:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text.replace("alice", host.CLIENT))
    for step in ("fetch", "build", "report"):
        path = Path("/opt/nightly", step)
        path.write_text(f"#!/bin/sh\necho {step}\n")
        path.chmod(0o755)
    settings = Path(f"/home/{host.CLIENT}/.config/pjw/config.toml")
    settings.parent.mkdir(parents=True)
    files = {"ca_crt": "ca.crt", "client_crt": f"{host.CLIENT}.crt", "client_key": f"{host.CLIENT}.key"}
    settings.write_text("".join(f'{key} = "{host.CERTS / name}"\n' for key, name in files.items()))
    Path("/usr/local/bin/pjw").symlink_to(host.BIN / "pjw")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "--now", "nightly.timer")
    show = ("systemctl", "show", "--property", "NextElapseUSecRealtime", "--value", "nightly.timer")
    assert " 02:30:00 " in host.run(*show)
    # not the clock: at another date the timers of the whole machine fire
    drop_in = Path("/run/systemd/system/nightly.timer.d/soon.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Timer]\nOnCalendar=\nOnActiveSec=1s\nAccuracySec=1s\n")
    before = pjw("list").split()
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "nightly.timer")
    wait_for(lambda: pjw("list").split() != before, 60)
    fetch, build, report = pjw("list").split()[len(before) :]
    assert pjw("wait", report) == "0"
    assert [pjw("logs", job) for job in (fetch, build, report)] == ["fetch", "build", "report"]
    host.run("systemctl", "disable", "--now", "nightly.timer")
    waits = pjw("start", "--hold", "--name", "nightly-build", "true")
    host.run("systemctl", "start", "nightly.service", check=False)
    assert "failed" in host.run("systemctl", "is-failed", "nightly.service")
    assert f"nightly-build: job {waits}" in host.run("journalctl", "--unit", "nightly.service", "--no-pager")
    pjw("stop", waits)


def test_the_journal_has_no_traceback() -> None:
    """After all of the above; and systemd's own opinion of the unit file has not become worse."""
    security = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", host.UNIT], capture_output=True, text=True, check=False
    ).stdout
    Path("/out/security.txt").write_text(security)
    [exposure] = re.findall(r"exposure level for pjwd\.service: ([\d.]+)", security)
    assert float(exposure) < 5.5
    text = host.journal()
    assert "Traceback" not in text, text
    assert "219/CGROUP" not in text, text
