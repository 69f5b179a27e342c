"""What is wrong with a certificate is said in words, before anything listens or after a refusal."""

import datetime as dt
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtensionOID

from pjw.certs.checks import Purpose, fault_of
from pjw.certs.credentials import check_leaf, diagnose_client, load_server_credentials
from pjw.errors import ConfigError, NotAuthenticatedError
from tests.support import certs_factory
from tests.support.certs_factory import DAY, GOOD_CLIENTS, ODD_CLIENTS, SERVER, Made, issue, make_ca

WORDS = {
    "expired": r"it expired on 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC",
    "not yet valid": r"it is not valid before 20\d\d-",
    "other CA": "it was not issued by the CA in ",
    "other CA of the same name": "it was not issued by the CA in ",
    "self-signed": "it was not issued by the CA in ",
    "server only": "it is not for clientAuth",
    "any purpose": "it is not for clientAuth",
    "no digital signature": "digital signatures",
    "RSA 1024": "its RSA key has 1024 bits",
    "SHA-1": "it is signed with SHA1",
    "Ed25519": "it has an Ed25519 key, which gRPC cannot use",
    "P-521": "curve secp521r1",
    "P-224": "curve secp224r1",
    "secp256k1": "curve secp256k1",
    "CA's own name, no key identifier": "takes it for self-signed",
}
# Only the chain tells these; it is the handshake's business, and never that of a leaf alone.
CHAIN_ALONE = {"other CA", "other CA of the same name", "self-signed"}


@pytest.fixture(scope="module")
def ca() -> Made:
    """The CA of this module."""
    return make_ca()


def paths(directory: Path, ca: Made, leaf: Made, key: Made | None = None) -> tuple[str, str, str]:
    """Write the files of one end; their paths."""
    ca_crt, _ = ca.write(directory, "ca")
    crt, _ = leaf.write(directory, "leaf")
    _, key_path = (key or leaf).write(directory, "its")
    return ca_crt, crt, key_path


def test_words_cover_every_oddity() -> None:
    """A certificate that is added to the factory needs its words here."""
    assert WORDS.keys() == ODD_CLIENTS.keys()


@pytest.mark.parametrize("name", ODD_CLIENTS)
def test_odd_client_is_diagnosed(tmp_path: Path, ca: Made, name: str) -> None:
    """Each oddity of a client's certificate is named in one sentence, with its file."""
    files = paths(tmp_path, ca, ODD_CLIENTS[name](ca))
    sentence = diagnose_client(*files)
    assert sentence is not None
    assert re.search(WORDS[name], sentence)
    assert files[1] in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ODD_CLIENTS)
def test_odd_leaf_is_refused(ca: Made, name: str) -> None:
    """The server refuses per request what the leaf alone shows, and says which it is."""
    leaf = ODD_CLIENTS[name](ca).certificate
    if name in CHAIN_ALONE:
        check_leaf(leaf)
        return
    with pytest.raises(NotAuthenticatedError, match=f"cannot accept the client certificate: .*{WORDS[name]}"):
        check_leaf(leaf)


@pytest.mark.parametrize("name", GOOD_CLIENTS)
def test_good_client_passes(tmp_path: Path, ca: Made, name: str) -> None:
    """Nothing is found in a certificate that grpc accepts."""
    leaf = GOOD_CLIENTS[name](ca)
    assert diagnose_client(*paths(tmp_path, ca, leaf)) is None
    check_leaf(leaf.certificate)


def test_leaf_expires_between_two_requests(ca: Made) -> None:
    """The last second of a certificate is good, and the next is not: time is looked at each time."""
    leaf = issue(ca).certificate
    end = leaf.not_valid_after_utc
    check_leaf(leaf, end)
    with pytest.raises(NotAuthenticatedError, match="expired"):
        check_leaf(leaf, end + dt.timedelta(seconds=1))
    check_leaf(leaf, leaf.not_valid_before_utc)
    with pytest.raises(NotAuthenticatedError, match="not valid before"):
        check_leaf(leaf, leaf.not_valid_before_utc - dt.timedelta(seconds=1))


def test_md5_is_refused() -> None:
    """MD5 is no better than SHA-1."""
    leaf = certs_factory.issue_by_openssl(make_ca(key=certs_factory.rsa_key()), "md5")
    assert (
        fault_of(leaf.certificate, Purpose.CLIENT) == "it is signed with MD5, and at least SHA256 is required"
    )


def test_pss_only_key_is_refused(tmp_path: Path) -> None:
    """A key of the type RSASSA-PSS is RSA, but not for grpc."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048", "-nodes"]
    files = ["-keyout", "key", "-out", "crt", "-subj", "/CN=john"]
    subprocess.run([*command, *files], cwd=tmp_path, check=True, capture_output=True)
    certificate = x509.load_pem_x509_certificate((tmp_path / "crt").read_bytes())
    assert "for PSS alone" in str(fault_of(certificate, Purpose.CLIENT))


def test_malformed_extension_is_a_fault(ca: Made) -> None:
    """An extension that cannot be parsed makes the certificate unfit, not the server crash."""
    broken = x509.UnrecognizedExtension(ExtensionOID.EXTENDED_KEY_USAGE, b"\x30\x05garbage")
    leaf = issue(ca, eku=None, extensions=[broken]).certificate
    with pytest.raises(NotAuthenticatedError, match="its fields cannot be read"):
        check_leaf(leaf)


def test_server_credentials_are_read(tmp_path: Path, ca: Made) -> None:
    """Good files come back as bytes, and the key stays out of repr()."""
    leaf = certs_factory.server(ca)
    credentials = load_server_credentials(*paths(tmp_path, ca, leaf))
    assert (credentials.ca_pem, credentials.crt_pem) == (ca.crt_pem, leaf.crt_pem)
    assert credentials.key_pem == leaf.key_pem
    assert "PRIVATE" not in repr(credentials)


ODD_SERVERS: dict[str, tuple[Callable[[Made], Made], str]] = {
    "client only": (issue, "leaf.crt: it is not for serverAuth"),
    "expired": (lambda ca: issue(ca, eku=SERVER, start=-2 * DAY, end=-DAY), "leaf.crt: it expired on"),
    "RSA 1024": (
        lambda ca: certs_factory.server(ca, key=certs_factory.rsa_key(1024)),
        "leaf.crt: its RSA key",
    ),
    "Ed25519": (
        lambda ca: certs_factory.server(ca, key=ed25519.Ed25519PrivateKey.generate()),
        "leaf.crt: it has an Ed25519 key",
    ),
    "other CA": (
        lambda _: certs_factory.server(make_ca()),
        "leaf.crt: it was not issued by the CA in .*ca.crt",
    ),
}


@pytest.mark.parametrize("name", ODD_SERVERS)
def test_odd_server_is_refused(tmp_path: Path, ca: Made, name: str) -> None:
    """A certificate with which no client could connect is refused before anything listens."""
    make, words = ODD_SERVERS[name]
    with pytest.raises(ConfigError, match=words) as caught:
        load_server_credentials(*paths(tmp_path, ca, make(ca)))
    assert caught.value.hint


ODD_CAS: dict[str, tuple[Callable[[], Made], str]] = {
    "no CA": (lambda: make_ca(ca=False), "it is not the certificate of a CA"),
    "no constraints": (lambda: make_ca(ca=None, cert_sign=None), "it is not the certificate of a CA"),
    "usage": (lambda: make_ca(cert_sign=False), "its key usage does not allow signing"),
    "expired": (lambda: make_ca(start=-2 * DAY, end=-DAY), "it expired on"),
    "RSA 1024": (lambda: make_ca(key=certs_factory.rsa_key(1024)), "its RSA key has 1024 bits"),
    "secp256k1": (
        lambda: make_ca(key=certs_factory.ec_key(ec.SECP256K1())),
        "its key is on the curve secp256k1",
    ),
}


@pytest.mark.parametrize("name", ODD_CAS)
def test_odd_ca_is_refused(tmp_path: Path, name: str) -> None:
    """Whatever is in ca.crt is trusted by grpc, even if it is no CA: it must be one, and strong."""
    make, words = ODD_CAS[name]
    odd = make()
    with pytest.raises(ConfigError, match=f"cannot use CA certificate .*ca.crt: {words}"):
        load_server_credentials(*paths(tmp_path, odd, certs_factory.server(odd)))


@pytest.mark.parametrize(
    "key",
    [ed25519.Ed25519PrivateKey.generate(), certs_factory.ec_key(ec.SECP521R1()), certs_factory.rsa_key()],
    ids=["Ed25519", "P-521", "RSA"],
)
def test_ca_key_has_more_freedom(tmp_path: Path, key: certs_factory.Key) -> None:
    """A CA signs no handshake, so that it may have a key that a leaf may not."""
    ca = make_ca(key=key)
    load_server_credentials(*paths(tmp_path, ca, certs_factory.server(ca)))


def test_key_of_another_certificate_is_refused(tmp_path: Path, ca: Made) -> None:
    """A key that is not the certificate's is named together with it, at both ends."""
    leaf, other = certs_factory.server(ca), certs_factory.server(ca)
    with pytest.raises(
        ConfigError, match=r"private key .*its\.key: it does not belong to the certificate .*leaf.crt"
    ):
        load_server_credentials(*paths(tmp_path, ca, leaf, other))
    client = issue(ca)
    assert "does not belong" in str(diagnose_client(*paths(tmp_path, ca, client, issue(ca))))


def test_chain_leads_to_the_ca(tmp_path: Path, ca: Made) -> None:
    """A leaf of an intermediate CA is accepted with the chain in its file, and not without."""
    middle = make_ca("middle", parent=ca)
    low = make_ca("low", parent=middle)
    leaf = certs_factory.server(low)
    whole = Made(leaf.certificate, leaf.key, (low.certificate, middle.certificate))
    load_server_credentials(*paths(tmp_path, ca, whole))
    for chain in ((), (low.certificate,), (middle.certificate,)):
        with pytest.raises(ConfigError, match="not issued by"):
            load_server_credentials(*paths(tmp_path, ca, Made(leaf.certificate, leaf.key, chain)))


def test_leaf_is_no_intermediate(tmp_path: Path, ca: Made) -> None:
    """A client cannot issue certificates to others: a chain through a leaf is refused."""
    john = issue(ca)
    mary = issue(john, [(certs_factory.CN, "mary")])
    sentence = diagnose_client(*paths(tmp_path, ca, Made(mary.certificate, mary.key, (john.certificate,))))
    assert "in its chain: it is not the certificate of a CA" in str(sentence)


def test_broken_files_are_worded(tmp_path: Path, ca: Made) -> None:
    """PEM around garbage is an error of the operator's, with the file's name."""
    ca_crt, crt, key = paths(tmp_path, ca, certs_factory.server(ca))
    garbage = tmp_path / "garbage"
    garbage.touch(mode=0o600)
    garbage.write_text("-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n")
    with pytest.raises(
        ConfigError, match=f"cannot read server certificate {garbage}: it is no X.509 certificate"
    ):
        load_server_credentials(ca_crt, str(garbage), key)
    with pytest.raises(ConfigError, match=f"cannot read CA certificate {garbage}"):
        load_server_credentials(str(garbage), crt, key)
    garbage.write_text("-----BEGIN PRIVATE KEY-----\nbm8=\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match=f"cannot read private key {garbage}: it is no private key"):
        load_server_credentials(ca_crt, crt, str(garbage))
    with pytest.raises(ConfigError, match=r"missing: no such file or directory \(ENOENT\)"):
        load_server_credentials(ca_crt, str(tmp_path / "missing"), key)
    assert "ENOENT" in str(diagnose_client(str(tmp_path / "missing"), crt, key))


def test_old_key_formats_are_read(tmp_path: Path, ca: Made) -> None:
    """Keys as older openssl wrote them (EC PRIVATE KEY with parameters, RSA PRIVATE KEY) are good."""
    for algorithm, option in (("ecparam", "-name prime256v1 -genkey"), ("genrsa", "-traditional 2048")):
        path = tmp_path / f"{algorithm}.key"
        path.touch(mode=0o600)
        subprocess.run(["openssl", algorithm, "-out", path, *option.split()], check=True, capture_output=True)
        key = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, certs_factory.Key)
        ca_crt, crt, _ = paths(tmp_path, ca, certs_factory.server(ca, key=key))
        load_server_credentials(ca_crt, crt, str(path))
