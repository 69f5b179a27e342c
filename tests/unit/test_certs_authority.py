"""The development CA: what its certificates say, and that they are good for one end only."""

import datetime as dt
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pjw.certs import authority
from pjw.certs.authority import Pair, make_authority, make_client, make_server
from pjw.certs.checks import Purpose, fault_of
from pjw.certs.credentials import diagnose_client, load_server_credentials
from pjw.certs.identity import identity_of
from pjw.errors import ConfigError
from tests.support import certs_factory


@pytest.fixture(scope="module")
def ca() -> Pair:
    """The CA of this module."""
    return make_authority()


def parsed(pair: Pair) -> x509.Certificate:
    """The certificate of a pair."""
    return x509.load_pem_x509_certificate(pair.crt_pem)


def test_profile_of_all_three(ca: Pair) -> None:
    """P-256 and SHA-256, critical constraints and usage, key identifiers that join: all three have them."""
    root = parsed(ca)
    identifier = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    for pair, is_ca in ((ca, True), (make_server(ca, ["a"]), False), (make_client(ca, "john"), False)):
        certificate = parsed(pair)
        assert certificate.version == x509.Version.v3
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (constraints.critical, constraints.value.ca) == (True, is_ca)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (
            True,
            is_ca,
            not is_ca,
        )
        authority_identifier = certificate.extensions.get_extension_for_class(
            x509.AuthorityKeyIdentifier
        ).value
        assert authority_identifier.key_identifier == identifier
        certificate.verify_directly_issued_by(root)


def test_each_end_has_its_own_certificate(ca: Pair) -> None:
    """A server's certificate is no client's, nor the other way round, and neither is a CA's."""
    fits = {
        role: [
            fault_of(parsed(pair), role) is None
            for pair in (ca, make_server(ca, ["a"]), make_client(ca, "john"))
        ]
        for role in Purpose
    }
    assert fits == {
        Purpose.CA: [True, False, False],
        Purpose.SERVER: [False, True, False],
        Purpose.CLIENT: [False, False, True],
    }


def test_serials_and_keys_are_new(ca: Pair) -> None:
    """Two certificates for the same name share neither serial nor key, and two CAs no subject."""
    one, two = parsed(make_client(ca, "john")), parsed(make_client(ca, "john"))
    assert one.serial_number != two.serial_number
    assert min(one.serial_number, two.serial_number) > 2**64
    assert one.public_key() != two.public_key()
    assert parsed(ca).subject != parsed(make_authority()).subject


def test_hosts_become_names_and_addresses(ca: Pair) -> None:
    """Host names go into the SAN as DNS names, addresses as addresses, and none twice."""
    hosts = [
        "pjw.example.org",
        "localhost",
        "127.0.0.1",
        "::1",
        "localhost",
        "job_worker",
        "xn--bcher-kva.example",
    ]
    names = (
        parsed(make_server(ca, hosts)).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    assert names.get_values_for_type(x509.DNSName) == [
        "pjw.example.org",
        "localhost",
        "job_worker",
        "xn--bcher-kva.example",
    ]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]


BAD_HOSTS = [
    "",
    ".",
    "a..b",
    "a b",
    "a\n",
    "-a",
    "a-",
    "bücher.example",
    "*.example.org",
    "10.0.0.256",
    "1.2.3",
]


@pytest.mark.parametrize(
    "host", [*BAD_HOSTS, "a/b", "a:1", "[::1]", "::1%lo", "a" * 64, ".".join(["a" * 63] * 4)]
)
def test_bad_host_is_refused(ca: Pair, host: str) -> None:
    """What is neither a host name nor an address gets no certificate."""
    with pytest.raises(ConfigError, match="cannot make a server certificate for '"):
        make_server(ca, [host])


def test_no_host_is_refused(ca: Pair) -> None:
    """A server certificate without a host would fit nothing."""
    with pytest.raises(ConfigError, match="no host is named"):
        make_server(ca, [])


def test_long_host_fits(ca: Pair) -> None:
    """A host name longer than a CN can be still gets its certificate."""
    host = ".".join(["a" * 60] * 3)
    assert fault_of(parsed(make_server(ca, [host])), Purpose.SERVER) is None


def test_validity(ca: Pair) -> None:
    """A certificate begins a little in the past, lasts its days, and never outlives its CA."""
    now = dt.datetime.now(dt.UTC)
    leaf = parsed(make_client(ca, "john", days=20))
    assert dt.timedelta(minutes=1) < now - leaf.not_valid_before_utc < dt.timedelta(hours=1)
    assert abs(leaf.not_valid_after_utc - now - dt.timedelta(days=20)) < dt.timedelta(minutes=1)
    short = make_authority(days=3)
    assert (
        parsed(make_client(short, "john", days=20)).not_valid_after_utc == parsed(short).not_valid_after_utc
    )


@pytest.mark.parametrize("days", [0, -1, 36_501, 10**9])
def test_days_have_bounds(ca: Pair, days: int) -> None:
    """A number of days that makes no certificate is refused in words."""
    with pytest.raises(ConfigError, match="days"):
        make_client(ca, "john", days=days)
    with pytest.raises(ConfigError, match="days"):
        make_authority(days=days)


def test_files_work_together(tmp_path: Path) -> None:
    """The three commands give six files that pass every check, with private keys and the right name."""
    directory = str(tmp_path / "certs")
    written = [
        *authority.init_directory(directory),
        *authority.write_server(directory, ["localhost", "127.0.0.1"]),
        *authority.write_client(directory, "john"),
    ]
    names = [Path(path).name for path in written]
    assert names == ["ca.key", "ca.crt", "server.key", "server.crt", "john.key", "john.crt"]
    assert {Path(path).stat().st_mode & 0o777 for path in written if path.endswith(".key")} == {0o600}
    ca_crt = f"{directory}/ca.crt"
    load_server_credentials(ca_crt, f"{directory}/server.crt", f"{directory}/server.key")
    assert diagnose_client(ca_crt, f"{directory}/john.crt", f"{directory}/john.key") is None
    pem = Path(directory, "john.crt").read_bytes()
    assert identity_of(pem).client_name == "john"
    assert identity_of(pem).serial == x509.load_pem_x509_certificate(pem).serial_number
    # and a reader that is not ours agrees
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", ca_crt, "-purpose"]
    subprocess.run([*verify, "sslclient", f"{directory}/john.crt"], check=True, capture_output=True)
    subprocess.run([*verify, "sslserver", f"{directory}/server.crt"], check=True, capture_output=True)


def test_set_is_whole_or_not_there(tmp_path: Path) -> None:
    """A CA, a server and clients are made in one go, and not even the CA when one of the others cannot be."""
    directory = tmp_path / "certs"
    for hosts, names in ((["a b"], ["john"]), (["a"], ["john", "../x"]), (["a"], ["ca"]), ([], [])):
        with pytest.raises(ConfigError):
            authority.init_set(str(directory), hosts, names)
        assert not directory.exists()
    written = authority.init_set(str(directory), ["localhost"], ["john", "mary", "john"])
    assert [Path(path).name for path in written[1::2]] == ["ca.crt", "server.crt", "john.crt", "mary.crt"]
    load_server_credentials(*(str(directory / name) for name in ("ca.crt", "server.crt", "server.key")))
    for name in ("john", "mary"):
        assert (
            diagnose_client(*(str(directory / file) for file in ("ca.crt", f"{name}.crt", f"{name}.key")))
            is None
        )
    with pytest.raises(ConfigError, match="file exists"):
        authority.init_set(str(directory), ["localhost"], ["paul"])
    assert not (directory / "paul.key").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A second run of each command names the file that is there, and changes none."""
    directory = str(tmp_path)
    authority.init_directory(directory)
    authority.write_server(directory, ["a"])
    authority.write_client(directory, "john")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"ca.key: file exists \(EEXIST\)"):
        authority.init_directory(directory)
    with pytest.raises(ConfigError, match=r"server\.key: file exists"):
        authority.write_server(directory, ["a"])
    with pytest.raises(ConfigError, match=r"john\.key: file exists"):
        authority.write_client(directory, "john")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["../john", "a/b", "", ".", "..", "-x", "john\n", "key-1", "jöhn", "a" * 65, "a\0b"]
)
def test_bad_client_name_makes_no_file(tmp_path: Path, name: str) -> None:
    """A name is checked before a file name is made of it."""
    directory = tmp_path / "certs"
    authority.init_directory(str(directory))
    with pytest.raises(ConfigError, match="is no client name"):
        authority.write_client(str(directory), name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ca.crt", "ca.key", "certs"]


@pytest.mark.parametrize("name", ["ca", "server", "CA", "Server"])
def test_reserved_client_name_makes_no_file(tmp_path: Path, name: str) -> None:
    """A client cannot take the file names of the server or of the CA, even while these are free."""
    authority.init_directory(str(tmp_path))
    with pytest.raises(ConfigError, match="the name of another certificate"):
        authority.write_client(str(tmp_path), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.crt", "ca.key"]


def test_issuing_needs_a_whole_ca(tmp_path: Path) -> None:
    """No CA, another CA's key, an expired CA: each has its own words, and nothing is written."""
    directory = str(tmp_path)
    with pytest.raises(ConfigError, match=r"it has no ca\.crt") as caught:
        authority.write_client(directory, "john")
    assert caught.value.hint == "make one with `pjwd certs init`"
    authority.init_directory(directory)
    (tmp_path / "ca.key").write_bytes(make_authority().key_pem)
    with pytest.raises(ConfigError, match="does not belong to the certificate"):
        authority.write_client(directory, "john")
    old = certs_factory.make_ca(start=-2 * certs_factory.DAY, end=-certs_factory.DAY)
    (tmp_path / "ca.crt").unlink()
    (tmp_path / "ca.key").unlink()
    old.write(tmp_path, "ca")
    with pytest.raises(ConfigError, match=r"ca\.crt: it expired on"):
        authority.write_server(directory, ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.crt", "ca.key"]


@pytest.mark.parametrize(
    "key", [certs_factory.rsa_key(), ed25519.Ed25519PrivateKey.generate()], ids=["RSA", "Ed25519"]
)
def test_other_ca_can_issue(key: certs_factory.Key) -> None:
    """A CA that was not made here can issue too, and its own key identifier is used."""
    made = certs_factory.make_ca(key=key)
    leaf = parsed(make_client(Pair(made.crt_pem, made.key_pem), "john"))
    leaf.verify_directly_issued_by(made.certificate)
    assert fault_of(leaf, Purpose.CLIENT) is None


def test_own_identifier_of_the_ca_is_used() -> None:
    """A CA may have a key identifier that is no hash of its key: what it issues points to that one."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=own -keyout /dev/stdout -addext"
    done = subprocess.run(
        [*command.split(), "subjectKeyIdentifier=01:02:03"], check=True, capture_output=True
    )
    key, mark, crt = done.stdout.partition(b"-----BEGIN CERTIFICATE-----")
    leaf = parsed(make_client(Pair(mark + crt, key), "john"))
    identifier = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert identifier.key_identifier == b"\1\2\3"


def test_key_is_not_in_repr(ca: Pair) -> None:
    """A pair shows its key to no log."""
    assert "PRIVATE" not in repr(ca)
