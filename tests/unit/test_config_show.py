"""`pjwd config show`: every key, its value, where that is from, and a file that can be read again."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest

from pjw.model import LIMIT_WORDS, Limits
from pjw.server.config import ServerConfig, load_config
from pjw.server.effective import describe_keys
from pjw.server.main import main

FILE = """\
user = "näme\\u007f"
log_level = "info"
listen = "localhost:1"
[clients]
running_max = 7
[clients.by_name."a.b"]
weight = 300
[roles]
viewers = ["bob", "alice"]
[limits]
pids_max = 9
"""


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `pjwd config show` prints."""
    assert main(["config", "show", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An option goes before the file, and the file before the default; each says so."""
    path = tmp_path / "pjwd.toml"
    path.write_text(FILE)
    out = shown(capsys, "--config", str(path), "--listen", "localhost:2", "--format", "json")
    told = {key: (each["value"], each["origin"]) for key, each in json.loads(out).items()}
    assert told["listen"] == ("localhost:2", "option")
    assert told["log_level"] == ("info", "file")
    assert told["log_format"] == ("text", "default")
    assert (told["clients.running_max"], told["clients.calls_max"]) == ((7, "file"), (256, "default"))
    assert told["roles.viewers"] == (["alice", "bob"], "file")
    assert told["clients.by_name"] == ({"a.b": {"weight": 300}}, "file")
    assert (told["limits.pids_max"], told["ceilings.io_rbps_max"]) == ((9, "file"), (0, "default"))
    assert told["limits.cpu_max_millicores"] == (1000, "default")


def test_what_is_shown_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As TOML it is read again as the same configuration, and says where each value was from."""
    path = tmp_path / "pjwd.toml"
    path.write_text(FILE)
    out = shown(capsys, "--config", str(path), "--state-dir", "/x")
    assert f"running_max = 7  # file {path}: " in out
    assert 'state_dir = "/x"  # option: ' in out
    assert "# audit_log =  # default: " in out
    again = tmp_path / "again.toml"
    again.write_text(out)
    one, two = load_config(str(path), {"state_dir": "/x"}), load_config(str(again))
    whole = {"limits": two.limits, "ceilings": two.ceilings, "floors": two.floors}
    assert two == msgspec.structs.replace(one, **whole)
    assert two.effective_limits() == one.effective_limits()


def test_every_key_is_shown_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    """None is forgotten, and each limit has its words."""
    told = json.loads(shown(capsys, "--format", "json"))
    assert set(told) == set(describe_keys())
    assert all(each["description"] for each in told.values())
    assert set(LIMIT_WORDS) == {field.name for field in fields(Limits)}
    assert {key.partition(".")[0] for key in told} == set(ServerConfig.__struct_fields__)
    assert set(tomllib.loads(shown(capsys))["limits"]) == set(LIMIT_WORDS)


def test_paths_of_options_are_taken_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those in the file are absolute; those on the command line need not be."""
    monkeypatch.chdir(tmp_path)
    assert f'ca_crt = "{tmp_path}/certs/ca.crt"  # option' in shown(capsys, "--ca-crt", "certs/ca.crt")


def test_the_variable_of_a_unit_is_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """V2: a drop-in of before still says where to listen, an option goes before it."""
    monkeypatch.setenv("PJWD_LISTEN", "0.0.0.0:7")
    assert 'listen = "0.0.0.0:7"  # option' in shown(capsys)
    assert 'listen = "localhost:8"  # option' in shown(capsys, "--listen", "localhost:8")


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of serve, without a traceback."""
    path = tmp_path / "pjwd.toml"
    for text, words in (
        ("colour = 1", "unknown field `colour`"),
        ("[limits]\nx = 1", "no limit is called 'x'"),
    ):
        path.write_text(text)
        assert main(["config", "show", "--config", str(path)]) == 1
        assert words in capsys.readouterr().err


def test_a_removed_key_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not shown, and the operator sees what to delete."""
    path = tmp_path / "pjwd.toml"
    path.write_text("[clients]\nstarts_burst = 5\nrunning_max = 7\n")
    assert main(["config", "show", "--config", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "starts_burst" not in out
    assert "running_max = 7 " in out
    assert err.startswith(
        "pjwd: warning: clients.starts_burst was removed in 0.1.0 and has no effect; delete it: "
    )


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`pjwd --version`."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("pjwd 0.")


def test_mounts_are_shown_as_they_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, which is a file again; without any the key is there all the same."""
    path = tmp_path / "pjwd.toml"
    path.write_text('[mounts.data]\npath = "/srv/data"\n')
    out = shown(capsys, "--config", str(path))
    words = '{"path" = "/srv/data", "read_only" = true, "clients" = ["*"]}'
    assert f"\n[mounts]\ndata = {words}  # file {path}: directories that jobs may ask for" in out
    assert tomllib.loads(out)["mounts"]["data"]["path"] == "/srv/data"
    assert tomllib.loads(shown(capsys))["mounts"] == {}
