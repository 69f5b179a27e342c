"""The revocation list: what openssl prints goes in as it is, and no bad line is passed over."""

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes

from pjw.certs.revocation import NOBODY_REVOKED, RevocationList, load_revocation_list, parse_revocation_list
from pjw.errors import ConfigError
from tests.support.certs_factory import Made, issue, make_ca

SHA256 = "0a" * 31 + "FF"
FINGERPRINT = bytes.fromhex(SHA256)


def parsed(text: str) -> RevocationList:
    """A list that can be read."""
    return parse_revocation_list(text.encode(), "/revoked")


def colons(digits: str) -> str:
    """Hex digits in pairs."""
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))


@pytest.fixture(scope="module")
def made() -> Made:
    """A client's certificate."""
    return issue(make_ca())


@pytest.mark.parametrize("options", [("-serial",), ("-fingerprint", "-sha256")], ids=str)
def test_what_openssl_prints_is_an_entry(made: Made, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The command of the documentation, appended to the file, revokes that certificate and no other."""
    crt, _ = made.write(tmp_path, "john")
    path = tmp_path / "revoked"
    with path.open("wb") as file:
        subprocess.run(["openssl", "x509", "-in", crt, "-noout", *options], stdout=file, check=True)
    revoked = load_revocation_list(str(path))
    assert len(revoked) == 1
    for certificate, expected in ((made.certificate, True), (issue(make_ca()).certificate, False)):
        fingerprint = certificate.fingerprint(hashes.SHA256())
        assert revoked.revokes(certificate.serial_number, fingerprint) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0", 0),
        ("01", 1),
        ("1A2b", 0x1A2B),
        ("1A:2b", 0x1A2B),
        ("00:1A:2b", 0x1A2B),
        ("serial=1A2B", 0x1A2B),
        ("SERIAL=1a:2b", 0x1A2B),
        ("  1A2B\t\r", 0x1A2B),
        ("1A2B# john", 0x1A2B),
        ("1A2B   # john # \N{SNOWMAN}", 0x1A2B),
        ("F" * 40, 16**40 - 1),
        ("00:" + colons("F" * 40), 16**40 - 1),
        (SHA256, FINGERPRINT),
        (SHA256.lower(), FINGERPRINT),
        (colons(SHA256), FINGERPRINT),
        (f"SHA256 Fingerprint={colons(SHA256)}", FINGERPRINT),
        (f"sha256 Fingerprint={colons(SHA256)} # john", FINGERPRINT),
    ],
)
def test_forms_of_an_entry(line: str, expected: int | bytes) -> None:
    """Serial numbers and fingerprints, with and without colons, prefix, space and comment."""
    serials = frozenset({expected}) if isinstance(expected, int) else frozenset[int]()
    fingerprints = frozenset({expected}) if isinstance(expected, bytes) else frozenset[bytes]()
    for text in (line, f"\n# a comment\n\n  \n{line}\n{line}\n"):
        assert parsed(text) == RevocationList(serials, fingerprints)


@pytest.mark.parametrize("text", ["", "\n", "# nobody", " \t\r\n#\n\n"])
def test_a_list_of_nobody(text: str) -> None:
    """Blank lines and comments revoke nobody."""
    assert parsed(text) == NOBODY_REVOKED


@pytest.mark.parametrize(
    "line",
    [
        "john",
        "0x1A2B",
        "-1A2B",
        "serial=-0A",
        "serial=",
        "1A 2B",
        "1A2B 3C4D",
        ":1A",
        "1A:",
        "1A::2B",
        "1:A2",
        "1A-2B",
        "1A2B,",
        "=1A",
        "G1",
        "F" * 41,
        "F" * 63,
        "F" * 65,
        "F" * 128,
        f"serial={SHA256}",
        "sha256 Fingerprint=1A2B",
        f"sha1 Fingerprint={'AA' * 20}",
        "1A2B\0",
        "\N{FULLWIDTH DIGIT ONE}",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "\ufeff1A2B",
        "/etc/pjw/john.crt",
        "-----BEGIN X509 CRL-----",
        "x" * 100_000,
    ],
)
def test_a_line_that_is_no_entry_is_named(line: str) -> None:
    """File and line number are told, and the line in printable ASCII of bounded length."""
    with pytest.raises(ConfigError) as caught:
        parsed(f"# first\n01\n{line}\n02\n")
    words = str(caught.value)
    assert words.startswith("cannot read revocation list /revoked: line 3: ")
    assert words.isascii() and words.isprintable() and len(words) < 250
    assert caught.value.hint == "openssl x509 -in FILE -noout -serial prints a line as it should be"


def test_bytes_that_are_no_text() -> None:
    """Neither UTF-8 nor anything else is asked of a comment; an entry is ASCII."""
    assert len(parse_revocation_list(b"01 # \xff\xfe\n", "/revoked")) == 1
    with pytest.raises(ConfigError, match="line 1"):
        parse_revocation_list(b"01\xff\n", "/revoked")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A list that was configured and is missing is an error: nobody would be kept out."""
    path = tmp_path / "revoked"
    with pytest.raises(ConfigError, match=f"cannot read revocation list {path}: no such file"):
        load_revocation_list(str(path))


def test_who_is_revoked(made: Made) -> None:
    """By serial number or by fingerprint; one digit off is somebody else."""
    serial, fingerprint = made.certificate.serial_number, made.certificate.fingerprint(hashes.SHA256())
    table = {
        f"{serial:x}": True,
        f"{serial + 1:x}": False,
        fingerprint.hex(): True,
        fingerprint[::-1].hex(): False,
        f"{serial + 1:x}\n{fingerprint.hex()}": True,
        "": False,
    }
    for text, expected in table.items():
        assert parsed(text).revokes(serial, fingerprint) is expected


def test_a_serial_number_is_of_every_authority() -> None:
    """Who issued it is not asked: all certificates of one number are revoked; a fingerprint is one's own."""
    by_serial, by_fingerprint = parsed("07"), parsed(SHA256)
    assert by_serial.revokes(7, FINGERPRINT) and by_serial.revokes(7, bytes(32))
    assert by_fingerprint.revokes(7, FINGERPRINT) and not by_fingerprint.revokes(7, bytes(32))
