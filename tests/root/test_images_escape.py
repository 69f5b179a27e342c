"""The attempts of test_escape.py that a root of the job's own could change, in an image that has Python.

Every job of these workers has that image: it is their default. So what a program finds is what one finds that
a client starts with --image.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pjw.worker import Worker
from tests.images import have_image, python_root
from tests.root.test_escape import (
    WAY,
    inside,
    test_no_other_process_has_a_number,
    test_nothing_of_the_kernel_s_can_be_opened_for_writing,
    test_terminals_of_the_host_are_out_of_reach,
    test_the_counters_of_the_host_are_hidden,
    test_the_kernel_s_log_can_be_neither_read_nor_written,
    test_the_memory_of_another_job_of_the_same_user_is_out_of_reach,
)
from tests.worker_harness import Bench, open_bench, run

__all__ = [
    "test_no_other_process_has_a_number",
    "test_nothing_of_the_kernel_s_can_be_opened_for_writing",
    "test_terminals_of_the_host_are_out_of_reach",
    "test_the_counters_of_the_host_are_hidden",
    "test_the_kernel_s_log_can_be_neither_read_nor_written",
    "test_the_memory_of_another_job_of_the_same_user_is_out_of_reach",
]


@pytest.fixture(scope="module")
def python_image() -> Iterator[Path]:
    """The root, once: each state directory has it by links."""
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield python_root(where / "root")
    shutil.rmtree(where)


@pytest.fixture
async def bench(python_image: Path) -> AsyncIterator[Bench]:
    """A state directory with the image."""
    async with open_bench() as bench:
        bench.directory.chmod(0o755)
        bench.state.mkdir()
        have_image(bench.state, "python", python_image)
        yield bench


@pytest.fixture
async def worker(bench: Bench) -> Worker:
    """A worker whose jobs all have the image; its first client is the hostile one."""
    worker = await bench.open(default_image="python")
    await run(worker, "true", "mallory")
    return worker


@pytest.fixture(params=["job", "session"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As in test_escape.py."""
    monkeypatch.setitem(WAY, "inside", request.param)
    return str(request.param)


async def test_no_file_of_the_host_is_there(bench: Bench, worker: Worker) -> None:
    """Neither by its path, nor above the root, nor by /proc, nor in a mount namespace of one's own."""
    (bench.directory / "canary").write_text("of the host")
    program = f"""
canary = '{bench.directory}/canary'
links = [f'/proc/{{pid}}/{{link}}' for pid in ('self', 1, 2) for link in ('root', 'cwd/../../..')]
paths = (canary, '/etc/shadow', '/boot', '/var/lib/dpkg')
found = [attempt(os.stat, top + path) for top in ('', '/..' * 20, *links) for path in paths]
attempt(lambda: checked(libc.unshare(0x10000000 | 0x20000)))
ways = [attempt(lambda: checked(libc.umount2(path, 2))) for path in (b'/', b'/proc', b'/tmp')]
found += [attempt(os.stat, '/..' * 20 + path) for path in (canary, '/boot', '/host')]
[sorted(set(map(str, found))), [way for way in ways if way == 0], os.stat('/bin/sh').st_mode & 0o6000]
"""
    errors, unmounted, set_id = await inside(worker, program)
    assert (set(errors) <= {"ENOENT", "EACCES", "EPERM"}, unmounted, set_id) == (True, [], 0)
