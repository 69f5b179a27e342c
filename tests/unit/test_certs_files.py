"""Reading and writing certificate and key files: their modes, and all or nothing."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pjw.certs.files import (
    NewFile,
    key_exposure,
    load_client_credentials,
    read_certificates,
    read_key,
    write_new,
)
from pjw.errors import ConfigError

CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN PRIVATE KEY-----\nMA==\n-----END PRIVATE KEY-----\n"
NOBODY = 65534


def put(path: Path, data: bytes, mode: int = 0o600) -> str:
    """Write a file of that mode; its path."""
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


@pytest.fixture
def spy_modes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The mode of every file at the moment of its creation, before a byte is in it."""
    modes: list[int] = []
    true_open = os.open

    def watched(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = true_open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            status = os.fstat(descriptor)
            assert status.st_size == 0
            modes.append(status.st_mode & 0o7777)
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    return modes


def test_mode_is_right_from_creation(tmp_path: Path, spy_modes: list[int]) -> None:
    """A key is 0600 from the moment that it exists, whatever the umask, in a directory that is 0700."""
    former = os.umask(0)
    try:
        paths = write_new(
            str(tmp_path / "new"), [NewFile("a.key", KEY, 0o600), NewFile("a.crt", CERTIFICATE, 0o644)]
        )
    finally:
        os.umask(former)
    assert spy_modes == [0o600, 0o644]
    assert [Path(path).stat().st_mode & 0o7777 for path in paths] == [0o600, 0o644]
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o700
    assert [Path(path).read_bytes() for path in paths] == [KEY, CERTIFICATE]


@pytest.mark.parametrize("existing", ["a.key", "a.crt"])
def test_existing_file_stays(tmp_path: Path, existing: str) -> None:
    """An existing file is named in the error and keeps its bytes, and its new partner is not left behind."""
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(ConfigError, match=f"cannot write .*/{existing}: file exists") as caught:
        write_new(str(tmp_path), [NewFile("a.key", KEY, 0o600), NewFile("a.crt", CERTIFICATE, 0o644)])
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_bytes() == b"precious"


def test_symlink_is_not_followed(tmp_path: Path) -> None:
    """A dangling symbolic link in the file's place does not lead the key elsewhere."""
    target = tmp_path / "elsewhere"
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "a.key").symlink_to(target)
    with pytest.raises(ConfigError, match="cannot write"):
        write_new(str(directory), [NewFile("a.key", KEY, 0o600)])
    assert not target.exists()


@pytest.mark.parametrize("existed", [True, False])
def test_full_disk_leaves_nothing(tmp_path: Path, existed: bool) -> None:
    """When the second file does not fit, the first goes too, and a directory that was made for them."""
    directory = tmp_path / "d"
    if existed:
        directory.mkdir()
    # a real limit of the kernel, in a process of its own: EFBIG once SIGXFSZ is ignored
    code = """if True:
        import resource, signal, sys
        from pjw.certs.files import NewFile, write_new
        from pjw.errors import ConfigError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_new(sys.argv[1], [NewFile("a.key", b"k", 0o600), NewFile("a.crt", b"c" * 2000, 0o644)])
        except ConfigError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
    )
    assert "a.crt: file too large (EFBIG)" in done.stdout
    assert list(tmp_path.rglob("*")) == ([directory] if existed else [])


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two files leaves no key without its certificate."""
    real_open = os.open

    def interrupted(path: str, *arguments: Any, **options: Any) -> int:
        if os.path.basename(path) == "a.crt":
            raise KeyboardInterrupt
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_new(str(tmp_path / "d"), [NewFile("a.key", KEY, 0o600), NewFile("a.crt", CERTIFICATE, 0o644)])
    assert list(tmp_path.iterdir()) == []


def test_directory_errors_are_worded(tmp_path: Path) -> None:
    """A parent that is missing, or a file in the directory's place, is the operator's to mend."""
    with pytest.raises(ConfigError, match=r"no such file or directory \(ENOENT\)"):
        write_new(str(tmp_path / "a/b"), [])
    put(tmp_path / "file", b"")
    with pytest.raises(ConfigError, match=r"not a directory \(ENOTDIR\)"):
        write_new(str(tmp_path / "file"), [])


@pytest.mark.parametrize(
    ("mode", "owner", "allowed"),
    [
        (0o600, 0, True),
        (0o400, 0, True),
        (0o640, 0, True),
        (0o440, 0, True),
        (0o644, 0, False),
        (0o604, 0, False),
        (0o660, 0, False),
        (0o600, NOBODY, True),
        (0o640, NOBODY, False),
        (0o601, NOBODY, False),
        (0o620, NOBODY, False),
    ],
)
def test_exposed_key_is_told(tmp_path: Path, mode: int, owner: int, allowed: bool) -> None:
    """Only its owner should read a key; root may share one with a group, for a service that is not root."""
    if os.geteuid() != 0 and owner != os.geteuid():
        pytest.skip("needs root to give a file away")
    path = put(tmp_path / "a.key", KEY, mode)
    os.chown(path, owner, -1)
    assert read_key(path) == KEY
    exposure = key_exposure(path, os.stat(path))
    assert (exposure is None) == allowed
    assert allowed or exposure == (
        f"others may read the private key {path} (its mode is {mode:04o}): chmod 600 {path}"
    )


def test_unreadable_files_name_themselves(tmp_path: Path) -> None:
    """Each way of not being a PEM file has its own words, and none hangs."""
    os.mkfifo(tmp_path / "fifo")
    cases = {
        "missing": r"no such file or directory \(ENOENT\)",
        "fifo": "not a regular file",
        ".": "not a regular file|is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError, match=words) as caught:
            read_certificates(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ConfigError, match="no PEM certificate"):
        read_certificates(put(tmp_path / "der", b"\x30\x82"))
    with pytest.raises(ConfigError, match="no PEM private key"):
        read_key(put(tmp_path / "crt", CERTIFICATE))
    with pytest.raises(ConfigError, match="crt: it is cut short: its CERTIFICATE has no end"):
        read_certificates(put(tmp_path / "crt", CERTIFICATE[:40]))
    with pytest.raises(ConfigError, match="crt: what is in its CERTIFICATE is not base64"):
        read_certificates(put(tmp_path / "crt", CERTIFICATE.replace(b"MA==", b"M!==")))
    with pytest.raises(ConfigError, match="longer than"):
        read_certificates(put(tmp_path / "long", CERTIFICATE * 30_000))
    for encrypted in (
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----",
        b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED",
    ):
        with pytest.raises(ConfigError, match="encrypted"):
            read_key(put(tmp_path / "encrypted", encrypted))


def test_file_without_permission_is_named() -> None:
    """A key that its reader may not open is told from one that is missing."""
    # a process of its own, so that root can become somebody whom modes bind
    code = """if True:
        import os, sys
        from pjw.certs.files import read_key
        from pjw.errors import ConfigError
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        try:
            read_key(sys.argv[1])
        except ConfigError as error:
            print(error)
    """
    # not tmp_path, which is closed to others as a whole
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = put(Path(directory) / "a.key", KEY, 0)
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot read private key {path}: permission denied (EACCES)\n"


def test_no_certificate_or_key_is_checked_in() -> None:
    """Samples expire, and keys leak: tests and the demo make their own."""
    root = Path(__file__).parents[2]
    text = re.compile(rb"-----BEGIN [A-Z ]*(CERTIFICATE|KEY)-----\s+[A-Za-z0-9+/=\s]{100}")
    files = [
        path for name in ("src", "tests", "docs", "packaging", "scripts") for path in (root / name).rglob("*")
    ]
    assert len(files) > 100
    found = [path for path in files if path.suffix in (".crt", ".csr", ".der", ".key", ".p12", ".pem")]
    assert found + [path for path in files if path.is_file() and text.search(path.read_bytes())] == []


def test_endless_file_ends() -> None:
    """A device that never ends is no certificate."""
    with pytest.raises(ConfigError, match="not a regular file"):
        read_certificates("/dev/zero")


def test_key_is_not_in_repr(tmp_path: Path) -> None:
    """Neither credentials nor a file to be written show their key to a log."""
    crt, key = put(tmp_path / "a.crt", CERTIFICATE), put(tmp_path / "a.key", KEY)
    credentials = load_client_credentials(crt, crt, key)
    assert credentials.key_pem == KEY
    assert "PRIVATE" not in repr(credentials)
    assert "PRIVATE" not in repr(NewFile("a.key", KEY, 0o600))


def test_light_modules_stay_light() -> None:
    """What the command line reads its files with imports neither cryptography nor grpc."""
    code = "import sys, pjw.certs.files, pjw.certs.tls, pjw.certs.profile; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "pjw.certs.files" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {"cryptography", "grpc", "asyncio", "subprocess"}
