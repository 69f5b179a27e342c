"""By which name a server is reached, and for which names its certificate is (U3, U10, U12)."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from pjw.certs import authority, tls
from pjw.certs.bundle import read_bundle
from pjw.certs.checks import is_for, names_of, parse_certificates
from pjw.cli import main as pjw
from pjw.client.aio import AsyncClient
from pjw.client.sync import Client
from pjw.errors import ConfigError, ServerUnreachableError
from pjw.given import server_address
from pjw.server import main as pjwd


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost", "localhost:50051"),
        ("jobs.example.org:1", "jobs.example.org:1"),
        ("127.0.0.1:65535", "127.0.0.1:65535"),
        ("[::1]", "[::1]:50051"),
        ("[fe80::1%eth0]:7", "[fe80::1%eth0]:7"),
    ],
)
def test_a_server_is_a_host_with_or_without_a_port(text: str, address: str) -> None:
    """The port is pjwd's own where none is said (U12)."""
    assert server_address(text) == address


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("localhost:", "for example jobs"),
        (":50051", "for example jobs"),
        ("localhost:0", "for example jobs"),
        ("localhost:70000", "for example jobs"),
        ("https://jobs.example.org", "leave out https://"),
        ("::1:50051", r"in brackets: \[::1\]:50051"),
        ("a b:1", "for example jobs"),
    ],
)
def test_what_is_no_server_is_told_what_one_is(
    text: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As wrong usage at the command line, before anything is connected (U12)."""
    with pytest.raises(ConfigError, match="is no server's HOST:PORT") as caught:
        Client(text, "ca", "crt", "key")
    assert hint.replace("\\", "") in (caught.value.hint or "")
    with pytest.raises(SystemExit) as ended:
        pjw.main(["--server", text, "list"])
    assert ended.value.code == 2
    assert "argument --server: " in capsys.readouterr().err


def test_the_certificate_is_for_the_name_in_the_bundles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else no client could connect; one for another name is made with a warning (U3)."""
    certs = str(tmp_path / "certs")
    assert pjwd.main(["certs", "init", certs, "--server", "jobs.example.org", "bob"]) == 0
    [server] = parse_certificates((tmp_path / "certs" / "server.crt").read_bytes())
    assert {"localhost", "127.0.0.1", "jobs.example.org"} <= set(names_of(server))
    assert read_bundle(f"{certs}/bob.pjw").server == "jobs.example.org:50051"
    assert "warning" not in capsys.readouterr().err
    assert pjwd.main(["certs", "client", certs, "--server", "JOBS.example.org:7", "carol"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert pjwd.main(["certs", "client", certs, "--server", "other.example.org:7", "dave"]) == 0
    said = capsys.readouterr().err
    assert "server.crt is for localhost, 127.0.0.1, ::1, " in said
    assert "not for other.example.org, where the bundles lead to" in said


def test_a_wildcard_is_one_label() -> None:
    """As TLS has it."""
    pair = authority.make_server(authority.make_authority(), ["localhost", "a.example.org"])
    [server] = parse_certificates(pair.crt_pem)
    assert [is_for(server, host) for host in ("127.0.0.1", "[::1]", "A.example.org", "example.org")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server on localhost whose certificate is for others."""
    certs = tmp_path / "certs"
    authority.init_set(
        str(certs), ["jobs.example.org", "10.9.8.7", "::7"], ["alice"], bundle_server="localhost:1"
    )
    pem = {name: (certs / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")}
    credentials = grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.crt"])], pem["ca.crt"], require_client_auth=True
    )
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        number = server.add_secure_port("localhost:0", credentials)
        server.start()
        yield number
        server.stop(None).wait()


def test_another_name_is_told_with_those_of_the_certificate(port: int, tmp_path: Path) -> None:
    """Not in gRPC's own words; with a bundle in the place of the files, too (U3)."""
    certs = tmp_path / "certs"
    separate = [str(certs / name) for name in ("ca.crt", "alice.crt", "alice.key")]
    for files in (separate, [str(certs / "alice.pjw")] * 3):
        with Client(f"localhost:{port}", *files) as client, pytest.raises(ServerUnreachableError) as caught:
            client.get(1)
        said = f"the certificate of localhost:{port} is for jobs.example.org, 10.9.8.7, ::7"
        assert (str(caught.value), "pjwd certs server" in str(caught.value.hint)) == (said, True)


async def test_the_names_are_asked_for_beside_the_event_loop(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a connection of its own, and up to 2 s."""
    threads: list[threading.Thread] = []
    real = tls.names_of_server

    def names(*arguments: Any) -> list[str]:
        threads.append(threading.current_thread())
        return real(*arguments)

    monkeypatch.setattr(tls, "names_of_server", names)
    files = [str(tmp_path / "certs" / name) for name in ("ca.crt", "alice.crt", "alice.key")]
    async with AsyncClient(f"localhost:{port}", *files) as client:
        with pytest.raises(ServerUnreachableError, match=r"is for jobs\.example\.org"):
            await client.get(1)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_context_show_is_of_the_context_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pjw --context one context show` showed the current one (U10)."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("PJW_CONTEXT", raising=False)
    os.mkdir(tmp_path / "pjw")
    tables = "".join(f'[contexts.{name}]\nserver = "{name}:1"\n' for name in ("one", "two"))
    (tmp_path / "pjw" / "config.toml").write_text(f'current = "two"\n{tables}')
    assert pjw.main(["--context", "one", "context", "show"]) == 0
    assert "one:1" in capsys.readouterr().out
    assert pjw.main(["context", "show"]) == 0
    assert "two:1" in capsys.readouterr().out
