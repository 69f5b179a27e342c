"""CDI files: which devices there are by them, and what they may not say."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import ConfigError, GpuError, InvalidJobError
from pjw.launcher import cdi
from pjw.launcher.cdi import Edit, edits_of, read_devices
from pjw.model import GpuOffer, JobSpec, check_gpus

KIND = "vendor.example/gpu"


@pytest.fixture(autouse=True)
def _any_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns a file is for the tests of root; here its words count."""
    monkeypatch.setattr(cdi, "open_operator_file", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(cdi, "_require_roots", lambda _path, _descriptor: None)


def device(name: str, *nodes: str, **more: Any) -> dict[str, Any]:
    """A device with these nodes."""
    return {"name": name, "containerEdits": {"deviceNodes": [{"path": node} for node in nodes], **more}}


def write(directory: Path, *devices: object, name: str = "a.json", **more: Any) -> str:
    """Write a file; its directory."""
    directory.mkdir(exist_ok=True)
    text = json.dumps({"cdiVersion": "0.6.0", "kind": KIND, "devices": devices, **more})
    (directory / name).write_text(text)
    return str(directory)


def names(*directories: str) -> list[str]:
    """The names of all devices."""
    return [each.name for each in read_devices(KIND, directories)]


def test_each_device_is_there_once(tmp_path: Path) -> None:
    """Not by its UUID, nor with all others; by numbers, not letters; parts that share a node are devices."""
    gpus = [device(str(number), f"/dev/gpu{number}") for number in (10, 9)]
    others = [device("GPU-c0ffee", "/dev/gpu9"), device("all", "/dev/gpu9", "/dev/gpu10"), device("none")]
    assert names(write(tmp_path / "a", *gpus, *others)) == ["9", "10"]
    parts = [device(f"0:{number}", "/dev/gpu0", f"/dev/cap{number}") for number in range(2)]
    assert names(write(tmp_path / "b", *parts)) == ["0:0", "0:1"]
    assert names(write(tmp_path / "c", device("only", "/dev/x"), device("all", "/dev/x"))) == ["all"]


def test_directories_and_files(tmp_path: Path) -> None:
    """The later directory goes before; another kind and YAML are none; no name comes twice."""
    first = write(tmp_path / "a", device("0", "/dev/old"), device("1", "/dev/x"))
    later = write(tmp_path / "b", device("0", "/dev/new"))
    (tmp_path / "a/other.json").write_text(json.dumps({"kind": "other.example/gpu", "devices": "none"}))
    (tmp_path / "a/b.yaml").write_text("- no JSON")
    devices = read_devices(KIND, (first, str(tmp_path / "none"), later))
    assert [sorted(each.own.nodes) for each in devices] == [["/dev/new"], ["/dev/x"]]
    write(tmp_path / "a", device("1", "/dev/y"), name="b.json")
    with pytest.raises(ConfigError, match="=1 is in another file"):
        names(first)


def test_what_a_job_gets(tmp_path: Path) -> None:
    """What all have in common once; the machine's own files are there already; later variables win."""
    library = {"hostPath": "/usr/lib/x.so", "containerPath": "/usr/lib/x.so"}
    other = {"hostPath": "/opt/x.so", "containerPath": "/usr/lib/x.so"}
    socket = {"hostPath": "/run/x/socket", "containerPath": "/run/x/socket"}
    common = {
        "deviceNodes": [{"path": "/dev/ctl", "type": "c"}],
        "env": ["A=1", "B=2"],
        "mounts": [library, socket],
    }
    gpus = [device("0", "/dev/0", env=["B=3"]), device("1", "/dev/1", mounts=[other]), device("2", "/dev/2")]
    devices = read_devices(KIND, (write(tmp_path, *gpus, containerEdits=common),))
    edits = edits_of(devices, ("0", "1"))
    assert edits.environment == ("A=1", "B=2")
    assert edits_of(devices, ("0",)).environment == ("A=1", "B=3")
    assert set(edits.edits) == {
        *(Edit(path, path, is_device=True) for path in ("/dev/ctl", "/dev/0", "/dev/1")),
        Edit("/run/x/socket", "/run/x/socket", is_device=False),
        Edit("/opt/x.so", "/usr/lib/x.so", is_device=False),
    }
    # an image has none of the machine's files
    assert (
        Edit("/usr/lib/x.so", "/usr/lib/x.so", is_device=False) in edits_of(devices, ("0",), image=True).edits
    )
    with pytest.raises(GpuError, match="no GPU 3"):
        edits_of(devices, ("0", "3"))
    many = [device(f"{number}", f"/dev/{number}") for number in range(129)]
    devices = read_devices(KIND, (write(tmp_path, *many),))
    assert len(devices) == 64
    wide = [device("0", *(f"/dev/{number}" for number in range(129)))]
    with pytest.raises(ConfigError, match="at most 128"):
        edits_of(read_devices(KIND, (write(tmp_path, *wide),)), ("0",))
    long = [device("0", "/dev/0", env=[f"A{number}={'x' * 4000}" for number in range(3)])]
    with pytest.raises(ConfigError, match="8192"):
        edits_of(read_devices(KIND, (write(tmp_path, *long),)), ("0",))


@pytest.mark.parametrize(
    "wrong",
    [
        device("0", "/etc/passwd"),
        device("0", "/dev"),
        device("0", "/dev/../etc"),
        device("0", "dev/0"),
        device("0", "/dev/" + "x" * 255),
        device("/etc", "/dev/0"),
        device("", "/dev/0"),
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/0", "permissions": "r"}]}},
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/0", "permissions": 6}]}},
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/0", "type": "b"}]}},
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/0", "hostPath": "/dev/./0"}]}},
        {"name": "0", "containerEdits": {"deviceNodes": [{}]}},
        {"name": "0", "containerEdits": {"deviceNodes": {"path": "/dev/0"}}},
        {"name": "0", "containerEdits": ["/dev/0"]},
        *(
            device("0", "/dev/0", mounts=[{"hostPath": "/usr", "containerPath": path}])
            for path in ("/proc/x", "/", "/tmp", "/run", "/run/job/x", "/run/workspace", "/sys", "usr", 3)
        ),
        device("0", "/dev/0", mounts=["/usr"]),
        device("0", "/dev/0", env=["A"]),
        device("0", "/dev/0", env=["=A"]),
        device("0", "/dev/0", env=["A=\n"]),
        device("0", "/dev/0", env=[3]),
        "0",
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, wrong: object) -> None:
    """The whole file is refused, and named."""
    with pytest.raises(ConfigError, match=r"cannot take the devices of .*a\.json"):
        names(write(tmp_path, wrong))


@pytest.mark.parametrize("data", [b"", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"{" + b" " * 1024**2])
def test_what_is_no_file_of_cdi(tmp_path: Path, data: bytes) -> None:
    """No JSON, no object, no end."""
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"cannot take the devices of .*a\.json"):
        names(str(tmp_path))


@pytest.mark.parametrize("count", [-1, 65, True, 1.0, "1", None])
def test_what_is_no_number_of_gpus(count: Any) -> None:
    """Whole numbers from 0 to 64."""
    with pytest.raises(InvalidJobError, match="from 0 to 64 GPUs"):
        check_gpus(count)
    with pytest.raises(InvalidJobError):
        JobSpec("true", gpus=count)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "gpu"},
        {"kind": "a/b/c"},
        {"kind": "../etc"},
        {"cdi_dirs": ("etc",)},
        {"cdi_dirs": ("/etc/..",)},
        {"cdi_dirs": ("/a",) * 9},
        {"clients": ("a b",)},
    ],
)
def test_offers_that_are_refused(wrong: dict[str, Any]) -> None:
    """A kind is vendor/class, a directory an absolute path."""
    with pytest.raises(InvalidJobError):
        GpuOffer(**wrong)


def test_whose_they_are() -> None:
    """By names with any characters; nobody's without a kind."""
    offer = GpuOffer(KIND, clients=("alice", "team-*"))
    assert [offer.is_for(name) for name in ("alice", "team-1", "bob", "")] == [True, True, False, False]
    assert not GpuOffer().is_for("alice")
