"""The address of a server, as a person writes it. Standard library only."""

import re
from typing import Final

from pjw.errors import ConfigError
from pjw.given import require_value

DEFAULT_PORT: Final = 50051
# the default address: pjwd listens there, and clients connect to it
DEFAULT_ADDRESS: Final = f"localhost:{DEFAULT_PORT}"
# a name, an address of IPv4, or one of IPv6 in brackets, with its zone (fe80::1%eth0)
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?", re.ASCII)


def server_address(text: str) -> str:
    """Return HOST:PORT for an address that may lack its port. Raises ConfigError."""
    found = _ADDRESS.fullmatch(require_value("the address of the server", text))
    if found is None or not 0 < int(found[2] or DEFAULT_PORT) < 65_536:
        raise ConfigError(f"{text[:80]!r} is no server's HOST:PORT", hint=_hint(text))
    return f"{found[1]}:{found[2] or DEFAULT_PORT}"


def host_of(address: str) -> str:
    """Return the host of HOST:PORT, without brackets."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def _hint(text: str) -> str:
    if "://" in text:
        return f"leave out {text.partition('://')[0][:20]}://"
    if text.count(":") > 1 and "[" not in text:
        return f"an address of IPv6 is in brackets: [::1]:{DEFAULT_PORT}"
    return f"for example jobs.example.org:{DEFAULT_PORT}, or jobs.example.org for the port {DEFAULT_PORT}"
