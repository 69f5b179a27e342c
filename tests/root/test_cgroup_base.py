"""Where on cgroup v2 the jobs' cgroups begin: below systemd, and at the root of a namespace."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pjw.launcher import cgroup as cgroups
from pjw.launcher.cgroup import interface_files, v2
from tests.support.service import wait_for

DEADLINE_SECONDS = 60.0
NUMBERS = itertools.count(1)


@contextmanager
def top_level_cgroup() -> Iterator[Path]:
    """A cgroup v2 of our own with all controllers, outside of any unit; removed with what it holds."""
    mount = next((mount for mount in interface_files.read_mounts() if mount.fs_type == "cgroup2"), None)
    if mount is None or cgroups.describe_host().version != 2:
        pytest.skip("no cgroup v2 with controllers here")
    root = Path(mount.point)
    (root / "cgroup.subtree_control").write_text("+cpu +memory +pids +io", encoding="ascii")
    top = root / f"pjw-test-{os.getpid()}-{next(NUMBERS)}"
    top.mkdir()
    try:
        yield top
    finally:
        (top / "cgroup.kill").write_text("1", encoding="ascii")
        for directory, _, _ in os.walk(top, topdown=False):
            wait_for(v2.V2Cgroup(0, directory).try_remove)


def run_at(cgroup: Path, code: str, *, namespace: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python code in a cgroup of v2, which is the root of what it sees when *namespace*."""
    source = str(Path(cgroups.__file__).parents[3])
    enter = f'echo 0 > {cgroup}/cgroup.procs; exec "$@"'
    remount = 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
    unshare = ["unshare", "--cgroup", "--mount", "sh", "-c", remount, "sh"] if namespace else []
    prologue = f"import os, sys; sys.path.insert(0, {source!r})\nfrom pjw.launcher import cgroup\n"
    command = ["sh", "-c", enter, "sh", *unshare, sys.executable, "-B", "-I", "-c", prologue + code]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_SECONDS)


def test_a_delegated_cgroup_is_the_base_when_we_start_in_its_leaf() -> None:
    """Only with DelegateSubgroup=supervisor can systemd start us again beside jobs that live on."""
    code = "print(cgroup.describe_host().location)"
    with top_level_cgroup() as unit:
        os.setxattr(unit, "trusted.delegate", b"1")
        (unit / "supervisor").mkdir()
        in_leaf, beside = run_at(unit / "supervisor", code), run_at(unit, code)
        os.removexattr(unit, "trusted.delegate")
        not_delegated = run_at(unit / "supervisor", code)
        assert in_leaf.stdout.strip() == str(unit), in_leaf.stderr
        assert beside.stdout.strip() == str(unit.parent), beside.stderr
        assert not_delegated.stdout.strip() == str(unit.parent), not_delegated.stderr


def test_we_make_room_for_jobs_at_the_root_of_a_namespace() -> None:
    """There the root holds processes that must go into a leaf before controllers are handed on."""
    code = (
        "from pjw.model import Limits\n"
        "open_again = lambda: cgroup.open_hierarchy('i-1', supervisor_pids=[os.getpid(), os.getppid()])\n"
        "open_again().create(1, Limits(0, 64 << 20, 9, 0, 0, 0, 0), 7)\n"
        "job = open_again().find(1)\n"
        "print(open('/proc/self/cgroup').read().strip())\n"
        "print(open('/sys/fs/cgroup/pjw/i-1/client-7/job-1/pids.max').read())\n"
        "job.try_remove()"
    )
    with top_level_cgroup() as top:
        done = run_at(top, code, namespace=True)
        assert done.stdout.split() == ["0::/supervisor", "9"], done.stderr


def test_strangers_at_the_root_of_a_namespace_are_named() -> None:
    """We move nobody but ourselves: the operator reads who is in the way."""
    code = (
        "from pjw.errors import ConfigError\n"
        "try: cgroup.open_hierarchy('i-1', supervisor_pids=[os.getpid()])\n"
        "except ConfigError as error: print(error, error.hint)"
    )
    with top_level_cgroup() as top, subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            (top / "cgroup.procs").write_text(str(stranger.pid), encoding="ascii")
            done = run_at(top, code, namespace=True)
            assert f"processes are in it ({stranger.pid})" in done.stdout, done.stderr
        finally:
            stranger.kill()
