"""TLS 1.3 with a good client certificate, or nothing: by openssl, the standard library, gRPC and pjw."""

import datetime as dt
import os
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support import certs_factory
from tests.support.certs_factory import CN, ODD_CLIENTS, issue
from tests.support.service import METHODS, Service, ask

# What pjw finds in its own files when the server has hung up without a word.
DIAGNOSES: Final = {
    "expired": "it expired on ",
    "not yet valid": "it is not valid before ",
    "other CA": "it was not issued by the CA in ",
    "other CA of the same name": "it was not issued by the CA in ",
    "self-signed": "it was not issued by the CA in ",
    "server only": "it is not for clientAuth",
    "any purpose": "it is not for clientAuth",
    "no digital signature": "its key usage does not allow digital signatures",
    "Ed25519": "it has an Ed25519 key, which gRPC cannot use",
    "P-521": "its key is on the curve secp521r1, which gRPC cannot use",
}
# TLS lets these through; the service does not.
WEAK: Final = {
    "RSA 1024": "its RSA key has 1024 bits, and at least 2048 are required",
    "SHA-1": "it is signed with SHA1, and at least SHA256 is required",
}


def authority(service: Service) -> certs_factory.Made:
    """The service's own CA, to make clients of every kind with."""
    return certs_factory.load(
        (service.certs / "ca.crt").read_bytes(), (service.certs / "ca.key").read_bytes()
    )


def odd(service: Service, name: str, directory: Path) -> tuple[str, str]:
    """The files of an odd client."""
    return ODD_CLIENTS[name](authority(service)).write(directory, "odd")


def s_client(service: Service, *options: str) -> "subprocess.CompletedProcess[bytes]":
    """openssl's client with alice's good certificate; it hangs up when its input ends."""
    command = ["openssl", "s_client", "-connect", service.address, "-alpn", "h2", "-CAfile"]
    command += [str(service.certs / "ca.crt"), "-verify_return_error", "-servername", "localhost"]
    command += ["-cert", str(service.certs / "alice.crt"), "-key", str(service.certs / "alice.key"), *options]
    return subprocess.run(command, input=b"", capture_output=True, timeout=30, check=False)


def context_of(service: Service, version: ssl.TLSVersion) -> ssl.SSLContext:
    """The standard library's TLS of one version, with alice's good certificate."""
    context = ssl.create_default_context(cafile=str(service.certs / "ca.crt"))
    context.load_cert_chain(service.certs / "alice.crt", service.certs / "alice.key")
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


def test_tls_1_2_is_refused_with_a_valid_certificate(service: Service) -> None:
    """openssl with the same good certificate: 1.3 is agreed on, 1.2 is not."""
    new = s_client(service, "-tls1_3")
    assert b"New, TLSv1.3, Cipher is TLS_" in new.stdout
    assert b"Verify return code: 0 (ok)" in new.stdout
    old = s_client(service, "-tls1_2")
    assert b"New, (NONE), Cipher is (NONE)" in old.stdout
    assert old.returncode != 0


def test_the_standard_library_gets_in_by_1_3_alone(service: Service) -> None:
    """A second client that is not gRPC: 1.3 gives HTTP/2, 1.2 ends in the handshake."""
    host, port = service.address.split(":")
    with (
        socket.create_connection((host, int(port)), 10) as raw,
        context_of(service, ssl.TLSVersion.TLSv1_3).wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        assert (tls.version(), tls.selected_alpn_protocol()) == ("TLSv1.3", "h2")
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        assert tls.recv(9)[3] == 4  # SETTINGS: let in
    with (
        socket.create_connection((host, int(port)), 10) as raw,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
    ):
        context_of(service, ssl.TLSVersion.TLSv1_2).wrap_socket(raw, server_hostname="localhost")


def test_a_weak_cipher_setting_in_the_environment_changes_nothing(
    make_service: Callable[..., Service],
) -> None:
    """The variable that could bring TLS 1.2 with CBC back is not taken from whoever starts pjwd."""
    weak = "ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-GCM-SHA384"
    service = make_service(clients=["alice"]).start(env={**os.environ, "GRPC_SSL_CIPHER_SUITES": weak})
    for cipher in weak.split(":"):
        done = s_client(service, "-tls1_2", "-cipher", cipher)
        assert b"New, (NONE), Cipher is (NONE)" in done.stdout
    assert service.ok("list") == ""


def test_only_strong_suites_of_1_3_are_agreed_on(service: Service) -> None:
    """The three suites that gRPC has are accepted, one without a full tag is not."""
    for suite in ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"):
        done = s_client(service, "-tls1_3", "-ciphersuites", suite)
        assert f"Cipher is {suite}".encode() in done.stdout
    done = s_client(service, "-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_8_SHA256")
    assert b"Cipher is (NONE)" in done.stdout


@pytest.mark.parametrize("name", [None, *ODD_CLIENTS])
def test_nobody_gets_in_with_a_bad_certificate(service: Service, name: str | None, tmp_path: Path) -> None:
    """Every method, the stream too: with no certificate, or an odd one, nothing but a refusal comes back."""
    before = service.made()
    with service.channel(odd(service, name, tmp_path) if name else None) as channel:
        for method, _ in METHODS:
            messages, code, *_ = ask(channel, method, b"", timeout=20)
            assert messages == []
            expected = grpc.StatusCode.UNAUTHENTICATED if name in WEAK else grpc.StatusCode.UNAVAILABLE
            assert code is expected, (method, code)
    assert service.made() == before


@pytest.mark.parametrize("name", DIAGNOSES)
def test_pjw_says_what_is_wrong_with_its_certificate(service: Service, name: str, tmp_path: Path) -> None:
    """The server hangs up without a reason, so pjw looks at its own files and finds it."""
    crt, key = odd(service, name, tmp_path)
    code, words = service.refused("list", PJW_CLIENT_CRT=crt, PJW_CLIENT_KEY=key)
    assert code == 125
    assert words.startswith(
        f"pjw: error: {service.address} closed the connection: cannot use client certificate {crt}: "
    )
    assert DIAGNOSES[name] in words


@pytest.mark.parametrize("name", WEAK)
def test_weak_certificates_are_refused_in_words(service: Service, name: str, tmp_path: Path) -> None:
    """What TLS accepts and we do not: a call says why, and so does a stream."""
    crt, key = odd(service, name, tmp_path)
    for command in (["list"], ["logs", "1"]):
        code, words = service.refused(*command, PJW_CLIENT_CRT=crt, PJW_CLIENT_KEY=key)
        assert (code, words) == (1, f"pjw: error: cannot accept the client certificate: {WEAK[name]}\n")


def test_a_key_that_does_not_match_is_found_by_pjw(service: Service) -> None:
    """alice's certificate with bob's key: said in words, before or after the server hung up."""
    code, words = service.refused("list", PJW_CLIENT_KEY=str(service.certs / "bob.key"))
    assert code == 125
    assert "bob.key" in words
    assert "it does not belong to the certificate" in words


def test_a_server_of_another_authority_is_not_trusted(service: Service, tmp_path: Path) -> None:
    """pjw sends nothing to a server that its own authority has not issued."""
    certs_factory.make_ca("another").write(tmp_path, "other")
    code, words = service.refused("start", "true", PJW_CA_CRT=str(tmp_path / "other.crt"))
    assert code == 125
    assert "the certificate of " in words
    assert "hint: see --ca-crt and PJW_CA_CRT" in words


def test_a_certificate_that_expires_ends_its_stream_and_its_connection(
    service: Service, tmp_path: Path
) -> None:
    """A stream does not outlive its certificate; nor does a connection that was made before."""
    end = dt.timedelta(seconds=6)
    client = issue(authority(service), [(CN, "brief")], end=end).write(tmp_path, "brief")
    with service.stub(client) as stub, service.stub(client) as resumed:
        resumed.List(pb.ListRequest())
        job_id = stub.Start(pb.StartRequest(command="echo hello; sleep 300")).job.id
        stream = stub.Logs(pb.LogsRequest(id=job_id), timeout=30)
        assert next(stream).data == b"hello\n"
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.details() == "the client certificate has expired during the call"
        for each in (stub, resumed):
            with pytest.raises(grpc.RpcError) as caught:
                each.Stop(pb.StopRequest(id=job_id), timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    code, words = service.refused("list", PJW_CLIENT_CRT=client[0], PJW_CLIENT_KEY=client[1])
    assert (code, "it expired on " in words) == (125, True)
    again = issue(authority(service), [(CN, "brief")]).write(tmp_path, "again")
    with service.stub(again) as stub:
        assert stub.Stop(pb.StopRequest(id=job_id)).job.client_name == "brief"
