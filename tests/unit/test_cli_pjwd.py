"""pjwd without root: help, addresses, and the certificates it makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pjw.errors import ConfigError
from pjw.server.address import parse_address
from pjw.server.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run pjwd, which must fail in words; the words."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("name", ["../x", "a/b", "key-0123456789abcdef", "a b", "x" * 65, "ca", "server"])
def test_certs_refuses_a_name_that_no_client_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A name that the service would refuse, or a file that has another purpose, is not made."""
    certs = str(tmp_path / "certs")
    assert main(["certs", "init", certs, "alice"]) == 0
    capsys.readouterr()
    before = sorted(os.listdir(certs))
    said = refused(capsys, "certs", "client", certs, name)
    assert said.startswith("pjwd: error: ")
    assert sorted(os.listdir(certs)) == before


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "show"]])
def test_what_cannot_be_printed_is_said_in_words(arguments: list[str]) -> None:
    """A full disk under stdout is an error, and a reader who has gone is none."""
    program = [sys.executable, "-c", "import sys; from pjw.server.main import main; sys.exit(main())"]
    # without a buffer argparse would pass over what it cannot write
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    no_space = b"pjwd: error: cannot write to stdout: no space left on device (ENOSPC)\n"
    for stdout, code, words in ((full, 1, no_space), (writer, 141, b"")):
        done = subprocess.run(
            [*program, *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
        os.close(stdout)
        assert (done.returncode, done.stderr) == (code, words)


@pytest.mark.parametrize("arguments", [["--version"], ["config", "show"], ["certs", "list", "nowhere"]])
def test_a_closed_stdout_is_said_before_anything_is_done(arguments: list[str]) -> None:
    """Its answer would be lost without a word."""
    program = "import sys; from pjw.server.main import main; sys.exit(main())"
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"pjwd: error: cannot write to stdout: it is closed\n")


def test_help_tells_the_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    """`pjwd --help` and each command's own."""
    for arguments, words in (
        ([], ("serve", "check", "certs", "needs root")),
        (["serve"], ("--listen", "--ca-crt", "--server-crt", "--server-key", "--state-dir", "--config")),
        (["check"], ("--state-dir",)),
        (["certs", "init"], ("DIR", "NAME", "--days")),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for word in words:
            assert word in text, (arguments, word)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:0", ("localhost", 0)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[::1]:50051", ("::1", 50051)),
    ],
)
def test_an_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    """The port is behind the last colon; brackets of IPv6 are not part of the host."""
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "x",
        "x:",
        ":1",
        "x:65536",
        "x:-1",
        "x:+1",
        "x: 1",
        "x:1_0",
        "x:１",
        "[]:1",
        "::1:1",
        "x:" + "9" * 5000,
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    """Each part must be there, and a port is digits up to 65535."""
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["check", f"--{option}", ""]
            for option in ("state-dir", "listen", "ca-crt", "server-key", "config")
        ),
        ["certs", "init", "", "alice"],
        ["certs", "client", "certs", "alice", ""],
    ],
)
def test_nothing_may_be_empty(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """As a path it would be the current directory (B9)."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert "it is empty; leave it out, or give it a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("::1:50051", "an address of IPv6 is in brackets, for example [::1]:50051"),
        ("localhost:70000", "a port is a number from 0 to 65535"),
        ("localhost", "for example localhost:50051, or [::1]:0 for any free port"),
    ],
)
def test_what_is_wrong_with_an_address_is_told(text: str, hint: str) -> None:
    """The host ::1:50051 with a port that was forgotten, and ::1 with the port 50051, are the same text."""
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert caught.value.hint == hint


@pytest.mark.parametrize("days", ["0", "-1", "36501", "x", "1.5", "１"])
def test_days_are_a_whole_number(capsys: pytest.CaptureFixture[str], tmp_path: Path, days: str) -> None:
    """A certificate that is valid for no time, or for longer than X.509 can say well, is not made."""
    with pytest.raises(SystemExit) as caught:
        main(["certs", "init", f"--days={days}", str(tmp_path / "certs"), "alice"])
    assert caught.value.code == 2
    assert "a number of days from 1 to 36500" in capsys.readouterr().err
    assert not (tmp_path / "certs").exists()


def test_a_configuration_that_is_not_read_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has that of the unit, and shows the configuration without it, is told."""
    unit = tmp_path / "pjwd.toml"
    monkeypatch.setattr("pjw.server.main._UNIT_CONFIG", str(unit))
    said = []
    for arguments in ([], ["--config", str(unit)]):
        assert main(["config", "show"]) == 0
        assert capsys.readouterr().err == "" or unit.exists()
        unit.write_text("")
        assert main(["config", "show", *arguments]) == 0
        said.append(capsys.readouterr().err)
    assert said == [f"pjwd: {unit} was not read; pass --config {unit} to use it\n", ""]


def test_check_names_what_a_start_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After an upgrade: a key that is empty, which an older version took, and what to do about it."""
    file = tmp_path / "pjwd.toml"
    file.write_text('listen = "localhost:1"\n[roles]\nadmins = [""]\n')
    assert main(["check", "--config", str(file)]) == 1
    words = f"missing  the configuration {file}: roles.admins[0] is empty\n         hint: leave it out"
    assert words in capsys.readouterr().out


def test_a_check_is_of_the_user_that_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is missing was `ok` above, as the default user, and `missing` below."""
    path = tmp_path / "pjwd.toml"
    path.write_text('user = "nosuchuser"\n')
    assert main(["check", "--config", str(path)]) == 1
    said = capsys.readouterr().out
    assert "missing  no user is called 'nosuchuser' on this host" in said
    assert "ok       server user" not in said
