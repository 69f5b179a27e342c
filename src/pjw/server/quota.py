"""The limits of each client in the network process: starts a second, calls and followers at once.

Refusals are answered slowly. Else a client that asks in a loop would slow all others in spite of its limits,
since a refusal costs the server as much as a cheap answer.
"""

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from pjw.certs.profile import identity_fault
from pjw.errors import ConfigError, InvalidJobError, LimitReachedError
from pjw.model import LIMIT_MAXIMUM, WEIGHT_DEFAULT, WEIGHT_MAXIMUM, Share, Sums
from pjw.worker.settings import Quotas, Shares

# For how long a resting client may save up starts. A burst is a client that begins its work, not an attack.
STARTS_REST_SECONDS: Final = 10
# The refusals that one client gets, however many calls it makes at once: at 0.4 ms each, 4 % of a processor.
REFUSALS_PER_SECOND: Final = 100
# Refused calls of one client that wait for their turn, about 20 KiB each; a call above that is refused at
# once.
PAUSED_MAX: Final = 1000
# This call lasts as long as a stream: a client that waits for many jobs must still be able to ask for one.
# We count it apart, with the same bounds: `pjw logs` follows a job and also waits for it, to tell when the
# job is stuck.
WAITING_METHOD: Final = "Wait"
# the calls that make a process
_STARTING: Final = ("Start", "Exec", "Forward", "LoadImage")
# An answer with all of a client's has a megabyte then.
WORKSPACES_MAX: Final = 10_000
# Below so many, clients whose starts are all theirs again are not looked for.
FORGET_ABOVE: Final = 64

Count = Annotated[int, msgspec.Meta(ge=0, le=LIMIT_MAXIMUM)]


Weight = Annotated[int, msgspec.Meta(ge=1, le=WEIGHT_MAXIMUM)]


class NamedClient(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The weight and sums of one client, where they are not those of all."""

    weight: Annotated[
        Weight | None, msgspec.Meta(description="of its jobs together, against those of other clients")
    ] = None
    memory_max_bytes: Annotated[Count | None, msgspec.Meta(description="memory of its jobs together")] = None
    pids_max: Annotated[
        Count | None, msgspec.Meta(description="processes and threads of its jobs together")
    ] = None
    cpu_max_millicores: Annotated[
        Count | None, msgspec.Meta(description="thousandths of a processor of its jobs together")
    ] = None


class ClientLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits of each client; 0 is "no limit"."""

    starts_per_second: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1e6,
            description="jobs that a client may start a second; after a rest, ten times as many at once",
        ),
    ] = 100
    calls_max: Annotated[
        Count, msgspec.Meta(description="calls of a client under way at once, streams not counted")
    ] = 256
    followers_max: Annotated[
        Count,
        msgspec.Meta(description="streams of a client at once; and, apart, calls that wait for an end"),
    ] = 1000
    followers_total_max: Annotated[
        Count,
        msgspec.Meta(description="streams of all clients at once; and, apart, calls that wait for an end"),
    ] = 10_000
    running_max: Annotated[Count, msgspec.Meta(description="jobs of one client that have not ended")] = 1000
    running_total_max: Annotated[Count, msgspec.Meta(description="jobs that have not ended")] = 10_000
    stored_bytes_max: Annotated[
        Count,
        msgspec.Meta(
            description="bytes of output, artifacts, input, scratch, workspaces and images of one client"
        ),
    ] = 0
    stored_bytes_total_max: Annotated[
        Count,
        msgspec.Meta(
            description="bytes of output, artifacts, input, scratch, workspaces and images of all clients"
        ),
    ] = 0
    input_bytes_max: Annotated[Count, msgspec.Meta(description="bytes of input of one job")] = 10 * 1024**3
    queued_max: Annotated[Count, msgspec.Meta(description="jobs of one client in the queue")] = 100_000
    queued_total_max: Annotated[Count, msgspec.Meta(description="jobs of all clients in the queue")] = (
        1_000_000
    )
    queued_bytes_max: Annotated[
        Count, msgspec.Meta(description="bytes of commands and variables of one client's jobs in the queue")
    ] = 256 * 1024**2
    queued_bytes_total_max: Annotated[
        Count, msgspec.Meta(description="bytes of commands and variables of all jobs in the queue")
    ] = 1024**3
    workspaces_max: Annotated[
        int, msgspec.Meta(ge=0, le=WORKSPACES_MAX, description="workspaces of one client")
    ] = 100
    workspace_bytes_max: Annotated[
        Count,
        msgspec.Meta(
            description="bytes of one client's workspaces and images together; enforced where the file"
            " system of the state directory has project quotas, else no job may be started in one"
        ),
    ] = 0
    images_max: Annotated[
        int, msgspec.Meta(ge=0, le=WORKSPACES_MAX, description="images that one client has loaded")
    ] = 20
    calls_per_second: Annotated[
        float, msgspec.Meta(ge=0, le=1e6, description="calls that a client may begin a second; more wait")
    ] = 1000
    connections_max: Annotated[Count, msgspec.Meta(description="connections of a client at once")] = 64
    weight: Annotated[
        Weight, msgspec.Meta(description="of a client's jobs together, against those of other clients")
    ] = WEIGHT_DEFAULT
    memory_max_bytes: Annotated[Count, msgspec.Meta(description="memory of a client's jobs together")] = 0
    pids_max: Annotated[
        Count, msgspec.Meta(description="processes and threads of a client's jobs together")
    ] = 0
    cpu_max_millicores: Annotated[
        Count, msgspec.Meta(description="thousandths of a processor of a client's jobs together")
    ] = 0
    by_name: Annotated[
        dict[str, NamedClient],
        msgspec.Meta(description="other weights or sums for single clients, by their names"),
    ] = {}

    def __post_init__(self) -> None:
        for name in sorted(self.by_name):
            if fault := identity_fault(name):
                raise ValueError(fault)

    @property
    def starts_at_once(self) -> int:
        """The number of jobs that a client may start at once, after a rest."""
        return max(1, round(STARTS_REST_SECONDS * self.starts_per_second))

    def shares(self) -> Shares:
        """Return each client's part of the host. Raises ConfigError."""
        default = {name: getattr(self, name) for name in NamedClient.__struct_fields__}
        by_name = {}
        for client_name, named in self.by_name.items():
            own = {name: value for name, value in msgspec.structs.asdict(named).items() if value is not None}
            by_name[client_name] = _share(f"clients.by_name.{client_name}", {**default, **own})
        return Shares(_share("clients", default), by_name)

    def quotas(self) -> Quotas:
        """Return the quotas that the worker enforces."""
        return Quotas(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Quotas)})


class Quota:
    """Counts the calls of each client, and forgets a client that is like one that never came."""

    def __init__(self, limits: ClientLimits, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._limits = limits
        self._clock_ns: Final = clock_ns
        self._calls: Final[Counter[str]] = Counter()
        self._followers: Final[Counter[str]] = Counter()
        self._waiters: Final[Counter[str]] = Counter()
        self._paused: Final[Counter[str]] = Counter()
        # A token bucket is one number: when it is full again. Whole numbers, because many
        # small steps of a float do not add up to the burst.
        self._full_at: Final[dict[str, int]] = {}
        self._forget_above = FORGET_ABOVE

    def set_limits(self, limits: ClientLimits) -> None:
        """Apply these limits from now on; a client keeps the calls that it has already."""
        self._limits = limits

    def call(self, client_name: str, method: str, *, stream: bool) -> "_Counted":
        """Count a call for as long as it lasts. Raises LimitReachedError at a limit, when its turn comes.

        An error of that kind from the call itself waits for its turn too: at a limit of running jobs, for
        example.
        """
        return _Counted(self, client_name, method, stream=stream)

    def take(self, client_name: str, method: str, *, stream: bool) -> Counter[str]:
        """Count a call; where. Raises LimitReachedError at a limit."""
        if stream:
            counter = self._followers
            refusal = self._lasting_refusal(client_name, counter, "follow", "followed")
            if refusal is None:
                refusal = self._start_refusal(client_name, method)
        elif method == WAITING_METHOD:
            counter = self._waiters
            refusal = self._lasting_refusal(client_name, counter, "wait for", "waited for")
        else:
            counter, refusal = self._calls, self._refusal(client_name, method)
        if refusal is not None:
            raise refusal
        counter[client_name] += 1
        return counter

    async def pause(self, client_name: str) -> None:
        """Wait until it is the turn of a refused call to be answered."""
        if self._paused[client_name] < PAUSED_MAX:
            self._paused[client_name] += 1
            try:
                await asyncio.sleep(self._paused[client_name] / REFUSALS_PER_SECOND)
            finally:
                _give_back(self._paused, client_name)

    def _lasting_refusal(
        self, client_name: str, counter: Counter[str], verb: str, participle: str
    ) -> LimitReachedError | None:
        each, total = self._limits.followers_max, self._limits.followers_total_max
        if each and counter[client_name] >= each:
            return _refusal("followers_max", f"a client may {verb} {each} jobs at once", each)
        if total and counter.total() >= total:
            return _refusal(
                "followers_total_max", f"{total} jobs may be {participle} at once on this server", total
            )
        return None

    def _refusal(self, client_name: str, method: str) -> LimitReachedError | None:
        limits = self._limits
        if limits.calls_max and self._calls[client_name] >= limits.calls_max:
            return _refusal(
                "calls_max",
                f"a client may have {limits.calls_max} calls under way at once",
                limits.calls_max,
            )
        return self._start_refusal(client_name, method)

    def _start_refusal(self, client_name: str, method: str) -> LimitReachedError | None:
        limits = self._limits
        if method in _STARTING and limits.starts_per_second and not self._take_start(client_name):
            rate, burst = limits.starts_per_second, limits.starts_at_once
            return _refusal(
                "starts_per_second", f"a client may start {rate:g} jobs a second, and {burst} after a rest"
            )
        return None

    def _take_start(self, client_name: str) -> bool:
        now = self._clock_ns()
        step = round(1e9 / self._limits.starts_per_second)
        full_at = max(now, self._full_at.get(client_name, 0)) + step
        if full_at - now > self._limits.starts_at_once * step:
            return False
        self._full_at[client_name] = full_at
        if len(self._full_at) > self._forget_above:
            for name in [name for name, full in self._full_at.items() if full <= now]:
                del self._full_at[name]
            # doubled, so that the clients that came since the last look pay for the next one
            self._forget_above = max(FORGET_ABOVE, 2 * len(self._full_at))
        return True


def _share(table: str, values: dict[str, int]) -> Share:
    try:
        return Share(values.pop("weight"), Sums(**values))
    except InvalidJobError as error:
        raise ConfigError(f"[{table}]: {error}") from None


class _Counted:
    """A call, as an asynchronous context manager: one for each call, so it has no generator."""

    __slots__ = ("_client_name", "_counter", "_method", "_quota", "_stream")

    def __init__(self, quota: Quota, client_name: str, method: str, *, stream: bool) -> None:
        self._quota: Final = quota
        self._client_name: Final = client_name
        self._method: Final = method
        self._stream: Final = stream
        self._counter: Counter[str] | None = None

    async def __aenter__(self) -> None:
        try:
            self._counter = self._quota.take(self._client_name, self._method, stream=self._stream)
        except LimitReachedError:
            await self._quota.pause(self._client_name)
            raise

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        assert self._counter is not None
        _give_back(self._counter, self._client_name)
        if isinstance(error, LimitReachedError):
            await self._quota.pause(self._client_name)


def _give_back(counter: Counter[str], client_name: str) -> None:
    counter[client_name] -= 1
    if not counter[client_name]:
        del counter[client_name]


def _refusal(limit: str, words: str, most: int | None = None) -> LimitReachedError:
    return LimitReachedError(
        words, hint=f"try again later, or ask the operator for more (clients.{limit})", limit=limit, most=most
    )
