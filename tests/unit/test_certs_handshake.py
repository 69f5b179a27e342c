"""Our checks and the handshakes of the real grpc agree on who connects, but for keys that are weak."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from pjw.certs import authority
from pjw.certs.checks import Purpose, fault_of
from pjw.certs.identity import identity_of
from tests.support import certs_factory
from tests.support.certs_factory import (
    ANY,
    CN,
    GOOD_CLIENTS,
    ODD_CLIENTS,
    SERVER,
    Made,
    connect,
    issue,
    make_ca,
)

# TLS lets these through: here the refusal is ours alone, and check_leaf must not be forgotten.
WEAK = {"RSA 1024", "SHA-1"}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What came of a connection with each client's certificate of the factory."""
    directory = tmp_path_factory.mktemp("clients")
    ca = make_ca()
    ca.write(directory, "ca")
    certs_factory.server(ca).write(directory, "server")
    makers = {**GOOD_CLIENTS, **ODD_CLIENTS}
    for number, make in enumerate(makers.values()):
        make(ca).write(directory, f"client{number}")
    base = str(directory)
    triples = [(f"{base}/ca", f"{base}/server", f"{base}/client{number}") for number in range(len(makers))]
    return dict(zip(makers, connect(*triples), strict=True))


@pytest.mark.parametrize("name", GOOD_CLIENTS)
def test_good_client_connects(clients: dict[str, str | None], name: str) -> None:
    """What diagnose_client finds nothing wrong with is accepted by grpc, and gives its name."""
    pem = clients[name]
    assert pem is not None
    assert identity_of(pem.encode()).client_name


@pytest.mark.parametrize("name", ODD_CLIENTS)
def test_odd_client_is_stopped_by_tls_or_by_us(clients: dict[str, str | None], name: str) -> None:
    """What diagnose_client objects to cannot connect, but for weak keys and hashes, which grpc accepts."""
    assert (clients[name] is not None) == (name in WEAK)


@cache
def keys() -> dict[str, certs_factory.Key]:
    """A key of each kind, made once."""
    return {
        "P-256": certs_factory.ec_key(),
        "P-384": certs_factory.ec_key(ec.SECP384R1()),
        "P-521": certs_factory.ec_key(ec.SECP521R1()),
        "RSA": certs_factory.rsa_key(),
        "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    }


def test_servers_and_cas_agree_with_grpc(tmp_path: Path) -> None:
    """For keys of each type, as CA and as server, grpc connects exactly when our checks find nothing."""
    cases: dict[str, tuple[Made, Made]] = {}
    plain = make_ca()
    for name, key in keys().items():
        ca = make_ca(key=key)
        cases[f"CA {name}"] = (ca, certs_factory.server(ca))
        cases[f"server {name}"] = (plain, certs_factory.server(plain, key=key))
    cases["any purpose"] = (plain, issue(plain, [(CN, "localhost")], sans=["localhost"], eku=ANY))
    unusable = certs_factory.no_signature_usage()
    cases["usage"] = (
        plain,
        issue(plain, [(CN, "localhost")], sans=["localhost"], eku=SERVER, key_usage=unusable),
    )
    silent = make_ca(cert_sign=False)
    cases["CA usage"] = (silent, certs_factory.server(silent))
    triples, expected = [], {}
    for number, (name, (ca, server)) in enumerate(cases.items()):
        base = f"{tmp_path}/{number}"
        for suffix, made in (("ca", ca), ("server", server), ("client", issue(ca))):
            made.write(tmp_path, f"{number}{suffix}")
        triples.append((f"{base}ca", f"{base}server", f"{base}client"))
        faults = (fault_of(ca.certificate, Purpose.CA), fault_of(server.certificate, Purpose.SERVER))
        expected[name] = faults == (None, None)
    assert {
        name: answer is not None for name, answer in zip(cases, connect(*triples), strict=True)
    } == expected


def test_made_certificates_connect(tmp_path: Path) -> None:
    """The files of `pjwd certs` connect; the server's certificate is no client's, and a client's no CA's."""
    directory = str(tmp_path)
    authority.init_directory(directory)
    authority.write_server(directory, ["localhost"])
    authority.write_client(directory, "john")
    john = authority.Pair((tmp_path / "john.crt").read_bytes(), (tmp_path / "john.key").read_bytes())
    signed = certs_factory.load(john.crt_pem, john.key_pem)
    forged = issue(signed, [(CN, "mary")])
    Made(forged.certificate, forged.key, (signed.certificate,)).write(tmp_path, "mary")
    ca, server = f"{directory}/ca", f"{directory}/server"
    seen, *others = connect(
        *((ca, server, client) for client in (f"{directory}/john", server, f"{directory}/mary"))
    )
    assert seen is not None
    assert identity_of(seen.encode()).client_name == "john"
    assert others == [None, None]


ODD_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "text before": lambda data: b"Bag Attributes\n  localKeyID: 01 -----BEGIN\n" + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "spaces": lambda data: b"\n".join(b"  " + line + b" \t" for line in data.split(b"\n")),
    "one line": lambda data: b"".join(
        line if b"-----" in line else line.strip() for line in re.split(rb"(?<=-----\n)", data)
    ),
    "no newline at the end": lambda data: data.rstrip(),
    "all in one file": lambda data: data,
}


def test_what_python_reads_grpc_reads(tmp_path: Path) -> None:
    """B5: certificates, keys and authorities of odd files connect, as server and as client."""
    ca = make_ca()
    triples = []
    for number, (name, change) in enumerate(ODD_TEXTS.items()):
        for suffix, made in (("ca", ca), ("server", certs_factory.server(ca)), ("client", issue(ca))):
            made.write(tmp_path, f"{number}{suffix}")
            paths = [tmp_path / f"{number}{suffix}.{kind}" for kind in ("crt", "key")]
            texts = [change(path.read_bytes()) for path in paths]
            if name == "all in one file":
                texts = [texts[1] + texts[0]] * 2
            for path, text in zip(paths, texts, strict=True):
                path.write_bytes(text)
        triples.append(tuple(f"{tmp_path}/{number}{suffix}" for suffix in ("ca", "server", "client")))
    seen = dict(zip(ODD_TEXTS, connect(*triples), strict=True))  # type: ignore[arg-type]
    assert [name for name, certificate in seen.items() if certificate is None] == []
