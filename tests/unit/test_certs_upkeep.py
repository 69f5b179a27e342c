"""What becomes of certificates after they were made: `pjwd certs list`, `renew`, `revoke`, and warnings."""

import logging
from pathlib import Path

import pytest

from pjw.certs import authority
from pjw.certs.bundle import read_bundle
from pjw.certs.checks import key_matches, names_of, parse_certificates, parse_key
from pjw.certs.credentials import diagnose_client, load_server_credentials
from pjw.certs.files import ServerCredentials
from pjw.certs.revocation import load_revocation_list
from pjw.server.main import main
from pjw.server.reload import warn_of_ends


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """An authority, a server, alice for a week and bob for a year."""
    certs = tmp_path / "certs"
    authority.init_set(str(certs), ["localhost", "127.0.0.1"], ["bob"], bundle_server="localhost:1")
    authority.write_client(str(certs), "alice", days=7, bundle_server="jobs.example.org:7")
    return certs


def serial(path: Path) -> int:
    """The serial number of a certificate."""
    return parse_certificates(path.read_bytes())[0].serial_number


def test_a_list_says_whose_and_until_when(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is about to end, or revoked."""
    assert main(["certs", "revoke", str(certs), "bob"]) == 0
    capsys.readouterr()
    assert main(["certs", "list", str(certs)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["FILE", "FOR", "VALID", "UNTIL", "STATE", "SERIAL"]
    alice, bob, ca, server = rows
    assert alice.startswith("alice.crt") and "ends in 6 days" in alice
    assert bob.startswith("bob.crt") and "revoked" in bob and f"{serial(certs / 'bob.crt'):X}" in bob
    assert ca.startswith("ca.crt") and " ok " in ca
    assert server.startswith("server.crt") and "localhost, 127.0.0.1" in server


def test_a_renewed_client_is_the_same_one(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its key and its name, a new bundle for the same server, and the old certificate beside it."""
    old, key, mode = (certs / "alice.crt").read_bytes(), (certs / "alice.key").read_bytes(), 0o600
    assert main(["certs", "renew", str(certs), "alice", "server"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(certs / name) for name in ("alice.crt", "alice.pjw", "server.crt")]
    assert "pjw context add --replace default alice.pjw" in said.err
    assert f"copy {certs}/server.crt to the path that `server_crt` in pjwd's configuration names" in said.err
    assert "systemctl reload pjwd" in said.err
    [new], [before] = parse_certificates((certs / "alice.crt").read_bytes()), parse_certificates(old)
    assert (new.subject, new.serial_number == before.serial_number) == (before.subject, False)
    assert new.not_valid_after_utc > before.not_valid_after_utc
    assert (certs / "alice.key").read_bytes() == key
    assert key_matches(new, parse_key(key))
    [kept] = certs.glob("alice.????????.crt")
    assert kept.read_bytes() == old
    bundle = read_bundle(str(certs / "alice.pjw"))
    assert (bundle.server, bundle.credentials.crt_pem) == (
        "jobs.example.org:7",
        (certs / "alice.crt").read_bytes(),
    )
    assert (certs / "alice.pjw").stat().st_mode & 0o777 == mode
    files = [str(certs / name) for name in ("ca.crt", "alice.crt", "alice.key")]
    assert diagnose_client(*files[:3]) is None
    [server] = parse_certificates((certs / "server.crt").read_bytes())
    assert names_of(server) == ["localhost", "127.0.0.1"]
    load_server_credentials(*(str(certs / name) for name in ("ca.crt", "server.crt", "server.key")))
    # renewed twice in a day as well
    assert main(["certs", "renew", str(certs), "alice"]) == 0
    assert len(list(certs.glob("alice.????????.crt"))) == 2


def test_a_renewal_that_was_interrupted_is_made_again(certs: Path) -> None:
    """After the first of its steps, which keeps the old certificate."""
    old = (certs / "alice.crt").read_bytes()
    digits = f"{serial(certs / 'alice.crt'):X}"[:8]
    kept = certs / f"alice.{digits}.crt"
    kept.write_bytes(old)
    assert main(["certs", "renew", str(certs), "alice"]) == 0
    assert kept.read_bytes() == old
    assert serial(certs / "alice.crt") != serial(kept)


def test_a_bundle_that_cannot_be_read_renews_nothing(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rather than that the certificate is new and the bundle has the old one."""
    before = (certs / "alice.crt").read_bytes()
    (certs / "alice.pjw").write_text("nonsense")
    assert main(["certs", "renew", str(certs), "bob", "alice"]) == 1
    assert f"cannot read bundle {certs}/alice.pjw" in capsys.readouterr().err
    assert (certs / "alice.crt").read_bytes() == before
    assert not list(certs.glob("*.????????.crt"))


def test_what_a_killed_renewal_left_blocks_no_other(certs: Path) -> None:
    """Its file beside the certificate is replaced."""
    before = serial(certs / "alice.crt")
    for name in ("alice.crt", "alice.pjw"):
        (certs / f"{name}.new").write_text("half")
    assert main(["certs", "renew", str(certs), "alice"]) == 0
    assert serial(certs / "alice.crt") != before
    assert not list(certs.glob("*.new"))


def test_a_revocation_finds_all_certificates_of_a_client(
    certs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that were renewed as well; once each, behind what is in the list already."""
    (certs / "revoked").write_text("1F # by hand")
    serials = {0x1F, serial(certs / "alice.crt")}
    assert main(["certs", "renew", str(certs), "alice"]) == 0
    serials.add(serial(certs / "alice.crt"))
    for _ in range(2):
        capsys.readouterr()
        assert main(["certs", "revoke", str(certs), "alice"]) == 0
        assert capsys.readouterr().out == f"{certs}/revoked\n"
        assert load_revocation_list(str(certs / "revoked")).serials == serials
    text = (certs / "revoked").read_text()
    assert (text.count("\n"), text.count("# alice, valid until ")) == (3, 2)
    other = certs / "other"
    assert main(["certs", "revoke", "--list", str(other), str(certs), "bob"]) == 0
    assert load_revocation_list(str(other)).serials == {serial(certs / "bob.crt")}


@pytest.mark.parametrize(("command", "name"), [("renew", "carol"), ("renew", "ca"), ("revoke", "carol")])
def test_what_is_not_there_changes_nothing(
    certs: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor what is named before it."""
    before = {path.name: path.read_bytes() for path in certs.iterdir()}
    assert main(["certs", command, str(certs), "alice", name]) == 1
    said = capsys.readouterr()
    assert (said.out, f"cannot {command} {name}: " in said.err, "certs list" in said.err) == ("", True, True)
    assert {path.name: path.read_bytes() for path in certs.iterdir()} == before


def test_the_log_warns_two_weeks_before_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the server's certificate, and of the authority's; and of neither while there is time."""
    for days, ca_days, words in (
        (365, 3650, []),
        (13, 3650, ["server's"]),
        (13, 13, ["server's", "authority"]),
    ):
        pair = authority.make_authority(days=ca_days)
        server = authority.make_server(pair, ["localhost"], days=days)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_ends(
                ServerCredentials(ca_pem=pair.crt_pem, crt_pem=server.crt_pem, key_pem=server.key_pem)
            )
        assert [record.getMessage().split()[1] for record in caplog.records] == words
