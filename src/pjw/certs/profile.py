"""The certificates that pjw accepts, and the rule for a client's name. Standard library only."""

import re
from typing import Final

# The arc for anyone's own identifiers that are made of a UUID (here 200835ef-df1e-4585-
# a327-20bf501408a0), as Microsoft documents it. Not 2.25.UUID: its 128-bit arc is more
# than Go's crypto/x509 reads, and such a client could not load its own certificate.
CLIENT_NAME_OID: Final = "1.2.840.113556.1.8000.2554.8200.13807.57118.17797.41767.2146128.1312928"
# OpenSSL drops an attribute that it does not know. Where its slash is taken for a part of
# the CN (in `-subj` with a backslash, or typed at the prompt) the name comes behind this.
CLIENT_NAME_TAIL: Final = "/clientName="

# Names that are made of a key begin with this, so no other name may: a client that a CA could call
# "key-1234…" would own the jobs of that key.
KEY_NAME_PREFIX: Final = "key-"
KEY_NAME_HEX_DIGITS: Final = 32
# length of a name that earlier versions made of a key; its client keeps it
SHORT_KEY_NAME_HEX_DIGITS: Final = 16
SHORT_KEY_NAME_PATTERN: Final = re.compile(f"{KEY_NAME_PREFIX}[0-9a-f]{{{SHORT_KEY_NAME_HEX_DIGITS}}}")
KEY_NAME_PATTERN: Final = re.compile(f"{KEY_NAME_PREFIX}[0-9a-f]{{{KEY_NAME_HEX_DIGITS}}}")

NAME_MAX_CHARACTERS: Final = 64
# ASCII alone: no two names may look alike. No "/" and no leading ".", because a name
# becomes part of a path; no space and no control character, because it is logged.
NAME_PATTERN: Final = re.compile(f"[A-Za-z0-9][A-Za-z0-9._@+-]{{0,{NAME_MAX_CHARACTERS - 1}}}")
NAME_RULE: Final = f"1 to {NAME_MAX_CHARACTERS} of A-Z a-z 0-9 . _ @ + -, the first a letter or a digit"

# A certificate with this URI among its names is that of a node of a cluster. A client whose name is n1 is no
# node for that.
NODE_URI_PREFIX: Final = "pjw:node:"
# And the host name under which a gateway reaches that node, whatever its address: TLS itself makes sure that
# no other host answers. The name is never looked up.
NODE_HOST_SUFFIX: Final = ".node.pjw.internal"
# a label of a host name
NODE_NAME_MAX_CHARACTERS: Final = 40
NODE_NAME_PATTERN: Final = re.compile(f"[a-z0-9]([a-z0-9-]{{0,{NODE_NAME_MAX_CHARACTERS - 2}}}[a-z0-9])?")
NODE_NAME_RULE: Final = (
    f"1 to {NODE_NAME_MAX_CHARACTERS} of a-z 0-9 -, the first and the last a letter or a digit"
)

RSA_MIN_BITS: Final = 2048
SIGNATURE_HASHES: Final = frozenset({"sha256", "sha384", "sha512"})

QUOTED_MAX_CHARACTERS: Final = 80


def name_fault(name: str) -> str | None:
    """Return why *name* cannot be a client's name; None when it can."""
    if not NAME_PATTERN.fullmatch(name):
        return f"{quoted(name)} is no client name ({NAME_RULE})"
    if name.lower().startswith(KEY_NAME_PREFIX):
        return f"{quoted(name)} is no client name (only names made of a key begin with {KEY_NAME_PREFIX})"
    return None


def node_name_fault(name: str) -> str | None:
    """Return why *name* cannot be a node's name; None when it can."""
    return (
        None
        if NODE_NAME_PATTERN.fullmatch(name)
        else f"{quoted(name)} is no name of a node ({NODE_NAME_RULE})"
    )


def identity_fault(name: str) -> str | None:
    """Return why no client can have this *name*: as `name_fault`, but names made of keys are valid."""
    made_of_a_key = KEY_NAME_PATTERN.fullmatch(name) or is_short_key_name(name)
    return None if made_of_a_key else name_fault(name)


def is_short_key_name(name: str) -> bool:
    """Return whether an earlier version made *name* of a key."""
    return SHORT_KEY_NAME_PATTERN.fullmatch(name) is not None


def quoted(text: str) -> str:
    """Return *text* in quotes, escaped to printable ASCII, in at most 80 characters."""
    # cut before escaping too: the text may be 64 KiB long
    escaped = ascii(text[:QUOTED_MAX_CHARACTERS])
    if len(text) <= QUOTED_MAX_CHARACTERS and len(escaped) <= QUOTED_MAX_CHARACTERS:
        return escaped
    return escaped[: QUOTED_MAX_CHARACTERS - 3] + "..."
