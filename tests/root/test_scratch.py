"""Scratch directories: where they are, and their removal, some at a time and clients in turn."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pjw.errors import ConfigError, JobStateError
from pjw.launcher import scratch as scratch_module
from pjw.launcher.policy import instance_name
from pjw.launcher.processes import Watcher
from pjw.launcher.protocol import Refused
from pjw.launcher.removals import AT_ONCE, AT_ONCE_OF_ONE, Removals
from pjw.launcher.scratch import Scratch
from pjw.worker import Worker
from tests.root.test_launcher_hostile import Peer
from tests.support.disks import small_disk
from tests.support.service import Service, wait_for
from tests.support.worker_harness import Bench, open_bench, run, start_said


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system for scratch directories alone."""
    with small_disk(16) as point:
        yield point


def left(place: Path, bench: Bench) -> list[str]:
    """Which jobs of a state directory have something in that place."""
    here = place / instance_name(str(bench.state))
    return [path.name for path in bench.scratch() if path.parent == here]


# --- where


async def test_a_file_system_of_its_own(disk: Path, bench: Bench) -> None:
    """S6: what a job writes lies there, its IO limits apply there, no job sees it, and nothing stays."""
    worker = await bench.open(scratch_dir=str(disk))
    script = f"ls {disk} || true; pwd; echo data > result; echo written; exec sleep 100"
    job = await start_said(worker, script, b"written")
    assert b"/run/job" in bench.output(job.id)
    assert b"i-" not in bench.output(job.id)
    assert (disk / instance_name(str(bench.state)) / str(job.id) / "result").read_text() == "data\n"
    assert not any((bench.state / "scratch").glob("*"))
    device = os.stat(disk).st_dev
    number = f"{os.major(device)}:{os.minor(device)} "
    limits = [
        path
        for group in bench.cgroups(job.id)
        for path in (*group.glob("io.max"), *group.glob("*write_bps*"))
    ]
    assert any(number in path.read_text() for path in limits)
    await worker.stop(job.id)
    assert left(disk, bench) == []
    await bench.close(worker)
    assert os.listdir(disk / instance_name(str(bench.state))) == []


async def test_jobs_of_before_a_change(disk: Path, bench: Bench) -> None:
    """A job goes on where it began, however often the key changes, and what it leaves there is removed."""
    script = "echo 1 > one; mkdir two; echo written; exec sleep 100"
    other = bench.directory / "other"
    for scratch_dir in ("", str(disk), str(other), ""):
        worker = await bench.open(scratch_dir=scratch_dir)
        await start_said(worker, script, b"written")
        await bench.close(worker)
    worker = await bench.open()
    assert sorted(path.name for path in bench.scratch()) == ["1", "2", "3", "4"]
    assert (left(disk, bench), left(other, bench)) == (["2"], ["3"])
    for job in await worker.list():
        await worker.stop(job.id, grace_seconds=0)
    assert bench.scratch() == []


async def test_what_a_crash_leaves_where_scratch_was(disk: Path, bench: Bench) -> None:
    """The next start finds it, though the key has changed meanwhile."""
    worker = await bench.open(scratch_dir=str(disk))
    job, _ = await run(worker, ["true"])
    await bench.close(worker)
    directory = disk / instance_name(str(bench.state)) / str(job.id)
    directory.mkdir()
    (directory / "file").write_text("x")
    await bench.open(scratch_dir="")
    assert not directory.exists()


async def test_two_instances_in_one_place(disk: Path, bench: Bench) -> None:
    """Their jobs have the same ids, and directories of their own."""
    async with open_bench() as second:
        for each in (bench, second):
            worker = await each.open(scratch_dir=str(disk))
            job = await start_said(worker, "echo x > file; echo written; exec sleep 100", b"written")
            assert job.id == 1
        assert (left(disk, bench), left(disk, second)) == (["1"], ["1"])
        await second.workers[0].stop(1)
        assert (left(disk, bench), left(disk, second)) == (["1"], [])
        await bench.close(bench.workers[0])


@pytest.mark.parametrize("mode", [0o775, 0o757])
async def test_a_place_that_others_may_write(bench: Bench, mode: int) -> None:
    """Refused like such a state directory, by the launcher itself too."""
    place = bench.directory / "place"
    place.mkdir()
    place.chmod(mode)
    why = f"cannot use the scratch directory {place}: others than root may write {place}"
    with pytest.raises(ConfigError, match=why):
        await bench.open(scratch_dir=str(place))
    with closing(Peer(bench, greet=False, scratch_dir=str(place))) as peer:
        refused = peer.ask(peer.hello)
    assert isinstance(refused, Refused)
    assert refused.operation == why
    place.chmod(0o755)


def test_check_looks_at_it(make_service: Callable[..., Service], disk: Path) -> None:
    """`pjwd check` tells of its disk, of its free space, and of a place that is not root's."""
    service = make_service()
    config = service.directory / "check.toml"
    config.write_text(f'state_dir = "{service.state}"\nscratch_dir = "{disk}"\n')
    text = check(config)
    assert f"(under / and {service.directory} and {disk})" in text
    config.write_text(f"{config.read_text()}[scratch]\nbytes_max = 1_000_000\n")
    assert f"missing  scratch.bytes_max and inodes_max: no project quotas under {disk}" in check(config)
    os.chown(disk, 65_534, -1)
    assert f"missing  cannot use the scratch directory {disk}: others than root may write {disk}" in check(
        config
    )


def check(config: Path) -> str:
    """What `pjwd check` says."""
    program = Path(sys.executable).with_name("pjwd")
    return subprocess.run(
        [program, "check", "--config", config], capture_output=True, text=True, check=False
    ).stdout


# --- removal


class Held:
    """Removals by a stand-in for rm that waits until it is let go of; and real users."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = directory / "rm"
        program.write_text('#!/bin/sh\nshift 3\nkill -STOP $$\nexec /bin/rm -rf -- "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(scratch_module, "RM_PROGRAM", str(program))
        self.watcher = Watcher()
        self.scratch = Scratch(str(directory))
        self.removals = Removals(self.watcher, self.scratch)
        self.pids: dict[int, int] = {}
        self.over: list[int] = []
        spawn = self.scratch.spawn_removal

        def spawn_removal(job_id: int) -> int:
            self.pids[job_id] = spawn(job_id)
            return self.pids[job_id]

        monkeypatch.setattr(self.scratch, "spawn_removal", spawn_removal)

    def begin(self, job_id: int, uid: int) -> None:
        """A job of that user has left something."""
        path = Path(self.scratch.create(job_id))
        (path / "file").write_text("x")
        self.scratch.give_to(job_id, uid)
        self.removals.begin(job_id, lambda: self.over.append(job_id))

    def finish(self, job_id: int) -> None:
        """Let one go on, to its end."""
        pid = self.pids.pop(job_id)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T")
        os.kill(pid, signal.SIGCONT)
        while job_id not in self.over:
            self.watcher.run_once()
        assert not Path(self.scratch.path(job_id)).exists()


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """Removals that a test lets go on; all have ended after it."""
    held = Held(tmp_path, monkeypatch)
    yield held
    while held.pids:
        held.finish(min(held.pids))
    held.watcher.close()


def test_so_many_removals_at_once_and_clients_in_turn(held: Held) -> None:
    """One client's many never take all places, and another's first goes before its next."""
    first, second, third = 1_900_000_001, 1_900_000_002, 1_900_000_003
    for job_id in range(1, 21):
        held.begin(job_id, first)
    assert sorted(held.pids) == [1, 2]
    assert AT_ONCE_OF_ONE == 2
    for job_id in range(21, 24):
        held.begin(job_id, second)
    held.begin(24, third)
    assert sorted(held.pids) == [1, 2, 21, 22]
    assert AT_ONCE == 4
    held.finish(1)
    assert sorted(held.pids) == [2, 21, 22, 24]
    held.finish(21)
    assert sorted(held.pids) == [2, 3, 22, 24]
    assert held.over == [1, 21]


def test_a_removal_is_begun_once(held: Held) -> None:
    """A server that asks again and again has no process for each."""
    held.begin(1, 1_900_000_001)
    with pytest.raises(JobStateError, match="what job 1 left is being removed"):
        held.removals.begin(1, lambda: None)
    assert list(held.pids) == [1]


def test_removals_are_nice(held: Held) -> None:
    """S6: they leave the host's processors and disks to others."""
    held.begin(1, 1_900_000_001)
    assert os.getpriority(os.PRIO_PROCESS, held.pids[1]) == 10


async def test_a_deep_tree_holds_up_no_other_client(worker: Worker) -> None:
    """Thousands of levels, several times: another client starts, ends and is removed beside their removal."""
    script = (
        '/usr/bin/python3 -I -S -c \'import os\nfor i in range(3500): os.mkdir("d"); os.chdir("d")\';'
        " echo written; exec sleep 100"
    )
    deep = [await start_said(worker, script, b"written", "alice") for _ in range(3)]
    stops = [asyncio.ensure_future(worker.stop(job.id, grace_seconds=0)) for job in deep]
    for job in deep:
        await worker.wait(job.id)
    for _ in range(3):
        job = await start_said(worker, "echo x > file; echo written; exec sleep 100", b"written", "bob")
        await worker.stop(job.id, grace_seconds=0)
    assert not all(stop.done() for stop in stops)
    await asyncio.gather(*stops)
