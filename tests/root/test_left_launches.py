"""Launches that are over before all of them has gone: what is there still counts (S10)."""

import asyncio
import errno
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pjw.errors import LaunchError, LimitReachedError
from pjw.launcher import protocol
from pjw.launcher.launches import SPARE_DESCRIPTORS
from pjw.launcher.protocol import Departed, Done, JobIdPage, JobIds, Launch, Launched, Refused
from pjw.model import JobSpec
from pjw.worker.settings import WAITING_INITS, Quotas
from tests.root.test_launcher_hostile import Peer
from tests.support.service import instance_cgroups, jobs_below, wait_for, waiting_inits
from tests.support.worker_harness import DEADLINE_SECONDS, NO_LIMITS, Bench

# the launcher, but what takes it seconds to give up takes a moment
HASTY = """#!{python} -IB
import sys
from pjw.launcher import __main__, launches
launches.SETTLE_SECONDS = 0.1
sys.exit(__main__.main())
"""


@contextmanager
def occupied(bench: Bench, *job_ids: int) -> Iterator[None]:
    """Have a process of ours, which nobody kills, in the cgroups of inits that wait for these jobs."""
    with ExitStack() as stack:
        for job_id in job_ids:
            process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
            stack.callback(process.kill)
            instance = instance_cgroups(bench.state)[0]
            [cgroup] = [path for path in jobs_below(instance) if path.name == f"job-{job_id}"]
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        yield


def executable(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have launchers started that give up soon."""
    script = directory / "launcher"
    script.write_text(HASTY.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


async def test_what_is_left_of_a_launch_counts_among_its_client_s_jobs(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client gathers processes that nobody counts, and descriptors end; it counts until it is gone."""
    with monkeypatch.context() as patch:
        executable(tmp_path, patch)
        worker = await bench.open(quotas=Quotas(running_max=1))
    first = await worker.start(JobSpec("true"))
    await worker.wait(first.id)
    await asyncio.to_thread(wait_for, lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
    with occupied(bench, first.id + 1):
        with pytest.raises(LaunchError):
            await worker.start(JobSpec(["/nonexistent"]))
        assert len(await worker.list()) == 1
        assert (await worker.quota()).running == 1
        with pytest.raises(LimitReachedError, match="1 jobs of local are running"):
            await worker.start(JobSpec("true"))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await worker.quota()).running:
            await asyncio.sleep(0.02)
    await worker.start(JobSpec("true"))


def test_the_end_of_what_is_left(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher tells it once, when it has come, to whoever asks."""
    with monkeypatch.context() as patch:
        executable(tmp_path, patch)
        peer = Peer(bench)
    try:
        assert isinstance(peer.launch(1), Launched)
        assert peer.ask(Departed(1)) == Done()
        wait_for(lambda: len(waiting_inits(bench.state)) == WAITING_INITS)
        with occupied(bench, 2):
            refused = peer.launch(2, ["/nonexistent"])
            assert isinstance(refused, Refused)
            assert (refused.kind, refused.errno, refused.left) == ("exec", errno.ENOENT, True)
            assert "(sleep)" in refused.hint
            peer.send(protocol.encode(8, Departed(2)))
            assert isinstance(peer.ask(Departed(2)), Refused)
            assert peer.ask(JobIds(after=2)) == JobIdPage(())
        data = peer.socket.recv(protocol.MAX_DATAGRAM_BYTES)
        assert protocol.decode_reply(data) == (8, Done())
        assert peer.ask(Departed(2)) == Done()
        assert isinstance(peer.launch(2), Launched)
    finally:
        peer.close()


def test_launches_that_wait_leave_the_reserve_of_descriptors(bench: Bench) -> None:
    """Those that came with them count; more are refused, lest the launcher ends for want of one (S10)."""
    ids = range(2, 10)
    peer = Peer(bench, waiting_inits=len(ids))
    try:
        assert isinstance(peer.launch(1), Launched)
        wait_for(lambda: len(waiting_inits(bench.state)) == len(ids))
        most = peer.open_descriptors() + 60
        resource.prlimit(peer.pid, resource.RLIMIT_NOFILE, (most, most))
        with occupied(bench, *ids), ExitStack() as stack:
            other = NO_LIMITS.with_overrides({"pids_max": 100})
            for job_id in ids:
                launch = Launch(job_id, peer.uid, other, split_stderr=True, input=True)
                files = peer.descriptors(stack, b"\0\0sleep\00060\0", len(launch.files))
                peer.send(protocol.encode(job_id, launch), files)
            peer.send(protocol.encode(1, JobIds(after=9)))
            replies = {}
            while 1 not in replies:
                seq, reply = protocol.decode_reply(peer.socket.recv(protocol.MAX_DATAGRAM_BYTES))
                replies[seq] = reply
            del replies[1]
            assert {getattr(reply, "errno", None) for reply in replies.values()} == {errno.EMFILE}
            assert peer.open_descriptors() <= most - SPARE_DESCRIPTORS
        for _ in ids[len(replies) :]:
            _, descriptors, _, _ = socket.recv_fds(peer.socket, protocol.MAX_DATAGRAM_BYTES, 1)
            socket.close(descriptors[0])
        peer.jobs.extend(job_id for job_id in ids if job_id not in replies)
    finally:
        peer.close()
