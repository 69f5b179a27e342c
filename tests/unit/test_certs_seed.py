"""The recipe of the project's first README works to the letter, and tells its clients apart."""

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from pjw.certs.credentials import diagnose_client, load_server_credentials
from pjw.certs.identity import identity_of
from tests.support.certs_factory import connect

# To the letter; only the loop over two clients is ours.
SEED_RECIPE: Final = r"""
set -e
DAYS=20
SUBJECT="/C=US/ST=Washington/L=Seattle/O=GhostSquad/OU=Prototype Job Worker/CN=localhost"

# CA
openssl req -newkey rsa:4096 \
  -new -nodes -x509 \
  -days "${DAYS}" \
  -out ca.crt \
  -keyout ca.key \
  -subj "${SUBJECT}"

# Server
openssl genrsa -out server.key 4096
openssl req -new -key server.key -days "${DAYS}" -out server.csr \
    -subj "${SUBJECT}"

openssl x509  -req -in server.csr \
    -extfile <(printf "subjectAltName=DNS:localhost") \
    -CA ca.crt -CAkey ca.key  \
    -days "${DAYS}" -sha256 -CAcreateserial \
    -out server.crt

for CLIENT in john mary; do

openssl genrsa -out "${CLIENT}.key" 4096

openssl req -new -key "${CLIENT}.key" -days "${DAYS}" -out "${CLIENT}.csr" \
    -subj "${SUBJECT}/clientName=${CLIENT}"

openssl x509  -req -in "${CLIENT}.csr" \
    -extfile <(printf "subjectAltName=DNS:localhost") \
    -CA ca.crt -CAkey ca.key -out "${CLIENT}.crt" -days "${DAYS}" -sha256 -CAcreateserial

done
"""


@pytest.fixture(scope="session")
def seed_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the seed's recipe was followed for john and mary."""
    directory = tmp_path_factory.mktemp("seed")
    subprocess.run(["bash", "-c", SEED_RECIPE], cwd=directory, check=True, capture_output=True)
    return directory


def test_seed_recipe_gives_two_names(seed_files: Path) -> None:
    """OpenSSL drops the seed's clientName, and still john, mary and the server have three names."""
    certificates = [(seed_files / f"{name}.crt").read_bytes() for name in ("john", "mary", "server")]
    subjects = {x509.load_pem_x509_certificate(pem).subject.rfc4514_string() for pem in certificates}
    assert len(subjects) == 1, "they are told apart by nothing but their keys"
    names = [identity_of(pem).client_name for pem in certificates]
    assert len(set(names)) == 3
    assert all(re.fullmatch("key-[0-9a-f]{32}", name) for name in names)


def test_seed_files_are_accepted(seed_files: Path) -> None:
    """The recipe's files pass every check of both ends: openssl makes its keys 0600 by itself."""
    ca, server = seed_files / "ca.crt", seed_files / "server"
    load_server_credentials(str(ca), f"{server}.crt", f"{server}.key")
    for name in ("john", "mary"):
        assert diagnose_client(str(ca), f"{seed_files / name}.crt", f"{seed_files / name}.key") is None


def test_seed_files_connect(seed_files: Path) -> None:
    """The real grpc accepts the recipe's files, although CA, server and clients have one subject."""
    ca, server = str(seed_files / "ca"), str(seed_files / "server")
    seen = connect(*((ca, server, str(seed_files / name)) for name in ("john", "mary")))
    names = {identity_of(pem.encode()).client_name for pem in seen if pem is not None}
    assert len(names) == 2
