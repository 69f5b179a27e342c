"""Where pjw's settings come from, and what it says when one is missing or odd."""

import argparse
import os
from pathlib import Path

import pytest

import pjw
from pjw.certs import authority
from pjw.certs.credentials import diagnose_client
from pjw.certs.files import load_client_credentials
from pjw.cli.connection import find_settings
from pjw.cli.main import main
from pjw.client.config import ClientSettings, config_path
from pjw.errors import ConfigError
from pjw.given import DEFAULT_ADDRESS
from pjw.worker.state_dir import StateDir

KEYS = ("server", "ca_crt", "client_crt", "client_key")


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, which is not there yet; an environment without settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for key in (*KEYS, "context"):
        monkeypatch.delenv(f"PJW_{key.upper()}", raising=False)
    (tmp_path / "pjw").mkdir()
    return tmp_path / "pjw" / "config.toml"


def options(**given: str) -> argparse.Namespace:
    """A command line with those options."""
    return argparse.Namespace(**{key: given.get(key) for key in KEYS})


def test_the_nearest_setting_counts(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Option before environment before file, each for itself."""
    config.write_text("".join(f'{key} = "file"\n' for key in KEYS))
    for key in ("ca_crt", "client_crt"):
        monkeypatch.setenv(f"PJW_{key.upper()}", "environment")
    assert find_settings(options(ca_crt="option")) == ClientSettings("file", "option", "environment", "file")


def test_only_the_server_has_a_default() -> None:
    """Without a word about the server it is the one on this machine."""
    given = options(ca_crt="a", client_crt="b", client_key="c")
    assert find_settings(given) == ClientSettings(DEFAULT_ADDRESS, "a", "b", "c")


@pytest.mark.parametrize("missing", ["ca_crt", "client_crt", "client_key"])
def test_a_missing_setting_is_named_with_every_way_to_give_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Option, variable and file are all in the hint."""
    with pytest.raises(ConfigError) as caught:
        find_settings(options(**{key: "x" for key in KEYS if key != missing}))
    option = "--" + missing.replace("_", "-")
    assert str(caught.value) == f"no {option} is given"
    assert caught.value.hint is not None
    assert all(word in caught.value.hint for word in (option, f"PJW_{missing.upper()}", str(config_path())))


@pytest.mark.parametrize("variable", [*(f"PJW_{key.upper()}" for key in KEYS), "PJW_CONTEXT"])
def test_an_empty_variable_is_refused(variable: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a script leaves that has not set another one: neither the next place nor this host (B9)."""
    config.write_text("".join(f'{key} = "file"\n' for key in KEYS))
    monkeypatch.setenv(variable, "")
    with pytest.raises(ConfigError, match=f"^the variable {variable} is empty$"):
        find_settings(options())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('server = ""', "server"),
        ('current = ""', "current"),
        ('[contexts.one]\nca_crt = ""', "context one: ca_crt"),
    ],
)
def test_an_empty_setting_is_refused(config: Path, content: str, what: str) -> None:
    """With the file and the name of the setting."""
    config.write_text(content)
    with pytest.raises(ConfigError, match=f"^{config}: {what} is empty$"):
        find_settings(options(**dict.fromkeys(KEYS, "x")))


@pytest.mark.parametrize("key", KEYS)
def test_the_library_takes_no_empty_value(key: str) -> None:
    """A program that passes on what it did not get."""
    with pytest.raises(ConfigError, match=f"^{key} is empty$"):
        pjw.Client(*("" if each == key else "x" for each in KEYS))
    with pytest.raises(ConfigError, match=r"^the name of the context is empty$"):
        pjw.Client.from_context("")
    with pytest.raises(ConfigError, match=r"^the path of the state directory is empty$"):
        StateDir("", os.getuid())


def test_a_state_directory_whose_path_is_too_long(tmp_path: Path) -> None:
    """SQLite would only say that it cannot open a file, and we that a disk is full or not to be written."""
    name = str(tmp_path) + "/x" * 250
    with pytest.raises(ConfigError, match=rf"its path is {len(name)} bytes long$"):
        StateDir(name, os.getuid())
    assert os.listdir(tmp_path) == ["pjw"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--server", "", "list"],
        ["--context=", "list"],
        ["start", "--name", "", "true"],
        ["start", "--workdir=", "true"],
        ["start", "--stdin=", "true"],
        ["context", "add", "x", ""],
    ],
)
def test_an_empty_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read or asked."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert "is empty; leave it out, or give it a value" in capsys.readouterr().err


def test_who_has_nothing_yet_is_told_of_bundles() -> None:
    """The way that is the least work comes first; who has two of three files needs the third."""
    hints = []
    for given in ({}, {"server": "x"}, {"client_crt": "x", "client_key": "x"}):
        with pytest.raises(ConfigError) as caught:
            find_settings(options(**given))
        hints.append(caught.value.hint or "")
    assert ["context add" in hint for hint in hints] == [True, True, False]


@pytest.mark.parametrize(
    "content",
    [b"server = ", b"server = 5", b"colour = 'red'", b"server = ['x']", b"\xff\xfe", b"[server]\nx = 1"],
)
def test_an_odd_file_is_named(config: Path, content: bytes) -> None:
    """What the file should not hold is said with the file's path, never ignored."""
    config.write_bytes(content)
    with pytest.raises(ConfigError, match=str(config)):
        find_settings(options(**dict.fromkeys(KEYS, "x")))


def test_a_file_that_cannot_be_read_is_named(config: Path) -> None:
    """A directory in its place is an error, not "no file"."""
    config.mkdir()
    with pytest.raises(ConfigError, match=f"cannot read {config}"):
        find_settings(options(**dict.fromkeys(KEYS, "x")))


def test_without_a_home_the_file_is_simply_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a user whose home does not exist is no reason to fail."""
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert find_settings(options(**dict.fromkeys(KEYS, "x"))).server == "x:50051"


# --- the library


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """Certificates and bundles of two clients."""
    certs = tmp_path / "certs"
    authority.init_set(str(certs), ["localhost"], ["alice", "bob"], bundle_server="bundle:1")
    return certs


def made(client: pjw.Client | pjw.AsyncClient) -> ClientSettings:
    """What a client was made with; it is closed."""
    if isinstance(client, pjw.Client):
        client.close()
    return client._link.settings


@pytest.mark.parametrize("kind", [pjw.Client, pjw.AsyncClient])
async def test_the_library_finds_what_the_command_line_finds(
    kind: type[pjw.Client | pjw.AsyncClient], config: Path, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context by its name before the environment, and that before the current context."""
    rest = "".join(
        f"{key} = {str(certs / name)!r}\n"
        for key, name in (("ca_crt", "ca.crt"), ("client_crt", "bob.crt"), ("client_key", "bob.key"))
    )
    tables = "".join(f'[contexts.{name}]\nserver = "{name}:1"\n{rest}' for name in ("one", "two"))
    config.write_text(f'current = "one"\n{tables}')
    assert made(kind.from_context()).server == "one:1"
    assert made(kind.from_context()).client_crt == str(certs / "bob.crt")
    monkeypatch.setenv("PJW_CONTEXT", "two")
    assert made(kind.from_context()).server == "two:1"
    monkeypatch.setenv("PJW_SERVER", "environment:1")
    assert made(kind.from_context()).server == "environment:1"
    assert made(kind.from_context("one")).server == "one:1"
    with pytest.raises(ConfigError, match="no context 'three'"):
        kind.from_context("three")


def test_what_the_library_misses_is_not_called_an_option() -> None:
    """A program has none."""
    with pytest.raises(ConfigError, match="no ca_crt is given") as caught:
        pjw.Client.from_context()
    hint = caught.value.hint or ""
    assert ("PJW_CA_CRT" in hint, "context add" in hint, "--" in hint) == (True, True, False)


@pytest.mark.parametrize("kind", [pjw.Client, pjw.AsyncClient])
async def test_a_bundle_is_a_client(kind: type[pjw.Client | pjw.AsyncClient], certs: Path) -> None:
    """Its own address, or another; its credentials are those of the files that it was made of."""
    bundle = str(certs / "alice.pjw")
    assert made(kind.from_bundle(bundle)).server == "bundle:1"
    found = made(kind.from_bundle(bundle, server="other:2"))
    assert found.server == "other:2"
    read = load_client_credentials(found.ca_crt, found.client_crt, found.client_key)
    assert read.ca_pem.strip() == (certs / "ca.crt").read_bytes().strip()
    assert read.crt_pem.count(b"BEGIN CERTIFICATE") == 1
    assert b"authority" not in read.key_pem
    assert diagnose_client(found.ca_crt, found.client_crt, found.client_key) is None
    with pytest.raises(ConfigError, match="cannot read bundle"):
        kind.from_bundle(os.devnull)
