"""Mounts: what a client may ask for, what an operator may offer, and to whom."""

import os
from pathlib import Path

import pytest

from pjw.errors import ConfigError, InvalidJobError, MountNotFoundError
from pjw.launcher.mounts import read_mounts_of
from pjw.model import JobSpec, MountSource, check_mounts, offered, split_mount
from pjw.server.config import config_of


@pytest.mark.parametrize(
    ("mount", "path"),
    [
        ("data", "/mnt/data"),
        ("data:", "/mnt/data"),
        ("data:/opt", "/opt"),
        ("data:/a:b", "/a:b"),
        ("data:/tmp/x", "/tmp/x"),
        ("data:/run/job/.cache", "/run/job/.cache"),
        ("data:/run/workspace/x", "/run/workspace/x"),
        ("data:/etc/ü x", "/etc/ü x"),
        ("data:/process", "/process"),
    ],
)
def test_what_a_job_may_ask_for(mount: str, path: str) -> None:
    """A name, and perhaps a path; a job shows both."""
    assert JobSpec("true", mounts=[mount]).mounts == (f"data:{path}",)
    assert split_mount(f"data:{path}") == ("data", path)


@pytest.mark.parametrize(
    "mount",
    [
        *("", ":/mnt/x", "/etc", "../data", "da.ta", "data/x", "1data", "d" * 64, "da\0ta"),
        *(
            "data:opt",
            "data:/",
            "data://",
            "data:/a//b",
            "data:/a/",
            "data:/a/../b",
            "data:/./a",
            "data:/a\0b",
        ),
        *("data:/dev", "data:/dev/shm", "data:/proc", "data:/proc/1/root", "data:/sys/fs", "data:/run"),
        *(
            "data:/run/job",
            "data:/run/workspace",
            "data:/run/other",
            "data:/tmp",
            "data:/var",
            "data:/var/tmp",
        ),
        "data:/" + "x" * 255,
        "data:/\udcff",
    ],
)
def test_what_no_job_may_ask_for(mount: str) -> None:
    """No path of the host, nothing that each job has of its own, no path with another meaning."""
    with pytest.raises(InvalidJobError):
        JobSpec("true", mounts=[mount])


def test_no_mount_lies_in_another() -> None:
    """Neither upon nor within: it would be gone, or be made in what is the operator's."""
    for one, other in (("a", "a"), ("a:/x", "b:/x"), ("a:/x", "b:/x/y"), ("a:/x/y", "b:/x")):
        with pytest.raises(InvalidJobError, match="another one is mounted at"):
            check_mounts([one, other])
    assert check_mounts(["a:/x", "a:/xy"]) == ("a:/x", "a:/xy")
    with pytest.raises(InvalidJobError, match="at most 8"):
        check_mounts([f"a:/{number}" for number in range(9)])
    for wrong in ("data", [1], 3):
        with pytest.raises(InvalidJobError, match="a list of text"):
            JobSpec("true", mounts=wrong)  # type: ignore[arg-type]


def test_to_whom_a_mount_is_offered() -> None:
    """A star stands for any characters, and nothing else has a meaning."""
    source = MountSource("data", "/data", clients=("alice", "team-*", "*@example.org"))
    assert [name for name in ("alice", "team-", "team-x", "a@example.org") if not source.is_for(name)] == []
    for name in ("Alice", "alice2", "ateam-x", "a@example_org", ""):
        assert not source.is_for(name)
    assert not MountSource("data", "/data", clients=()).is_for("alice")
    assert offered([source], "alice", ["data:/x"]) == [source]
    for name, client in (("data", "bob"), ("other", "alice")):
        with pytest.raises(MountNotFoundError, match=f"^no mount {name}$"):
            offered([source], client, [f"{name}:/x"])


# --- the configuration, as the server and as the launcher read it

GOOD = """
[mounts.data]
path = "/srv/data"
[mounts.cache-1]
path = "/srv/cache"
read_only = false
clients = ["alice", "team-*"]
"""
WRONG = {
    "no path": "[mounts.data]\nread_only = true",
    "relative": '[mounts.data]\npath = "srv"',
    "dots": '[mounts.data]\npath = "/srv/../etc"',
    "the root": '[mounts.data]\npath = "/"',
    "slash": '[mounts.data]\npath = "/srv/"',
    "name": '[mounts."a.b"]\npath = "/srv"',
    "another key": '[mounts.data]\npath = "/srv"\nwritable = true',
    "a client": '[mounts.data]\npath = "/srv"\nclients = ["a b"]',
    "clients": '[mounts.data]\npath = "/srv"\nclients = "alice"',
    "read_only": '[mounts.data]\npath = "/srv"\nread_only = 1',
    "a number": "[mounts.data]\npath = 3",
    "numbers": '[mounts.data]\npath = "/srv"\nclients = [3]',
    "no table": "mounts = 3",
    "a list": '[[mounts]]\npath = "/srv"',
    "many": "\n".join(f'[mounts.m{number}]\npath = "/srv"' for number in range(65)),
}


def by_launcher(tmp_path: Path, text: str) -> tuple[MountSource, ...]:
    """What the launcher reads."""
    path = tmp_path / "config"
    path.write_text(text)
    return read_mounts_of(os.open(path, os.O_RDONLY), str(path))


def by_server(text: str) -> tuple[MountSource, ...]:
    """What the server reads."""
    import tomllib

    return config_of("/etc/pjw/pjwd.toml", tomllib.loads(text)).worker_settings(()).mounts


def test_server_and_launcher_read_the_same(tmp_path: Path) -> None:
    """By two parsers, as the launcher has the standard library alone."""
    expected = (
        MountSource("data", "/srv/data"),
        MountSource("cache-1", "/srv/cache", read_only=False, clients=("alice", "team-*")),
    )
    assert by_server(GOOD) == by_launcher(tmp_path, GOOD) == expected
    assert by_server("") == by_launcher(tmp_path, "") == ()


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_server_and_launcher_refuse_the_same(tmp_path: Path, text: str) -> None:
    """In one line each."""
    with pytest.raises(ConfigError, match="mounts"):
        by_server(text)
    with pytest.raises(ConfigError, match="cannot take the mounts of"):
        by_launcher(tmp_path, text)
