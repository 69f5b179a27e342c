"""The attempts of test_escape.py in an image that has Python, and those that an image makes possible.

Every job of these workers has that image: it is their default. So what a program finds is what one finds that
a client starts with --image. Capabilities of files are tried with programs of the image.
"""

import os
import shutil
import stat
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pjw.worker import Worker
from tests.root.test_escape import (
    DENIED,
    WAY,
    core_pattern,
    inside,
    listener,
    run_inside,
    test_a_crash_leaves_no_core_file,
    test_a_crash_starts_nothing_on_the_host,
    test_a_device_of_the_host_cannot_be_opened,
    test_a_service_of_the_host_cannot_be_talked_to,
    test_no_other_process_has_a_number,
    test_no_raw_socket_can_be_made,
    test_nothing_of_the_kernel_s_can_be_opened_for_writing,
    test_secrets_cannot_be_found,
    test_shared_memory_of_the_host_is_not_there,
    test_terminals_of_the_host_are_out_of_reach,
    test_the_counters_of_the_host_are_hidden,
    test_the_kernel_s_log_can_be_neither_read_nor_written,
    test_the_launcher_s_socket_is_out_of_reach,
    test_the_memory_of_another_job_of_the_same_user_is_out_of_reach,
)
from tests.support.images import have_image, python_root
from tests.support.worker_harness import Bench, open_bench, run

__all__ = [
    "core_pattern",
    "listener",
    "test_a_crash_leaves_no_core_file",
    "test_a_crash_starts_nothing_on_the_host",
    "test_a_device_of_the_host_cannot_be_opened",
    "test_a_service_of_the_host_cannot_be_talked_to",
    "test_no_other_process_has_a_number",
    "test_no_raw_socket_can_be_made",
    "test_nothing_of_the_kernel_s_can_be_opened_for_writing",
    "test_secrets_cannot_be_found",
    "test_shared_memory_of_the_host_is_not_there",
    "test_terminals_of_the_host_are_out_of_reach",
    "test_the_counters_of_the_host_are_hidden",
    "test_the_kernel_s_log_can_be_neither_read_nor_written",
    "test_the_launcher_s_socket_is_out_of_reach",
    "test_the_memory_of_another_job_of_the_same_user_is_out_of_reach",
]


@pytest.fixture(scope="module")
def python_image() -> Iterator[Path]:
    """The root, once: each state directory has it by links."""
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield hostile(python_root(where / "root"))
    shutil.rmtree(where)


def hostile(root: Path) -> Path:
    """What no import leaves in an image, and would be no way out if it did: see the tests."""
    # what is a secret on the host is one for cat of the image, too
    for name in ("set-id", "capable"):
        shutil.copy("/bin/cat", root / "bin" / name)
    os.setxattr(root / "bin/capable", "security.capability", struct.pack("<5I", 0x02000001, 1 << 2, 0, 0, 0))
    (root / "bin/set-id").chmod(0o6755)
    (root / "closed").write_text("secret")
    (root / "closed").chmod(0)
    for name, number in (("zero", (1, 5)), ("memory", (1, 1)), ("log", (1, 11))):
        os.mknod(root / name, 0o666 | stat.S_IFCHR, os.makedev(*number))
        (root / name).chmod(0o666)
    (root / "out").symlink_to("/../../../../etc")
    (root / "etc/shadow-of-the-host").symlink_to("/etc/shadow")
    (root / "up").symlink_to("../../../../var/lib")
    return root


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
    monkeypatch.setitem(WAY, "root", "image")
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


async def test_set_id_programs_and_devices_of_an_image_are_inert(worker: Worker) -> None:
    """A program of root's that is set-id, one with a capability, and devices: none gives a job anything."""
    program = """
devices = [attempt(os.open, f'/{name}', os.O_RDONLY) for name in ('zero', 'memory', 'log')]
[os.stat('/bin/set-id').st_mode & 0o6000, *devices]
"""
    mode, *devices = await inside(worker, program)
    # it is the job's own user whom it would become
    assert (mode, set(devices) <= DENIED) == (0o6000, True), devices
    for name in ("set-id", "capable"):
        status, output = await run_inside(
            worker, f"/bin/{name} /etc/shadow; chmod 0 /closed; /bin/{name} /closed"
        )
        assert (b"secret" in output, status and status.code) == (False, 1), output
        _, output = await run_inside(worker, f"/bin/{name} /proc/self/status")
        fields = dict(line.split(":\t", 1) for line in output.decode().splitlines())
        assert ({*fields["Uid"].split()} & {"0"}, int(fields["CapEff"], 16)) == (set(), 0)


async def test_links_of_an_image_lead_nowhere_else(bench: Bench, worker: Worker) -> None:
    """Absolute ones, and those that go up: to the image's own files."""
    (bench.directory / "canary").write_text("of the host")
    canary = f"/up/{bench.directory.name}/canary"
    program = f"""
found = [attempt(os.stat, path) for path in ('/etc/shadow-of-the-host', '{canary}', '/out/ssl')]
[set(found) == {{'ENOENT'}}, os.path.samefile('/out', '/etc')]
"""
    assert await inside(worker, program) == [True, True]
