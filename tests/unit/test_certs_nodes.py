"""Certificates of nodes: good for both ends, named by a URI alone, and never taken for a client's."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from pjw.certs import authority
from pjw.certs.checks import Purpose, fault_of, is_for, key_matches, parse_certificates, parse_key
from pjw.certs.credentials import diagnose_client, load_server_credentials
from pjw.certs.identity import NameRules, identity_of, node_of
from pjw.errors import ConfigError, NotAuthenticatedError
from pjw.server.main import main
from tests.support.certs_factory import CN, OID, issue, make_ca

CA = make_ca()


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """An authority with a server, alice, and the node n1."""
    certs = tmp_path / "certs"
    authority.init_set(str(certs), ["localhost"], ["alice"])
    authority.write_node(str(certs), "n1", ["10.0.0.1", "box.example.org"])
    return certs


def parsed(path: Path) -> x509.Certificate:
    """The certificate of a file."""
    return parse_certificates(path.read_bytes())[0]


def test_a_nodes_certificate_is_good_for_both_ends(certs: Path) -> None:
    """As a server's for its own name and its hosts, as a client's, and for no other node's name."""
    certificate = parsed(certs / "node-n1.crt")
    assert fault_of(certificate, Purpose.SERVER) is None
    assert fault_of(certificate, Purpose.CLIENT) is None
    for host in ("n1.node.pjw.internal", "10.0.0.1", "box.example.org"):
        assert is_for(certificate, host)
    assert not is_for(certificate, "n2.node.pjw.internal")
    files = [str(certs / name) for name in ("ca.crt", "node-n1.crt", "node-n1.key")]
    load_server_credentials(*files)
    assert diagnose_client(*files) is None
    assert node_of((certs / "node-n1.crt").read_bytes()) == "n1"


def test_a_node_is_no_client_whatever_the_rules(certs: Path) -> None:
    """Not by its CN, nor by an attribute; and a version that knows no nodes takes its CN for a host."""
    pem = (certs / "node-n1.crt").read_bytes()
    for rules in (NameRules(), NameRules(in_common_name=True), NameRules(oid="2.5.4.3")):
        with pytest.raises(NotAuthenticatedError, match="that of node 'n1', which is no client"):
            identity_of(pem, rules)
    claimed = issue(CA, [(CN, "x"), (OID, "alice")], sans=["URI:pjw:node:n1"]).crt_pem
    with pytest.raises(NotAuthenticatedError, match="which is no client"):
        identity_of(claimed)
    [common_name] = parsed(certs / "node-n1.crt").subject.get_attributes_for_oid(CN)
    assert common_name.value == "n1.node.pjw.internal"


@pytest.mark.parametrize(
    ("sans", "words"),
    [
        ([], "it has no name that begins with pjw:node:"),
        (["n1.node.pjw.internal"], "it has no name that begins with pjw:node:"),
        (["URI:https://n1"], "it has no name that begins with pjw:node:"),
        (["URI:pjw:node:n1", "URI:pjw:node:n2"], "that of more than one"),
        (["URI:pjw:node:"], "'' is no name of a node"),
        (["URI:pjw:node:N1"], "'N1' is no name of a node"),
        (["URI:pjw:node:a/b"], "'a/b' is no name of a node"),
    ],
)
def test_a_client_is_no_node_by_its_name(sans: list[str], words: str) -> None:
    """What its CN says does not matter; nor does a host name that only looks like a node's."""
    with pytest.raises(NotAuthenticatedError, match=words):
        node_of(issue(CA, [(CN, "n1")], sans=sans).crt_pem)


@pytest.mark.parametrize("name", ["", "N1", "-n", "n-", "a.b", "a_b", "n" * 41, "../x", "alice@home"])
def test_a_name_that_no_node_can_have_is_refused(certs: Path, name: str) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match="is no name of a node"):
        authority.write_node(str(certs), name)
    assert len(list(certs.glob("node-*"))) == 2


def test_pjwd_certs_makes_lists_renews_and_revokes_them(
    certs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A renewed one has the same key, names and purposes; the server's own is not revoked along with it."""
    assert main(["certs", "node", str(certs), "n2", "10.0.0.2"]) == 0
    assert capsys.readouterr().out.split() == [str(certs / f"node-n2.{kind}") for kind in ("key", "crt")]
    assert main(["certs", "node", str(certs), "n2"]) == 1
    assert "pjw overwrites no certificate" in capsys.readouterr().err
    old = parsed(certs / "node-n2.crt")
    assert main(["certs", "renew", str(certs), "node-n2"]) == 0
    new = parsed(certs / "node-n2.crt")
    assert new.serial_number != old.serial_number
    assert key_matches(new, parse_key((certs / "node-n2.key").read_bytes()))
    for kind in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage):
        assert new.extensions.get_extension_for_class(kind) == old.extensions.get_extension_for_class(kind)
    usage = new.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    capsys.readouterr()
    assert main(["certs", "revoke", str(certs), "node-n2"]) == 0
    assert "added 2 certificates" in capsys.readouterr().err
    assert main(["certs", "list", str(certs)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "revoked" in rows["node-n2.crt"]
    assert "revoked" not in rows["server.crt"] + rows["node-n1.crt"]
