"""Names on the network: the operator's offers to each client."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pjw.errors import ConfigError, InvalidJobError
from pjw.network import Allowed, is_offered

# the number of offers in the hint for a client that asks for another name
_SHOWN_MAX: Final = 10


@dataclass(frozen=True, slots=True)
class Network:
    """The names that jobs may reach: `hosts` of every client, and more of some.

    `private` are ranges of addresses that are no host's on the internet and may be reached all the same.
    `uid` is the user of pjwd-egress; 0: there is none.
    """

    hosts: Sequence[str] = ()
    by_name: Mapping[str, Sequence[str]] = field(default_factory=dict)
    private: Sequence[str] = ()
    uid: int = 0
    connections_max: int = 64
    connections_total_max: int = 1024

    def __post_init__(self) -> None:
        try:
            for offered in (self.hosts, *self.by_name.values()):
                for each in offered:
                    Allowed.of(each)
        except InvalidJobError as error:
            raise ConfigError(f"[network]: {error}", hint=error.hint) from None

    @property
    def offered(self) -> tuple[str, ...]:
        """All names that are offered to any client."""
        return tuple(dict.fromkeys((*self.hosts, *(host for own in self.by_name.values() for host in own))))

    def withdrawn(self, client_name: str, allow: Sequence[str]) -> tuple[str, ...]:
        """Return a job's names that are not offered to its client, or not any more."""
        offered = list(map(Allowed.of, self._offers(client_name) if allow else ()))
        return tuple(name for name in allow if not is_offered(Allowed.of(name), offered))

    def _offers(self, client_name: str) -> tuple[str, ...]:
        return (*self.hosts, *self.by_name.get(client_name, ()))

    def require(self, client_name: str, allow: Sequence[str]) -> None:
        """Check that all names are offered to a client. Raises InvalidJobError."""
        offers = self._offers(client_name)
        for name in self.withdrawn(client_name, allow):
            more = ", and more" if len(offers) > _SHOWN_MAX else ""
            hint = f"it offers {', '.join(offers[:_SHOWN_MAX])}{more}" if offers else "it offers no name"
            raise InvalidJobError(
                f"cannot allow {name}: this server does not offer it to {client_name}",
                hint=f"{hint}; the operator decides ([network] in the configuration)",
            )
