"""A verified client certificate to an Identity, and nothing else.

The certificate has passed the handshake: its chain and purpose are known to be good. This module decides only
the name of its owner, and two owners must never get the same name unless the CA said so.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from pjw.certs.checks import key_bytes
from pjw.certs.profile import (
    CLIENT_NAME_OID,
    CLIENT_NAME_TAIL,
    KEY_NAME_HEX_DIGITS,
    KEY_NAME_PREFIX,
    NODE_URI_PREFIX,
    SHORT_KEY_NAME_HEX_DIGITS,
    name_fault,
    node_name_fault,
    quoted,
)
from pjw.errors import ConfigError, NotAuthenticatedError
from pjw.model import Identity

CACHE_CERTIFICATES: Final = 1024
# A certificate made by a recipe for servers has this CN, without a SAN that shows its purpose.
LOCALHOST: Final = "localhost"


@dataclass(frozen=True, slots=True)
class NameRules:
    """The operator's settings about names.

    `in_common_name`: whether the tail of a CN is a name. That is for an authority which lets no subscriber
    choose a CN. `short_names`: the names of 64 bits that earlier versions gave to keys; these keys keep them.
    """

    oid: str = CLIENT_NAME_OID
    in_common_name: bool = False
    short_names: frozenset[str] = frozenset()


OUR_RULES: Final = NameRules()


@lru_cache(maxsize=CACHE_CERTIFICATES)
def identity_of(pem: bytes, rules: NameRules = OUR_RULES) -> Identity:
    """Name the owner of a verified certificate. Raises NotAuthenticatedError.

    The name is (1) the subject's client name: an attribute with the OID of *rules*, or, where they
    allow it, the tail of a CN such as `localhost/clientName=john`; (2) else the CN, when it is not a host
    name that the same certificate claims; (3) else made of the certificate's key. A name
    that breaks the rule for names is refused, never skipped for the next rule. Only
    the first certificate of *pem* counts. Says nothing about the date: see `check_leaf`.
    """
    oid = x509.ObjectIdentifier(rules.oid)
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common_names = _values(certificate, NameOID.COMMON_NAME)
        tails = list(_tails(common_names))
        claims = _values(certificate, oid) + tails
        hosts = list(_host_names(certificate))
        nodes = _node_names(certificate)
        key_digest = hashlib.sha256(key_bytes(certificate.public_key())).hexdigest()
        serial = certificate.serial_number
    except Exception as error:  # the parser's errors are not documented as a closed set
        raise NotAuthenticatedError("cannot read the client certificate: it is malformed") from error
    if nodes:
        raise NotAuthenticatedError(
            f"cannot name the client: the certificate is that of node {quoted(nodes[0])}, which is no client"
        )
    if tails and not rules.in_common_name:
        raise NotAuthenticatedError(
            "cannot name the client: its CN has a clientName, and this server takes none from there"
            " (client_name_in_cn in its configuration)"
        )
    if len(common_names) > 1 or len(claims) > 1:
        raise NotAuthenticatedError("cannot name the client: its certificate has more than one name for it")
    if claims:
        return Identity(_checked(claims[0]), serial)
    if common_names and not _is_host(common_names[0], hosts):
        return Identity(_checked(common_names[0]), serial)
    short = KEY_NAME_PREFIX + key_digest[:SHORT_KEY_NAME_HEX_DIGITS]
    known = short in rules.short_names
    return Identity(short if known else KEY_NAME_PREFIX + key_digest[:KEY_NAME_HEX_DIGITS], serial)


@lru_cache(maxsize=CACHE_CERTIFICATES)
def node_of(pem: bytes) -> str:
    """Return the name of the node whose verified certificate this is. Raises NotAuthenticatedError.

    It is the URI `pjw:node:NAME` among the certificate's names, and never its subject. Only the first
    certificate of *pem* counts. Says nothing about the date: see `check_leaf`.
    """
    try:
        names = _node_names(x509.load_pem_x509_certificate(pem))
    except Exception as error:  # the parser's errors are not documented as a closed set
        raise NotAuthenticatedError("cannot read the node's certificate: it is malformed") from error
    if not names:
        raise NotAuthenticatedError(
            "the certificate is no node's: it has no name that begins with " + NODE_URI_PREFIX,
            hint="`pjwd certs node DIR NAME` makes one",
        )
    if len(names) > 1:
        raise NotAuthenticatedError("cannot name the node: its certificate is that of more than one")
    if fault := node_name_fault(names[0]):
        raise NotAuthenticatedError(f"cannot name the node: {fault}")
    return names[0]


def _node_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return [uri.removeprefix(NODE_URI_PREFIX) for uri in uris if uri.startswith(NODE_URI_PREFIX)]


def check_client_name_oid(oid: str) -> None:
    """Refuse a setting that is no object identifier. Raises ConfigError."""
    try:
        x509.ObjectIdentifier(oid)
    except ValueError:
        raise ConfigError(
            f"cannot use {quoted(oid)} as the OID of client names: it is no object identifier",
            hint="write it in dots, as in 1.3.6.1.4.1.99999.1",
        ) from None


def _tails(common_names: list[str]) -> Iterator[str]:
    """Yield the part of each CN behind `/clientName=`."""
    for common_name in common_names:
        _, mark, tail = common_name.partition(CLIENT_NAME_TAIL)
        if mark:
            yield tail


def _values(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str]:
    values = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(oid)]
    if not all(isinstance(value, str) for value in values):
        raise ValueError("an attribute of the subject is not text")
    return [str(value) for value in values]


def _host_names(certificate: x509.Certificate) -> Iterator[str | IPv4Address | IPv6Address]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    yield from (_plain(name) for name in names.get_values_for_type(x509.DNSName))
    for address in names.get_values_for_type(x509.IPAddress):
        if isinstance(address, IPv4Address | IPv6Address):
            yield address


def _is_host(name: str, hosts: list[str | IPv4Address | IPv6Address]) -> bool:
    """Return whether a CN names the host where a certificate is used, and not its owner."""
    plain = _plain(name)
    if plain == LOCALHOST or plain in hosts or "*." + plain.partition(".")[2] in hosts:
        return True
    try:
        return ip_address(name) in hosts
    except ValueError:
        return False


def _plain(host: str) -> str:
    """Normalize a host name: names differ in neither case nor a final dot."""
    return host.lower().removesuffix(".")


def _checked(name: str) -> str:
    fault = name_fault(name)
    if fault:
        raise NotAuthenticatedError(f"cannot name the client: {fault}")
    return name
