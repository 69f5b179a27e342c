"""A bundle: all that a client needs in one text, its key in it. Standard library only.

PEM, and so plain to read, to cut and to check (`openssl` skips the other lines):

    server: HOST:PORT
    (the private key; the client's certificate, and any between it and the authority)
    authority:
    (the certificates of the authority)
"""

import re
from dataclasses import dataclass
from typing import Final

from pjw.certs import files
from pjw.certs.files import BUNDLE_MARK, ClientCredentials, read_path
from pjw.errors import ConfigError
from pjw.given import server_address

BUNDLE_SUFFIX: Final = ".pjw"

_HEAD: Final = "pjw bundle: add it with `pjw context add NAME FILE`; it holds a private key\n"
_SERVER: Final = re.compile(rb"^server: ([!-~]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The address that a client connects to, and its credentials there."""

    server: str
    credentials: ClientCredentials


def bundle_bytes(bundle: Bundle) -> bytes:
    """Return a bundle as the bytes of its file."""
    credentials = bundle.credentials
    head = f"{_HEAD}server: {bundle.server}\n".encode()
    own = head + credentials.key_pem + credentials.crt_pem.removesuffix(b"\n")
    return own + BUNDLE_MARK + b"\n" + credentials.ca_pem


def read_bundle(path: str) -> Bundle:
    """Read the bundle in a file. Raises ConfigError, which names the file and its fault."""
    data = read_path(path, "bundle").replace(b"\r\n", b"\n")
    own, mark, authority = data.partition(BUNDLE_MARK)
    server = _SERVER.search(own)
    if not mark or server is None:
        raise ConfigError(
            f"cannot read bundle {path}: it has no line `server: HOST:PORT`, or none `authority:`",
            hint="`pjwd certs client` writes bundles, as NAME.pjw",
        )
    if any(text in own for text in files.ENCRYPTED):
        raise ConfigError(f"cannot use bundle {path}: its key is encrypted, and pjw asks for no passphrase")
    try:
        keys = files.blocks(own, files.KEYS)
        certificates, authorities = (files.blocks(part, files.CERTIFICATES) for part in (own, authority))
    except ValueError as error:
        raise ConfigError(f"cannot read bundle {path}: {error}") from None
    if len(keys) != 1:
        raise ConfigError(f"cannot read bundle {path}: it has {len(keys)} PEM private keys in it, not one")
    for found, what in ((certificates, "of the client"), (authorities, "of the authority")):
        if not found:
            raise ConfigError(f"cannot read bundle {path}: it has no PEM certificate {what} in it")
    return Bundle(
        server_address(server[1].decode()),
        ClientCredentials(ca_pem=b"".join(authorities), crt_pem=b"".join(certificates), key_pem=keys[0]),
    )
