"""Images: roots of jobs' own (S6): whose they are, what a job sees and may write, hostile ones, crashes."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pjw import AsyncClient
from pjw.errors import ImageNotFoundError, InvalidJobError, JobStateError, LimitReachedError
from pjw.launcher import images, mount_tree
from pjw.launcher.image_store import ImageStore
from pjw.launcher.images import Images, Trees
from pjw.launcher.policy import instance_name
from pjw.launcher.protocol import Launch, Refused
from pjw.launcher.scratch import known_places
from pjw.launcher.scratch_use import count
from pjw.model import EndReason, JobSpec, QueueSpec
from pjw.process import close_all
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Worker
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.settings import DiskMarks, Quotas, Retention
from tests.root.test_launcher_hostile import Peer, connect, peer
from tests.support.disks import small_disk
from tests.support.images import (
    directory,
    docker_archive,
    entry,
    have_image,
    layer,
    layer_of,
    oci_layout,
    small_root,
)
from tests.support.service import BIN, CALL_SECONDS, Service, wait_for, waiting_inits
from tests.support.uploads import send_files
from tests.support.worker_harness import NO_LIMITS, Bench, open_bench, read_all, read_until
from tests.unit import test_launcher_client as launcher_client

__all__ = ["connect", "peer"]

IDLE = "echo in; exec sleep 1000"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A root with a shell, on the file system that state directories are on."""
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    yield small_root(where / "root")
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def offered(service: Service, root: Path) -> Iterator[Service]:
    """The shared service, whose operator has imported an image while it runs."""
    pjwd(service, "import", "small", f"dir:{root}")
    yield service
    pjwd(service, "rm", "small")


@pytest.fixture
async def bench(root: Path) -> AsyncIterator[Bench]:
    """A state directory with an image of the operator's; at the end nothing of jobs is left."""
    async with open_bench() as bench:
        bench.state.mkdir()
        have_image(bench.state, "small", root)
        yield bench


def pjwd(service: Service, *arguments: str, refused: bool = False) -> str:
    """Run `pjwd image`; what it says."""
    action, *rest = arguments
    done = subprocess.run(
        [str(BIN / "pjwd"), "image", action, "--state-dir", str(service.state), *rest],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode != 0) == refused, done
    return done.stderr if refused else done.stdout


def digests(state: Path) -> list[str]:
    """What lies in the directory of the operator's images."""
    return sorted(set(os.listdir(state / "images")) - {"table"})


async def say(
    worker: Worker, command: str | list[str], image: str = "small", client: str = "local", **more: object
) -> bytes:
    """Run a job in an image to its end; its output."""
    job = await worker.start(JobSpec(command, image=image, **more), client)  # type: ignore[arg-type]
    output = await read_all(worker, job.id)
    await worker.wait(job.id)
    return output


# --- what a job sees


def test_a_job_has_the_image_and_none_of_the_machine(offered: Service) -> None:
    """Its files, and the job's own directories; nothing of the host, nor of another job or client."""
    look = "cat /etc/os-release; ls /; ls /usr /home /root /var/lib 2>&1; pwd"
    seen = offered.ok("run", "--image", "small", look)
    assert seen.startswith("ID=small\nbin\ndev\netc\n")
    assert "/usr/bin" not in seen
    assert seen.endswith("/run/job\n")
    write = "echo mine > /etc/hidden && mkdir /app && rm /etc/os-release && cat /etc/hidden"
    assert offered.ok("run", "--image", "small", write) == "mine\n"
    for client in ("alice", "bob"):
        again = offered.ok(
            "run", "--image", "small", "cat /etc/os-release; ls /etc /app 2>&1; true", client=client
        )
        assert ("ID=small" in again, "hidden" in again) == (True, False)
    shown = json.loads(offered.ok("get", offered.ok("start", "--image", "small", "true").strip()))
    assert (shown["image"], shown["readOnly"]) == ("small", False)


def test_files_belong_to_the_job(offered: Service) -> None:
    """What is root's in the image is the job's user's, who has no privilege; its names are there."""
    said = offered.ok(
        "run", "--image", "small", "id -u; stat -c %u /etc/os-release; id -un; cat /etc/hosts; touch /bin/x"
    )
    uid, owner, name, *hosts = said.splitlines()
    assert (uid == owner, uid != "0", name) == (True, True, "pjw-job")
    assert hosts[0] == "127.0.0.1\tlocalhost"


def test_read_only(offered: Service) -> None:
    """Nothing can be written to the image; the job's own directories can be."""
    write = "touch /etc/x 2>/dev/null || echo refused; touch /run/job/y /tmp/z && echo own"
    assert offered.ok("run", "--image", "small", "--read-only", write) == "refused\nown\n"


def test_no_file_of_the_host_by_any_way(offered: Service) -> None:
    """Not by another process's root, its descriptors or the table of mounts; and set-id is inert."""
    look = (
        "for p in /proc/[0-9]*; do ls $p/root/usr/bin $p/cwd/../../home 2>/dev/null; readlink $p/root; done;"
        " ls -d /../../../usr 2>/dev/null; cat /proc/self/mountinfo"
    )
    seen = offered.ok("run", "--image", "small", look)
    roots, mounts = seen.split("\n", 1)[0], [line for line in seen.splitlines() if " - " in line]
    assert roots == "/"
    at_root = [line for line in mounts if line.split()[4] == "/"][-1]
    assert str(offered.state) not in at_root
    assert ({"nosuid", "nodev"} <= set(at_root.split()[5].split(",")), " overlay " in at_root) == (True, True)


def test_words_for_what_cannot_be(offered: Service) -> None:
    """An image that is not there, read-only without one, no command, a program that is missing."""
    assert offered.refused("run", "--image", "none", "true") == (
        1,
        "pjw: error: no image none\nhint: pjw image ls\n",
    )
    assert "without an image" in offered.refused("run", "--read-only", "true")[1]
    assert "no command of its own" in offered.refused("run", "--image", "small")[1]
    assert "is no name for an image" in offered.refused("run", "--image", "a/b", "true")[1]
    assert "python3" in offered.refused("run", "--image", "small", "--", "python3", "-V")[1]


# --- the operator's


def test_import_ls_and_rm(offered: Service, root: Path, tmp_path: Path) -> None:
    """Each form; equal images are one directory; what cannot be imported is named, and leaves nothing."""
    before = digests(offered.state)
    saved = docker_archive(tmp_path / "saved.tar", [layer_of(root)], {"Env": ["A=1"]})
    layout = oci_layout(tmp_path / "layout", [layer_of(root), layer(entry("etc/.wh.os-release"))])
    for name, source in (
        ("one", f"docker-archive:{saved}"),
        ("two", f"oci:{layout}"),
        ("three", f"oci:{layout}"),
    ):
        assert pjwd(offered, "import", name, source).startswith("sha256-")
    assert len(digests(offered.state)) == len(before) + 2
    shown = {each["name"]: each for each in json.loads(pjwd(offered, "ls", "--format", "json"))}
    assert (shown["one"]["config"]["env"], set(shown)) == ({"A": "1"}, {"one", "two", "three", "small"})
    assert offered.ok("run", "--image", "one", 'echo "$A"') == "1\n"
    assert "No such file" in offered.pjw("run", "--image", "two", "cat /etc/os-release").stderr.decode() + (
        offered.pjw("run", "--image", "two", "cat /etc/os-release 2>&1").stdout.decode()
    )
    assert offered.ok("image", "ls").split() == ["one", "small", "three", "two"]
    pjwd(offered, "rm", "one", "two", "three")
    # inits that wait for jobs with them go with the next one
    offered.ok("run", "true")
    pjwd_sweeps(offered, before)
    (tmp_path / "text").write_text("no image")
    assert "no tar archive" in pjwd(offered, "import", "x", f"tar:{tmp_path}/text", refused=True)
    assert "no image x" in pjwd(offered, "rm", "x", refused=True)
    assert "does not say what it is" in pjwd(offered, "import", "x", str(saved), refused=True)
    assert digests(offered.state) == before


def pjwd_sweeps(service: Service, wanted: list[str]) -> None:
    """Wait until only these images are there."""
    wait_for(lambda: digests(service.state) == wanted)


def test_a_link_of_a_job_s_own_keeps_no_image(offered: Service, root: Path) -> None:
    """A job without the image says that it has it: it is removed all the same."""
    before = digests(offered.state)
    digest = pjwd(offered, "import", "kept", f"dir:{root}/etc").strip()
    job = offered.ok("start", f"ln -s {digest} image; echo in; exec sleep 1000").strip()
    offered.ok("exec", job, "until readlink image; do :; done")
    pjwd(offered, "rm", "kept")
    assert digests(offered.state) == before
    offered.ok("stop", job)


def test_what_has_no_room_is_refused(offered: Service, tmp_path: Path) -> None:
    """A small archive of files without end fills no disk: nothing of it is unpacked."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"GNU.sparse.size": str(2**43), "GNU.sparse.map": f"{2**43},0"}
    (tmp_path / "sparse.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    words = pjwd(offered, "import", "x", f"tar:{tmp_path}/sparse.tar", refused=True)
    assert f"its files have {2**43} bytes, and " in words


def test_removal_below_a_running_job(offered: Service, root: Path) -> None:
    """The job goes on with its files; no other starts; with its end they are gone."""
    before = digests(offered.state)
    other = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    try:
        subprocess.run(["cp", "-a", f"{root}/.", other], check=True)
        (other / "etc" / "os-release").write_text("ID=other\n")
        pjwd(offered, "import", "going", f"dir:{other}")
    finally:
        shutil.rmtree(other)
    with offered.client() as client:
        # cat: a job that ends before its input has ended would refuse the rest of that
        job = client.start(JobSpec("read line; cat /etc/os-release; cat", image="going", input=True))
        pjwd(offered, "rm", "going")
        assert offered.refused("run", "--image", "going", "true")[0] == 1
        assert len(digests(offered.state)) == len(before) + 1
        client.write_input(job.id, [b"go\n"])
        assert client.wait(job.id).succeeded
        assert b"".join(client.logs(job.id)) == b"ID=other\n"
    offered.ok("run", "true")
    pjwd_sweeps(offered, before)


def test_a_kill_in_the_midst_of_an_import_leaves_nothing(offered: Service, tmp_path: Path) -> None:
    """What SIGKILL has left goes with the next import, or the next start of pjwd."""
    before = digests(offered.state)
    fifo = tmp_path / "image.tar"
    data = layer(directory("etc"), entry("etc/big", bytes(2**20)))
    fifo.write_bytes(data)
    importing = subprocess.Popen(
        [BIN / "pjwd", "image", "import", "--state-dir", str(offered.state), "x", f"tar:{fifo}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # as soon as there is something of it
    wait_for(lambda: digests(offered.state) != before or importing.poll() is not None)
    importing.kill()
    importing.wait()
    pjwd(offered, "rm", "x", refused=True) if not named(offered, "x") else pjwd(offered, "rm", "x")
    pjwd(offered, "import", "y", f"tar:{fifo}")
    pjwd(offered, "rm", "y")
    assert digests(offered.state) == before


def named(service: Service, name: str) -> bool:
    """Whether the operator has an image of this name."""
    return name in {each["name"] for each in json.loads(pjwd(service, "ls", "--format", "json"))}


# --- a client's own


def test_load_ls_and_rm(offered: Service, root: Path, tmp_path: Path) -> None:
    """One of a client's own is its alone; ENV, WORKDIR, ENTRYPOINT and CMD are honoured, and replaced."""
    config = {
        "Env": ["WHO=image", "B=2"],
        "WorkingDir": "/app",
        "Entrypoint": ["env"],
        "Cmd": ["pwd"],
        "User": "0",
    }
    saved = docker_archive(tmp_path / "saved.tar", [layer_of(root), layer(entry("app/x", b"x"))], config)
    assert offered.ok("image", "load", "mine", str(saved)) == "mine\n"
    try:
        assert offered.ok("run", "--image", "mine") == "/app\n"
        assert (
            offered.ok("run", "--image", "mine", "--env", "WHO=me", "--", "sh", "-c", "echo $WHO $B; ls")
            == "me 2\nx\n"
        )
        assert offered.ok("run", "--image", "mine", "--workdir", "/etc", "--", "pwd") == "/etc\n"
        assert offered.ok("run", "--image", "mine", "--workspace", "work", "--", "pwd") == "/run/workspace\n"
        assert offered.ok("image", "ls").split() == ["mine", "small"]
        assert offered.ok("image", "ls", client="bob") == "small\n"
        assert offered.refused("run", "--image", "mine", "true", client="bob")[0] == 1
        [own, _] = json.loads(offered.ok("image", "ls", "--format", "json"))
        assert (own["clientName"], own["config"]["workdir"]) == ("alice", "/app")
        assert "NAME" in offered.ok("image", "ls", "--format", "table")
        # neither the image nor its job's directory is a workspace of the client's; other tests have their own
        names = offered.ok("workspace", "ls").split()
        assert ("work" in names, [name for name in names if not name[0].isalnum()]) == (True, [])
    finally:
        offered.ok("image", "rm", "mine")
        offered.ok("workspace", "rm", "work")
    assert offered.refused("image", "rm", "mine") == (1, "pjw: error: no image mine\nhint: pjw image ls\n")
    wait_for(lambda: own_images(offered) == [])


def own_images(service: Service) -> list[str]:
    """What clients' images lie in."""
    return [path.name for path in (service.state / "workspaces").glob("*/@*")]


async def test_both_clients(offered: Service, root: Path, tmp_path: Path) -> None:
    """The library loads, lists, uses and removes; sync and asyncio."""
    with offered.client() as client:
        loaded = client.load_image("lib", f"dir:{root}")
        assert (loaded.image.name, loaded.left_out) == ("lib", [])
        assert client.run(JobSpec("cat /etc/os-release", image="lib")).output == b"ID=small\n"
        client.remove_image("lib")
        with pytest.raises(ImageNotFoundError):
            client.remove_image("lib")
    async with AsyncClient(offered.address, *offered.files()) as client:
        await client.load_image("lib", f"oci:{oci_layout(tmp_path / 'layout', [layer_of(root)])}")
        assert [image.name for image in await client.images()] == ["lib", "small"]
        await client.remove_image("lib")
    wait_for(lambda: own_images(offered) == [])


def load_as_it_is(service: Service, name: str, tree: Path) -> None:
    """Load a directory as a hostile client would, without what pjw adds to an image."""
    with service.client() as client, service.stub() as stub:
        upload = client.upload([str(tree)])
        stub.LoadImage(pb.LoadImageRequest(name=name, upload=upload.name), timeout=CALL_SECONDS)


@pytest.mark.parametrize("point", ["proc", "tmp", "run"])
def test_a_link_where_ours_go_is_refused_in_words(offered: Service, tmp_path: Path, point: str) -> None:
    """An image with /proc as a link, which only a client of its own making can load, starts no job."""
    for name in {"dev", "proc", "run", "sys", "tmp"} - {point}:
        (tmp_path / "tree" / name).mkdir(parents=True)
    (tmp_path / "tree" / point).symlink_to("/etc")
    with offered.client() as client:
        load_as_it_is(offered, "odd", tmp_path / "tree")
        try:
            with pytest.raises(JobStateError, match=f"it needs a directory, and no link, at /{point}"):
                client.run(JobSpec("true", image="odd"))
        finally:
            client.remove_image("odd")


def test_links_for_names_lead_nowhere(offered: Service, root: Path, tmp_path: Path) -> None:
    """Where /etc is a link to /proc, or /etc/passwd one to a file of init's, nothing is shown there."""
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-a", f"{root}/.", tree], check=True)
    for name in ("dev", "proc", "run", "sys", "tmp"):
        (tree / name).mkdir()
    (tree / "etc" / "passwd").unlink()
    (tree / "etc" / "passwd").symlink_to("/proc/self/environ")
    (tree / "etc" / "hosts").symlink_to("/proc/sys/kernel/core_pattern")
    with offered.client() as client:
        load_as_it_is(offered, "odd", tree)
        try:
            seen = client.run(
                JobSpec("grep -c pjw-job /proc/self/mountinfo; cat /proc/self/mountinfo", image="odd")
            )
            assert b" /proc/sys" not in seen.output
        finally:
            client.remove_image("odd")


def test_an_archive_that_cannot_be_unpacked(offered: Service) -> None:
    """A broken archive ends the load in words, and leaves neither image nor files; so does a missing one."""
    with offered.client() as client, offered.stub() as stub:
        send_files(stub, "garbage", [b"no archive at all" * 100])
        for upload, words in (
            ("garbage", r"cannot load the image bad: .*no tar archive"),
            ("missing", "there is none called"),
        ):
            with pytest.raises(grpc.RpcError, match=words):
                stub.LoadImage(pb.LoadImageRequest(name="bad", upload=upload), timeout=CALL_SECONDS)
        assert [image.name for image in client.images()] == ["small"]
    wait_for(lambda: own_images(offered) == [])


def test_everything_else_works_in_an_image(offered: Service, tmp_path: Path) -> None:
    """Sessions have its files and its environment; uploads, artifacts, copies, the queue and arrays work."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("sent\n")
    out = tmp_path / "out"
    run = (
        "run",
        "--image",
        "small",
        "--upload",
        f"{tmp_path}/in",
        "--output",
        "kept",
        "--output-dir",
        str(out),
    )
    assert offered.ok(*run, "cat file; echo made > kept") == "sent\n"
    assert (out / "kept").read_text() == "made\n"
    job = offered.ok("start", "--image", "small", "touch /etc/mark; echo up; exec sleep 1000").strip()
    assert (
        offered.ok("exec", job, "ls /etc/mark; cat /etc/os-release; pwd") == "/etc/mark\nID=small\n/run/job\n"
    )
    offered.ok("cp", f"{tmp_path}/in/file", f"{job}:/etc/copied")
    assert offered.ok("exec", job, "cat /etc/copied") == "sent\n"
    offered.ok("stop", job)
    queued = offered.ok(
        "start", "--queue", "--array", "1-2", "--image", "small", "--read-only", "cat /etc/os-release"
    ).strip()
    assert offered.pjw("wait", queued).returncode == 0
    assert offered.ok("logs", f"{queued}_1") == "ID=small\n"


# --- settings, quotas, retention, crashes


async def test_a_default_image(bench: Bench) -> None:
    """With it no job sees the machine; one that names another has that; a client's own can be loaded."""
    worker = await bench.open(default_image="small")
    job = await worker.start(JobSpec("cat /etc/os-release"))
    assert (await read_all(worker, job.id), job.image) == (b"ID=small\n", "small")
    await worker.wait(job.id)
    with pytest.raises(ImageNotFoundError):
        await say(worker, "true", "other")


async def test_numbers_and_ages(bench: Bench, root: Path, tmp_path: Path) -> None:
    """At most so many; what is unused for too long goes, but not below a job."""
    worker = await bench.open(quotas=Quotas(images_max=1))
    await load(worker, tmp_path, "one")
    with pytest.raises(LimitReachedError, match="has 1 images, and at most 1 may be"):
        await load(worker, tmp_path, "two")
    # a new one by the same name takes its place
    await load(worker, tmp_path, "one")
    worker.reconfigure(bench.changed(retention=Retention(image_age_seconds=1)))
    await eventually(lambda: not list(bench.state.glob("workspaces/*/@*")))
    assert [image.name for image in await worker.images()] == ["small"]


async def load(worker: Worker, tmp_path: Path, name: str, client: str = "local") -> None:
    """Load an image of two files."""
    (tmp_path / "image.tar").write_bytes(layer(directory("etc"), entry("etc/x", b"x")))
    from pjw.image_archive import ImageArchive

    with ImageArchive.open(str(tmp_path / "image.tar")) as archive:
        async with worker.write_upload(name, client) as writer:
            for piece in archive.pieces():
                await writer.write(writer.offset, piece, end=False)
            await writer.write(writer.offset, b"", end=True)
        await worker.load_image(name, name, archive.config, archive.digest, client)


async def eventually(condition: object) -> None:
    """Wait for what has no event."""
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


async def test_a_restart_finds_jobs_in_images(bench: Bench, root: Path, tmp_path: Path) -> None:
    """A job goes on in an image that was removed meanwhile, which goes with its end; sessions enter it."""
    worker = await bench.open()
    job = await worker.start(JobSpec(IDLE, image="small"))
    await read_until(worker, job.id, b"in")
    await bench.close(worker)
    worker = await bench.open()
    session = await worker.exec(job.id, JobSpec("exec cat /etc/os-release"))
    assert (await worker.wait_session(job.id, session.number)).exit_status is not None
    await worker.stop(job.id, 0)


async def test_a_file_without_a_name_counts(bench: Bench) -> None:
    """What a job writes to a file of its image that it has removed is what it uses of the disk."""
    worker = await bench.open()
    job = await worker.start(JobSpec(f"exec 9>/etc/x; rm /etc/x; cat /bin/* >&9; {IDLE}", image="small"))
    await read_until(worker, job.id, b"in")
    places = [str(bench.state / "scratch")]
    assert count(instance_name(str(bench.state)), places)[job.id].bytes > 2**20
    await worker.stop(job.id, 0)


async def test_blocks_that_are_root_s_stay_root_s(root: Path) -> None:
    """What a job writes to its image is its user's for the file system, too."""
    with small_disk(24, reserved_percent=40) as disk:
        async with open_bench() as bench:
            bench.state.mkdir()
            have_image(bench.state, "small", root)
            worker = await bench.open(scratch_dir=str(disk), disk=DiskMarks(0, 0))
            job = await worker.start(JobSpec(f"cat /dev/zero >> /bin/ls; {IDLE}", image="small"))
            await read_until(worker, job.id, b"in")
            status = os.statvfs(disk)
            assert (status.f_bavail < 1000, status.f_bfree * 3 > status.f_blocks) == (True, True)
            await worker.stop(job.id, 0)


async def test_an_image_without_files_is_none(bench: Bench, tmp_path: Path) -> None:
    """After the restore of a backup, which has none, the next start of pjwd knows it no more."""
    worker = await bench.open()
    await load(worker, tmp_path, "lost")
    await bench.close(worker)
    [place] = bench.state.glob("workspaces/*/@*")
    shutil.rmtree(place)
    worker = await bench.open()
    assert [image.name for image in await worker.images()] == ["small"]
    await load(worker, tmp_path, "lost")
    await worker.remove_image("lost")


async def test_a_load_that_nobody_waits_for_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    """Its client is gone, or pjwd is: the job is ended, and what it has unpacked goes."""
    worker = await bench.open()
    async with worker.write_upload("up", "local") as writer:
        data = layer(*(entry(f"{number}", bytes(1000)) for number in range(20_000)))
        for start in range(0, len(data), 2**20):
            await writer.write(writer.offset, data[start : start + 2**20], end=False)
        await writer.write(writer.offset, b"", end=True)
    loading = asyncio.ensure_future(worker.load_image("gone", "up"))
    await eventually(lambda: list(bench.state.glob("workspaces/*/@*")))
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await eventually(lambda: not list(bench.state.glob("workspaces/*/@*")))
    assert [image.name for image in await worker.images()] == ["small"]


def test_a_kill_in_the_midst_of_a_load_leaves_nothing(make_service: object) -> None:
    """kill -9 while a job unpacks an image: after the next start there is neither job, image nor file."""
    service: Service = make_service()  # type: ignore[operator]
    service.start()
    with service.stub() as stub:
        send_files(stub, "whole", [layer(*(entry(f"{number}", bytes(1000)) for number in range(10_000)))])
        loading: Any = stub.LoadImage.future(pb.LoadImageRequest(name="gone", upload="whole"))
        wait_for(lambda: own_images(service))
        service.kill("both")
        assert loading.exception().code() is grpc.StatusCode.UNAVAILABLE
    service.start()
    wait_for(lambda: own_images(service) == [])
    with service.client() as client:
        assert client.images() == []


def replace_image(bench: Bench, root: Path) -> None:
    """What `pjwd image import small` of other files does: the name is theirs, the former ones are gone."""
    other = have_image(bench.state, "other", root)
    store = ImageStore(str(bench.state), known_places(str(bench.state)))
    store.keep("", "small", other, store.table()["images"][other])
    store.forget("other")
    store.sweep(shutil.rmtree)
    assert digests(bench.state) == [other]


@pytest.mark.parametrize("queue", [None, QueueSpec()], ids=["start", "queue"])
async def test_an_import_while_a_job_starts(
    bench: Bench, root: Path, monkeypatch: pytest.MonkeyPatch, queue: QueueSpec | None
) -> None:
    """Between the look for the name and the launch it is given to other files: the job has these."""
    worker = await bench.open()
    real, found = LauncherClient.request_image_table, list[str]()

    async def read(launcher: LauncherClient) -> int:
        descriptor = await real(launcher)
        table = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        found.append(json.loads(table)["names"]["small"])
        if len(found) == 1:
            replace_image(bench, root)
        return descriptor

    monkeypatch.setattr(LauncherClient, "request_image_table", read)
    job = await worker.start(JobSpec("cat /etc/os-release", image="small", queue=queue))
    ended = await worker.wait(job.id)
    assert (ended.succeeded, await read_all(worker, job.id)) == (True, b"ID=small\n")
    assert found[0] != found[-1]
    # and one that has no name any more is refused, as before
    monkeypatch.undo()
    with pytest.raises(ImageNotFoundError):
        await worker.start(JobSpec("true", image="other"))


def test_a_directory_is_removed_once(bench_store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the launcher looks while that takes long; after a removal that failed, again."""
    monkeypatch.setattr(images, "spawn_removal", len)
    store = Images(bench_store, None, None)  # type: ignore[arg-type]
    gone = os.path.join(bench_store.path, "gone-1")
    os.mkdir(gone)
    assert store.sweep() == [(len(gone), gone)]
    assert store.sweep() == []
    store.removed(gone)
    assert store.sweep() == [(len(gone), gone)]
    store.close()


@pytest.fixture
def bench_store(tmp_path: Path) -> ImageStore:
    """An empty store."""
    return ImageStore(str(tmp_path), ())


async def test_the_pool_guesses_the_image(bench: Bench) -> None:
    """The next job of a client in the same image has an init that waited, with the image's mounts."""
    worker = await bench.open()
    await say(worker, "true")
    wait_for(lambda: 2 in waiting_inits(bench.state))
    waited = waiting_inits(bench.state)[2]
    job = await worker.start(JobSpec(IDLE, image="small"))
    await read_until(worker, job.id, b"in")
    assert (job.id, bench.init_pid(job.id)) == (2, waited)
    # one without the image has none of these
    wait_for(lambda: 3 in waiting_inits(bench.state))
    waited = waiting_inits(bench.state)[3]
    other = await worker.start(JobSpec("ls -d /usr; exec sleep 1000"))
    assert await read_until(worker, other.id, b"\n") == b"/usr\n"
    assert (other.id, bench.init_pid(other.id) != waited) == (3, True)
    for each in (job, other):
        await worker.stop(each.id, 0)


async def test_a_queued_job_whose_image_is_gone(bench: Bench) -> None:
    """It ends without a start, and says why."""
    worker = await bench.open()
    job = await worker.start(JobSpec("true", image="none", queue=QueueSpec()))
    ended = await worker.wait(job.id)
    assert (ended.reason, ended.detail) == (EndReason.START_FAILED, "no image none")
    with pytest.raises(InvalidJobError, match="command is empty"):
        JobSpec([])


# --- the launcher alone


def test_the_launcher_takes_no_path(connect: Callable[..., Peer], bench: Bench) -> None:
    """A hostile server names a path, another client's image, a link, or a digest without a name: refused."""
    hostile = connect()
    key, other, link = (f"@{number:016x}" for number in range(3))
    places = bench.state / "workspaces"
    (places / "0").mkdir(mode=0o700)
    (places / "1" / other).mkdir(parents=True, mode=0o700)
    (places / "0" / link).symlink_to("/etc")
    unnamed = f"sha256-{'0' * 64}"
    (bench.state / "images" / unnamed).mkdir()
    for name in ("..", "/etc", "small", "sha256-../..", "@..", "table", unnamed, key, other, link):
        reply = hostile.launch(1, image=name)
        assert isinstance(reply, Refused), name
        assert reply.kind in ("invalid", "kernel"), reply
    # one of another user, in the place of the client's own
    (places / "0" / key).mkdir(mode=0o700)
    os.chown(places / "0" / key, hostile.uid + 1, hostile.uid + 1)
    reply = hostile.launch(1, image=key)
    assert isinstance(reply, Refused)
    assert reply.kind == "state"
    # neither does the program for archives take what is another's
    assert isinstance(hostile.launch(1, archive=True, artifacts=True), Refused)
    assert list((bench.state / "scratch").iterdir()) == []


# --- kernels that know less


def test_a_kernel_without_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EINVAL of mount_setattr: one mount is left, that maps nobody; any other error is one."""
    real = mount_tree.clone

    def clone(fd: int, namespace: int | None = None, *, read_only: bool = False) -> int:
        if namespace is not None:
            raise OSError(number, "mount_setattr")
        return real(fd, read_only=read_only)

    directory, trees = os.open(tmp_path, os.O_RDONLY), Trees()
    try:
        mapped, plain = trees.of(directory, 1)
        assert [os.fstat(tree).st_uid for tree in (mapped, plain)] == [1, 0]
        close_all([mapped, plain])
        monkeypatch.setattr(mount_tree, "clone", clone)
        number = errno.EINVAL
        [plain] = trees.of(directory, 1)
        assert (os.fstat(plain).st_uid, os.statvfs(f"/proc/self/fd/{plain}").f_flag & os.ST_RDONLY) == (
            0,
            os.ST_RDONLY,
        )
        os.close(plain)
        number = errno.ENOMEM
        with pytest.raises(OSError, match="mount_setattr"):
            trees.of(directory, 1)
    finally:
        os.close(directory)
        trees.close()


@pytest.mark.parametrize(("kind", "said"), [("clone", "refused"), ("nothing", "written")])
def test_without_maps_a_root_is_read_only(binary: Path, root: Path, kind: str, said: str) -> None:
    """What init makes of a mount that maps nobody: a root that the job reads, and cannot write to."""
    where = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    for name in ("job", "upper", "work", *(f"image/{each}" for each in ("dev", "proc", "run", "sys", "tmp"))):
        (where / name).mkdir(parents=True)
    os.chown(where / "job", 1, 1)
    os.chown(where / "upper", 1, 1)
    subprocess.run(["cp", "-al", f"{root}/.", where / "image"], check=True)
    directory, trees = os.open(where / "image", os.O_RDONLY), Trees()
    try:
        found = trees.of(directory, 1)
        given = found[1:] if kind == "clone" else found
        words = [word for tree in given for word in ("--image-fd", str(tree))]
        command = ["sh", "-c", "touch /etc/x 2>/dev/null && echo written || echo refused"]
        done = subprocess.run(
            [binary, "--uid", "1", "--gid", "1", "--scratch", f"{where}/job", *words, "--", *command],
            capture_output=True, pass_fds=given, check=False,
        )  # fmt: skip
        close_all(found)
        assert (done.stdout.decode().strip(), done.stderr) == (said, b"")
    finally:
        os.close(directory)
        trees.close()
        shutil.rmtree(where)


def test_check_says_what_images_can_be(tmp_path: Path) -> None:
    """`pjwd check` mounts one, says whether jobs can write to it, and leaves nothing."""
    state = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    try:
        done = subprocess.run(
            [BIN / "pjwd", "check", "--state-dir", state], capture_output=True, text=True, check=False
        )
        assert "ok       images: jobs can write to the root that they have of one\n" in done.stdout
        assert os.listdir(state) == []
    finally:
        shutil.rmtree(state)


async def test_a_kernel_without_overlays_is_named_in_words() -> None:
    """What init reports then is a sentence for the client, with who can look further."""
    async with launcher_client.connected() as (client, launcher):
        asked = asyncio.ensure_future(client.request_launch(Launch(1, 1, NO_LIMITS), JobSpec("true"), []))
        await asyncio.sleep(0)
        refused = Refused("image", "mount the overlay of the image for", "job 1", errno.ENODEV, "")
        launcher_client.say(launcher, 1, refused)
        with pytest.raises(
            JobStateError, match=r"^cannot mount the overlay of the image: no such device \(ENODEV\)$"
        ) as caught:
            await asked
    assert caught.value.hint == "ask the operator: pjwd check"
