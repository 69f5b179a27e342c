"""Bundles, as `pjwd certs` makes them, and contexts, as `pjw context` keeps them."""

import os
import subprocess
import sys
import tomllib
from argparse import Namespace
from pathlib import Path

import pytest

from pjw.certs import authority
from pjw.certs.bundle import read_bundle
from pjw.certs.files import load_client_credentials
from pjw.cli import contexts
from pjw.client.config import find_settings
from pjw.errors import ConfigError
from tests.support.service import BIN, CALL_SECONDS


class User:
    """Somebody with a home, and with bundles for alice and bob."""

    def __init__(self, directory: Path) -> None:
        self.certs = directory / "certs"
        self.home = directory / "home"
        self.directory = self.home / "pjw"
        self.config = self.directory / "config.toml"
        authority.init_set(str(self.certs), ["localhost"], ["alice", "bob"], bundle_server="localhost:1")

    def bundle(self, client: str = "alice") -> Path:
        return self.certs / f"{client}.pjw"

    def run(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "XDG_CONFIG_HOME": str(self.home)}
        done = subprocess.run(
            [str(BIN / "pjw"), *arguments],
            env=environment | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ok(self, *arguments: str, **env: str) -> str:
        done = self.run(*arguments, **env)
        assert done.returncode == 0, done
        return done.stdout

    def refused(self, *arguments: str, **env: str) -> str:
        done = self.run(*arguments, **env)
        assert (done.returncode, done.stdout) == (125, ""), done
        return done.stderr

    def files(self) -> dict[str, int]:
        """Everything below the directory of settings, with its mode."""
        return {
            str(path.relative_to(self.home)): path.stat().st_mode & 0o777 for path in self.home.rglob("*")
        }


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A user who has no settings yet."""
    return User(tmp_path)


def test_certs_client_makes_a_bundle_and_says_what_to_do_with_it(tmp_path: Path) -> None:
    """One file, 0600; the words on stderr are the two lines that its user needs."""
    certs = str(tmp_path / "my certs")
    authority.init_directory(certs)
    done = subprocess.run(
        [BIN / "pjwd", "certs", "client", "--server", "build1:50051", certs, "john"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"{certs}/john.{end}" for end in ("key", "crt", "pjw")]
    assert f"copy '{certs}/john.pjw'" in done.stderr
    assert "pjw context add default john.pjw" in done.stderr
    assert os.stat(f"{certs}/john.pjw").st_mode & 0o777 == 0o600
    bundle = read_bundle(f"{certs}/john.pjw")
    assert bundle.server == "build1:50051"
    assert bundle.credentials.key_pem == Path(certs, "john.key").read_bytes()
    assert bundle.credentials.crt_pem == Path(certs, "john.crt").read_bytes()
    assert bundle.credentials.ca_pem == Path(certs, "ca.crt").read_bytes()


def test_openssl_reads_a_bundle(user: User) -> None:
    """Certificate and key, as from any PEM file."""
    for command in (["x509", "-noout", "-subject"], ["pkey", "-noout", "-check"]):
        done = subprocess.run(
            ["openssl", *command, "-in", user.bundle()], capture_output=True, text=True, check=True
        )
        assert "alice" in done.stdout or "valid" in done.stdout + done.stderr


def test_a_bundle_that_an_editor_has_changed(user: User) -> None:
    """B5: a byte order mark, and the ends of lines of Windows."""
    bundle = read_bundle(str(user.bundle()))
    user.bundle().write_bytes(b"\xef\xbb\xbf" + user.bundle().read_bytes().replace(b"\n", b"\r\n"))
    assert read_bundle(str(user.bundle())) == bundle
    assert load_client_credentials(*[str(user.bundle())] * 3) == bundle.credentials


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"server: localhost:1\n", b"", "no line `server: HOST:PORT`"),
        (b"authority:", b"somebody:", "or none `authority:`"),
        (b"PRIVATE KEY", b"PUBLIC KEY", "it has 0 PEM private keys"),
        (b"BEGIN PRIVATE KEY", b"BEGIN ENCRYPTED PRIVATE KEY", "its key is encrypted"),
        (b"authority:\n-----BEGIN", b"authority:\n-----begin", "no PEM certificate of the authority"),
        (b"END PRIVATE KEY-----\n-----BEGIN", b"END PRIVATE KEY-----\n-----", "no PEM certificate of the cl"),
    ],
)
def test_what_is_no_bundle_is_named(user: User, old: bytes, new: bytes, words: str) -> None:
    """The file, and what is missing in it; nothing is made of it."""
    data = user.bundle().read_bytes()
    assert old in data
    user.bundle().write_bytes(data.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        read_bundle(str(user.bundle()))
    assert words in user.refused("context", "add", "prod", str(user.bundle()))
    assert user.files() == {}


def test_the_first_context_is_the_current_one_and_private(user: User) -> None:
    """Files that nobody else can read, and a table that says where they are."""
    done = user.run("context", "add", "prod", str(user.bundle()))
    assert (done.returncode, done.stdout) == (0, "prod: localhost:1\n")
    assert done.stderr == "prod is the current context\n"
    place = "pjw/contexts/prod"
    assert user.files() == {
        "pjw": 0o700,
        "pjw/config.toml": 0o600,
        "pjw/contexts": 0o700,
        "pjw/contexts.lock": 0o600,
        place: 0o700,
        **{f"{place}/{name}": 0o600 for name in ("ca.crt", "client.crt", "client.key")},
    }
    config = tomllib.loads(user.config.read_text())
    assert config["current"] == "prod"
    files = {
        key: f"{user.home}/{place}/{key.replace('_', '.')}" for key in ("ca_crt", "client_crt", "client_key")
    }
    assert config["contexts"] == {"prod": {"server": "localhost:1", **files}}


def test_contexts_are_listed_chosen_shown_and_removed(user: User) -> None:
    """What each action does, and that the others' contexts stay."""
    user.ok("context", "add", "prod", str(user.bundle()))
    assert user.ok("--server", "far:2", "context", "add", "lab", str(user.bundle("bob"))) == "lab: far:2\n"
    assert user.ok("context", "list") == "lab\nprod\n"
    assert user.ok("context", "show").splitlines()[:2] == ["name:         prod", "server:       localhost:1"]
    assert "client:       alice" in user.ok("context", "show")
    user.ok("context", "use", "lab")
    assert "client:       bob" in user.ok("context", "show")
    assert "client:       alice" in user.ok("context", "show", "prod")
    assert "client:       alice" in user.ok("context", "show", PJW_CONTEXT="prod")
    assert "PJW_CONTEXT=prod takes precedence" in user.run("context", "use", "lab", PJW_CONTEXT="prod").stderr
    assert user.ok("context", "rm", "lab") == "lab\n"
    assert user.ok("context", "list") == "prod\n"
    assert "lab" not in user.config.read_text()
    assert not (user.directory / "contexts" / "lab").exists()
    assert "hint: choose one: pjw context use NAME" in user.refused("context", "show")


def test_what_a_user_wrote_stays(user: User) -> None:
    """Comments, settings without a context, and that the file is a link to somewhere else."""
    user.directory.mkdir(parents=True)
    (user.home / "dotfile").write_text('# mine\nserver = "mine:1" # and this\n')
    user.config.symlink_to(user.home / "dotfile")
    user.ok("context", "add", "prod", str(user.bundle()))
    user.ok("context", "rm", "prod")
    assert user.config.is_symlink()
    assert user.config.read_text().startswith('# mine\nserver = "mine:1" # and this\n')


def test_nearer_settings_stand_before_a_context(user: User) -> None:
    """Options, then --context, the environment, PJW_CONTEXT or `current`, and the file's own settings."""
    user.ok("--server", "127.0.0.1:1", "context", "add", "one", str(user.bundle()))
    user.ok("--server", "127.0.0.1:2", "context", "add", "two", str(user.bundle()))
    for arguments, env, server in (
        ((), {}, "127.0.0.1:1"),
        ((), {"PJW_CONTEXT": "two"}, "127.0.0.1:2"),
        ((), {"PJW_CONTEXT": "two", "PJW_SERVER": "127.0.0.1:3"}, "127.0.0.1:3"),
        (("--context", "two"), {"PJW_CONTEXT": "one", "PJW_SERVER": "127.0.0.1:3"}, "127.0.0.1:2"),
        (("--context", "two", "--server", "127.0.0.1:4"), {}, "127.0.0.1:4"),
    ):
        assert f"cannot connect to {server}" in user.refused(*arguments, "list", **env)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["context", "use", "nope"], "no context 'nope' is in"),
        (["context", "rm", "prod", "nope"], "no context 'nope' is in"),
        (["context", "show", "nope"], "hint: there are: prod"),
        (["--context", "nope", "list"], "no context 'nope' is in"),
        (["context", "add", "prod", "BUNDLE"], "hint: give --replace, or remove it: pjw context rm prod"),
        (["context", "add", "../x", "BUNDLE"], "a name is up to 63 letters"),
        (["context", "add", "other", "/nonexistent"], "cannot read bundle /nonexistent: no such file"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    user: User, arguments: list[str], words: str
) -> None:
    """The name, the file, and the next step."""
    user.ok("context", "add", "prod", str(user.bundle()))
    before = (user.config.read_bytes(), user.files())
    assert words in user.refused(*[str(user.bundle()) if word == "BUNDLE" else word for word in arguments])
    assert (user.config.read_bytes(), user.files()) == before


def test_a_bundle_that_could_not_connect_is_refused(user: User) -> None:
    """A certificate of another authority is found now, not at the first call; no key stays behind."""
    other = user.certs.parent / "other"
    authority.init_directory(str(other))
    text = user.bundle().read_bytes().partition(b"authority:\n")[0]
    user.bundle().write_bytes(text + b"authority:\n" + (other / "ca.crt").read_bytes())
    words = user.refused("context", "add", "prod", str(user.bundle()))
    assert words.startswith(
        f"pjw: error: cannot use bundle {user.bundle()}: cannot use client certificate client.crt:"
        " it was not issued by the CA in ca.crt"
    )
    assert "pjw/contexts/prod" not in user.files()
    assert not user.config.exists()


def test_a_bundle_that_others_can_read_is_warned_of(user: User) -> None:
    """It holds a key; what is made of it is private all the same."""
    user.bundle().chmod(0o644)
    done = user.run("context", "add", "prod", str(user.bundle()))
    assert done.returncode == 0
    assert f"pjw: warning: others may read the private key {user.bundle()} (its mode is 0644)" in done.stderr
    key = user.directory / "contexts/prod/client.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert f"warning: others may read the private key {key}" in user.run("context", "show").stderr


def test_a_name_that_is_a_path_removes_no_more_than_its_table(user: User) -> None:
    """`add` takes no such name, but a hand may write it."""
    user.ok("context", "add", "prod", str(user.bundle()))
    precious = user.home / "precious"
    precious.mkdir()
    before = user.files()
    names = (".", "..", "../../precious", str(precious))
    with user.config.open("a") as file:
        file.writelines(f'[contexts."{name}"]\nserver = "localhost:1"\n' for name in names)
    user.ok("context", "rm", *names)
    assert user.files() == before
    assert user.ok("context", "list") == "prod\n"


def test_what_an_interrupted_add_left_is_no_obstacle(user: User) -> None:
    """A directory without a table is nobody's."""
    (user.directory / "contexts" / "prod").mkdir(parents=True)
    (user.directory / "contexts" / "prod" / "client.key").write_text("half")
    user.ok("context", "add", "prod", str(user.bundle()))
    assert (user.directory / "contexts/prod/client.key").read_bytes() in user.bundle().read_bytes()


def test_two_that_add_at_once_lose_nothing(user: User) -> None:
    """The file is changed by one at a time."""
    command = [str(BIN / "pjw"), "context", "add"]
    environment = {"PATH": os.environ["PATH"], "XDG_CONFIG_HOME": str(user.home)}
    added = [
        subprocess.Popen(
            [*command, f"c{number}", str(user.bundle())],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(6)
    ]
    assert [process.wait(CALL_SECONDS) for process in added] == [0] * 6
    assert user.ok("context", "list").split() == [f"c{number}" for number in range(6)]


HOLD = """\
import sqlite3, sys
lock = sqlite3.connect(sys.argv[1], isolation_level=None)
lock.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def test_who_waits_too_long_is_told(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held is named; it ends with its process, however that ends."""
    user.ok("context", "add", "prod", str(user.bundle()))
    lock = str(user.directory / contexts.LOCK)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(user.home))
    monkeypatch.setattr(contexts, "LOCK_SECONDS", 0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"^cannot lock {lock}: another pjw has held it for 0 s$"):
            contexts.use_context(Namespace(name="prod"))
        holder.kill()
    contexts.use_context(Namespace(name="prod"))


def test_a_context_is_replaced(user: User) -> None:
    """By one with a new certificate; what cannot be used leaves the old one as it was."""
    user.ok("context", "add", "prod", str(user.bundle()))
    user.ok("context", "add", "--replace", "prod", str(user.bundle("bob")))
    assert "client:       bob" in user.ok("context", "show", "prod")
    before = (user.config.read_bytes(), user.files())
    broken = user.bundle().read_bytes().replace(b"\nserver:", b"\nno:")
    (user.certs / "broken.pjw").write_bytes(broken)
    user.refused("context", "add", "--replace", "prod", str(user.certs / "broken.pjw"))
    assert (user.config.read_bytes(), user.files()) == before
    user.ok("context", "add", "--replace", "new", str(user.bundle()))


def test_a_bundle_comes_from_stdin(user: User) -> None:
    """As a secret does that is in no file."""
    command = [str(BIN / "pjw"), "context", "add", "prod", "-"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "XDG_CONFIG_HOME": str(user.home)}
    bundle = user.bundle().read_bytes()
    done = subprocess.run(command, input=bundle, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"prod: localhost:1\n"), done
    assert "client:       alice" in user.ok("context", "show", "prod")


def test_a_bundle_in_memory_is_in_no_file(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no descriptor either, and shows its key to nobody."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(user.home))
    monkeypatch.setenv("PJW_BUNDLE", user.bundle().read_text())
    before = os.listdir("/proc/self/fd")
    settings = find_settings()
    assert os.listdir("/proc/self/fd") == before
    assert "PRIVATE" not in repr(settings)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    assert load_client_credentials(*files) == read_bundle(str(user.bundle())).credentials


def test_a_bundle_that_is_in_no_file_has_a_name(user: User) -> None:
    """Errors say where it came from."""
    said = user.refused("list", PJW_BUNDLE="-----BEGIN NOTHING-----")
    assert said.startswith("pjw: error: cannot read bundle PJW_BUNDLE: it has no line")


def test_a_bundle_in_the_environment_is_a_context(user: User) -> None:
    """Its path or its text; a variable of one setting stands before it, the current context behind."""
    user.ok("context", "add", "prod", str(user.bundle()))
    for value in (str(user.bundle("bob")), user.bundle("bob").read_text()):
        words = "cannot connect to localhost:1: connection refused"
        assert words in user.refused("list", PJW_BUNDLE=value)
        assert "no such host" in user.refused("list", PJW_BUNDLE=value, PJW_SERVER="nosuch.invalid:1")
    assert "cannot read bundle /nonexistent" in user.refused("list", PJW_BUNDLE="/nonexistent")
