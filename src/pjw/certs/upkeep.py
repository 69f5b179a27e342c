"""Lists, renews and revokes the certificates in a directory.

The directory is the register: when a new certificate replaces an old one, the old one stays as
NAME.SERIAL.crt, so that a revocation finds it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from pjw.certs.authority import CA_CRT, LEAF_DAYS, NODE_FILE_PREFIX, load_authority, reissued
from pjw.certs.bundle import BUNDLE_SUFFIX, Bundle, bundle_bytes, read_bundle
from pjw.certs.checks import describe_time, ends_soon, is_of_server, names_of, parse_certificates
from pjw.certs.files import ClientCredentials, NewFile, read_certificates, replace_file, write_new
from pjw.certs.identity import NameRules, identity_of, node_of
from pjw.certs.revocation import NOBODY_REVOKED, RevocationList, load_revocation_list
from pjw.errors import ConfigError, NotAuthenticatedError, describe_errno

REVOKED: Final = "revoked"
SERVER: Final = "server"
_SUFFIX: Final = ".crt"
_SERIAL_DIGITS: Final = 8
_ANY_NAME: Final = NameRules(in_common_name=True)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate in a directory, with its owner and its state."""

    path: str
    # `ca`, `server`, `node-` and the name of a node, or the name of a client
    name: str
    certificate: x509.Certificate
    pem: bytes
    revoked: bool

    def condition(self, now: datetime) -> str:
        """Describe its state in a few words: revoked, expired, ends in N days, or ok."""
        end = self.certificate.not_valid_after_utc
        if self.revoked:
            return "revoked"
        if now > end:
            return "expired"
        return f"ends in {(end - now).days} days" if ends_soon(end) else "ok"


def issued(directory: str, revoked: RevocationList = NOBODY_REVOKED) -> list[Issued]:
    """Return every certificate in a directory, by its file. Raises ConfigError for an unreadable one."""
    try:
        files = sorted(name for name in os.listdir(directory) if name.endswith(_SUFFIX))
    except OSError as error:
        raise ConfigError(f"cannot read directory {directory}: {describe_errno(error.errno or 0)}") from error
    found = []
    for file in files:
        path = os.path.join(directory, file)
        pem = read_certificates(path)
        try:
            certificate, *_ = parse_certificates(pem)
        except ValueError as error:
            raise ConfigError(f"cannot read certificate {path}: {error}") from error
        name = _name_of(file, pem, certificate)
        found.append(Issued(path, name, certificate, pem, certificate.serial_number in revoked.serials))
    return found


def listed(directory: str, list_path: str | None = None) -> Iterator[str]:
    """Yield the lines of a table of all certificates in a directory."""
    path = list_path or os.path.join(directory, REVOKED)
    revoked = load_revocation_list(path) if list_path or os.path.exists(path) else NOBODY_REVOKED
    now = datetime.now(UTC)
    rows = [("FILE", "FOR", "VALID UNTIL", "STATE", "SERIAL")]
    for each in issued(directory, revoked):
        whose = ", ".join(names_of(each.certificate)) or each.name
        end = describe_time(each.certificate.not_valid_after_utc)
        serial = f"{each.certificate.serial_number:X}"
        rows.append((os.path.basename(each.path), whose, end, each.condition(now), serial))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def renew(directory: str, names: Sequence[str], *, days: int = LEAF_DAYS) -> list[str]:
    """Make new certificates for the keys and names of servers, nodes or clients; return the new files' paths.

    The key stays, so a certificate and its key fit together at every moment. A client's bundle, if there is
    one, is made anew. Raises ConfigError before it writes anything.
    """
    authority = load_authority(directory)
    found = {each.path: each for each in issued(directory)}
    plans = []
    for name in dict.fromkeys(names):
        path = os.path.join(directory, name + _SUFFIX)
        if path not in found or name == "ca":
            raise ConfigError(
                f"cannot renew {name}: {directory} has no {name}{_SUFFIX} that this authority could make",
                hint="`pjwd certs list` shows the certificates; a new authority is a new directory",
            )
        bundle_path = os.path.join(directory, name + BUNDLE_SUFFIX)
        # read it before any change: else an unreadable bundle would keep the old certificate
        bundle = read_bundle(bundle_path) if os.path.lexists(bundle_path) else None
        pem = reissued(authority, found[path].certificate, days=days)
        plans.append((name, path, found[path], pem, bundle_path, bundle))
    made = []
    for name, path, old, pem, bundle_path, bundle in plans:
        kept = f"{name}.{old.certificate.serial_number:X}"[: len(name) + 1 + _SERIAL_DIGITS] + _SUFFIX
        # of a renewal that was interrupted it is there already
        if not any(each.certificate == old.certificate for each in found.values() if each is not old):
            write_new(directory, [NewFile(kept, old.pem, 0o644)])
        replace_file(path, pem)
        made.append(path)
        if bundle is not None:
            credentials = ClientCredentials(authority.crt_pem, pem, bundle.credentials.key_pem)
            replace_file(bundle_path, bundle_bytes(Bundle(bundle.server, credentials)))
            made.append(bundle_path)
    return made


def revoke(directory: str, names: Sequence[str], list_path: str | None = None) -> tuple[str, int]:
    """Add all certificates of these clients to a revocation list; return its path and the number of new ones.

    Raises ConfigError for a name without a certificate in the directory.
    """
    path = list_path or os.path.join(directory, REVOKED)
    known = load_revocation_list(path) if os.path.exists(path) else NOBODY_REVOKED
    lines = []
    for name in dict.fromkeys(names):
        own = [each for each in issued(directory, known) if each.name == name and name != "ca"]
        if not own:
            raise ConfigError(
                f"cannot revoke {name}: {directory} has no certificate of it",
                hint="`pjwd certs list` shows the certificates; for a certificate in another place:"
                f" openssl x509 -in FILE -noout -serial >>{path}",
            )
        for each in own:
            if not each.revoked:
                end = describe_time(each.certificate.not_valid_after_utc)
                lines.append(f"serial={each.certificate.serial_number:X} # {name}, valid until {end}\n")
    try:
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                lines[:0] = [] if file.read(1) == b"\n" else ["\n"]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {describe_errno(error.errno or 0)}") from error
    return path, len([line for line in lines if line != "\n"])


def _name_of(file: str, pem: bytes, certificate: x509.Certificate) -> str:
    if file == CA_CRT:
        return "ca"
    try:
        return NODE_FILE_PREFIX + node_of(pem)
    except NotAuthenticatedError:
        pass
    if is_of_server(certificate):
        return SERVER
    try:
        return identity_of(pem, _ANY_NAME).client_name
    except NotAuthenticatedError:
        return file.removesuffix(_SUFFIX)
