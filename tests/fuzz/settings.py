"""Configuration files, the server's and the client's: any bytes are settings or a ConfigError."""

import argparse
import os
import tempfile
from dataclasses import astuple
from functools import cache
from pathlib import Path

from pjw.cli.connection import find_settings
from pjw.errors import ConfigError
from pjw.launcher.protocol import Hello, SetShare, decode_request, encode
from pjw.server.boot import server_uid
from pjw.server.config import load_config
from tests.fuzz.memory_file import MemoryFile

PROJECT = Path(__file__).resolve().parents[2]


@cache
def _home() -> tuple[tempfile.TemporaryDirectory[str], MemoryFile]:
    # a client's home, in which its file is
    directory, file = tempfile.TemporaryDirectory(prefix="pjw-fuzz-"), MemoryFile()
    (Path(directory.name) / "pjw").mkdir()
    (Path(directory.name) / "pjw" / "config.toml").symlink_to(file.path)
    return directory, file


def seeds() -> list[bytes]:
    """Files as they are meant to be, and each kind of value once."""
    return [
        (PROJECT / "packaging" / "pjwd.toml").read_bytes(),
        b'server = "localhost:50051"\nca_crt = "/a"\nclient_crt = "/b"\nclient_key = """c"""\n',
        b'user = "x"\nclient_name_oid = "1.2.3"\nstop_grace_seconds = 1.5\nhidden_paths = ["/a"]\n',
        b"[job_users]\nuid_count = 0x10\n[limits]\npids_max = 1_0\n[ceilings]\npids_max = 3\n",
        b'revoked = "/etc/pjw/revoked"\n',
        b'memory_overcommit = 1.5\n[clients]\nweight = 7\n[clients.by_name."a.b"]\npids_max = 99\n',
        b"a = 1979-05-27T07:32:00Z\nb = [inf, nan, -1e9]\nc = {d = '\\', e.f = true}\n[[g]]\nh = '''\n'''\n",
    ]


def one_input(data: bytes) -> None:
    """Read it as both."""
    home, file = _home()
    file.write(data)
    try:
        config = load_config(file.path)
        settings = config.worker_settings(hidden_paths=("/key",))
        server_uid(config.user, config.state_dir)
    except ConfigError as error:
        _words(error)
    else:
        hello = Hello(
            "/state",
            settings.uid_first,
            settings.uid_count,
            settings.ceiling,
            settings.floor,
            waiting_inits=settings.waiting_inits,
            hidden_paths=settings.hidden_paths,
            visible_paths=settings.visible_paths,
            operator_files=(config.revoked,) if config.revoked else (),
        )
        # the launcher ends when it is told what it cannot read
        assert decode_request(encode(1, hello)) == (1, hello)
        for share in (settings.shares.default, *settings.shares.by_name.values()):
            given = SetShare(settings.uid_first, share)
            assert decode_request(encode(1, given)) == (1, given)
    os.environ["XDG_CONFIG_HOME"] = home.name
    nothing = argparse.Namespace(server=None, ca_crt=None, client_crt=None, client_key=None)
    try:
        found = find_settings(nothing)
    except ConfigError as error:
        _words(error)
    else:
        assert all(isinstance(value, str) and value for value in astuple(found))


def _words(error: ConfigError) -> None:
    # they end on a terminal or in a log, which take no lone surrogates
    f"{error} {error.hint}".encode()
