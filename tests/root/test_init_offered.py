"""pjw-init and the operator's directories: who opens them, and where an order has them attached."""

import array
import errno
import os
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.init_harness import JOB_UID, Harness

USER = ("--uid", str(JOB_UID), "--gid", str(JOB_UID))
REFUSED = ["cloned", f"failed options {errno.EINVAL}"]


def opened(init: Harness, *words: str) -> tuple[list[str], list[int]]:
    """Have directories opened; the reports, and the mounts by their descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        command = [str(init.binary), "--report-fd", str(theirs.fileno()), *words]
        subprocess.run(command, env={}, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL, check=False)
        theirs.close()
        reports: list[str] = []
        trees = array.array("i")
        while True:
            data, ancillary, _, _ = ours.recvmsg(1024, socket.CMSG_SPACE(4))
            if not data:
                return reports, list(trees)
            reports.append(data.decode())
            for _, _, payload in ancillary:
                trees.frombytes(payload)


@pytest.fixture
def tree(init: Harness, tmp_path: Path) -> Iterator[int]:
    """A mount of a directory with a file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("data\n")
    reports, [tree] = opened(init, "--open", str(tmp_path / "data"))
    assert reports == ["opened"]
    yield tree
    os.close(tree)


def test_what_is_opened(init: Harness, tmp_path: Path) -> None:
    """One mount after the other, each with its flags, of which the source itself has none."""
    reports, trees = opened(init, "--open", str(tmp_path), "--open-writable", str(tmp_path))
    assert reports == ["opened", "opened"]
    flags = [os.fstatvfs(tree).f_flag for tree in trees]
    assert [bool(each & os.ST_RDONLY) for each in flags] == [True, False]
    assert all(each & os.ST_NOSUID and each & os.ST_NODEV for each in flags)
    assert not os.statvfs(tmp_path).f_flag & os.ST_RDONLY
    for tree in trees:
        os.close(tree)


def test_what_is_not_opened(init: Harness, tmp_path: Path) -> None:
    """No link, also on the way, no file, no FIFO that would wait; the report has no path of the host's."""
    (tmp_path / "link").symlink_to("/usr")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, error in (
        ("link", errno.ELOOP),
        ("link/share", errno.ELOOP),
        ("file", errno.ENOTDIR),
        ("fifo", errno.ENOTDIR),
        ("none", errno.ENOENT),
    ):
        reports, trees = opened(init, "--open", "/usr", "--open", str(tmp_path / name), "--open", "/etc")
        assert reports == ["opened", f"failed mount-source {error} open the directory of the mount"]
        os.close(trees[0])


def test_what_is_no_device(init: Harness, tmp_path: Path) -> None:
    """A character device alone, and no link to one; files and directories may come with it."""
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "block", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    (tmp_path / "nodev").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev", "pjw-test", tmp_path / "nodev"], check=True)
    os.mknod(tmp_path / "nodev/node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    try:
        for name, error in (
            ("link", errno.ELOOP),
            ("file", errno.ENODEV),
            ("fifo", errno.ENODEV),
            ("block", errno.ENODEV),
            ("none", errno.ENOENT),
            ("nodev", errno.ENODEV),
            ("nodev/node", errno.EACCES),
        ):
            reports, trees = opened(init, "--open-device", "/dev/null", "--open-device", str(tmp_path / name))
            assert reports == ["opened", f"failed mount-source {error} open the directory of the mount"], name
            os.close(trees[0])
    finally:
        subprocess.run(["umount", tmp_path / "nodev"], check=True)
    reports, trees = opened(init, "--open-file", str(tmp_path / "file"), "--open-file", str(tmp_path))
    assert reports == ["opened"] * 2
    for tree in trees:
        flags = os.fstatvfs(tree).f_flag
        assert flags & os.ST_RDONLY
        assert flags & os.ST_NODEV
        os.close(tree)


def test_an_order_brings_devices(init: Harness, tree: int, tmp_path: Path) -> None:
    """At places that are made, in what is the job's own and read-only to it; a mount comes before them."""
    _, [node] = opened(init, "--open-device", "/dev/full")
    words = ("--mount-at", "/mnt/a", "--device-at", "/dev/a/b", "--device-at", "/run/c/d")
    script = "cat /mnt/a/file /run/c/d/file; echo x > /dev/a/b || echo full; touch /dev/x /run/x /run/c/x"
    _, [other] = opened(init, "--open-file", str(tmp_path / "data"))
    job = init.order(*USER, *words, script=script, more_fds=[tree, node, other]).wait()
    os.close(node)
    os.close(other)
    assert job.text.splitlines()[:2] == ["data", "data"]
    assert "\nfull\n" in job.text
    assert job.text.count("Read-only file system") == 3
    late = ("--device-at", "/dev/a", "--mount-at", "/mnt/a")
    assert init.order(*USER, *late, more_fds=[tree, tree]).reports == REFUSED


@pytest.mark.parametrize(
    "words",
    [
        ["--open", "usr"],
        ["--open-device", "/dev/null"] * 137,
        ["--open", "/usr", "--wait"],
        ["--open", "/usr", "--", "true"],
    ],
)
def test_who_opens_does_nothing_else(init: Harness, words: Sequence[str]) -> None:
    """Absolute paths, not too many, and no job beside them."""
    reports, trees = opened(init, *words)
    assert reports[0].startswith(f"failed options {errno.EINVAL}")
    assert trees == []


def test_an_order_brings_mounts(init: Harness, tree: int, tmp_path: Path) -> None:
    """In the order of its words, where it says: /mnt gives way to one that has their places."""
    tmp_path.chmod(0o777)
    _, [other] = opened(init, "--open-writable", str(tmp_path))
    words = ("--mount-at", "/mnt/a/b", "--mount-at", "/run/job/c/d")
    script = "cat /mnt/a/b/file c/d/data/file; ls /mnt /mnt/a; stat -c %u c; echo 1 > c/d/new; touch /mnt/x"
    job = init.order(*USER, *words, script=script, more_fds=[tree, other]).wait()
    os.close(other)
    *seen, last = job.text.splitlines()
    assert seen == ["data", "data", "/mnt:", "a", "", "/mnt/a:", "b", str(JOB_UID)], job.reports
    assert last.endswith("Read-only file system")
    assert (tmp_path / "new").stat().st_uid == JOB_UID


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/etc/passwd", errno.ENOTDIR),
        ("/etc/none", errno.EROFS),
        ("/proc/self/cwd", errno.ELOOP),
        ("/dev/fd", errno.ELOOP),
        ("/etc/passwd/x", errno.ENOTDIR),
    ],
)
def test_where_nothing_can_be_attached(init: Harness, tree: int, path: str, error: int) -> None:
    """A file, a link, what cannot be made: the step fails with the path, and no command is executed."""
    job = init.order(*USER, "--mount-at", path, more_fds=[tree])
    assert job.reports == ["cloned", f"failed mount-at {error}"]
    assert job.operation == f"mount the operator's directory at {path}"


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--mount-at", "/mnt/a"], 0),
        (["--mount-at", "/mnt/a"], 2),
        (["--mount-at", "mnt"], 1),
        (["--mount-at", "/" + "x" * 255], 1),
        ([word for number in range(9) for word in ("--mount-at", f"/mnt/{number}")], 9),
        ([word for number in range(137) for word in ("--device-at", f"/dev/{number}")], 137),
    ],
)
def test_orders_of_mounts_that_are_refused(
    init: Harness, tree: int, words: Sequence[str], count: int
) -> None:
    """Each with its descriptor, at most eight (of devices more), and absolute paths of at most 255 bytes."""
    assert init.order(*USER, *words, more_fds=[tree] * count).reports == REFUSED
