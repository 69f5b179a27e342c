"""The operator's configuration: a TOML file, and the options of pjwd, which go before it.

Each key says what it is in its own description, once: `pjwd config show` and the documentation take it
from there.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from pjw.certs.identity import check_client_name_oid
from pjw.certs.profile import CLIENT_NAME_OID
from pjw.errors import ConfigError, InvalidJobError
from pjw.model import Limits
from pjw.server.authz import Roles
from pjw.server.quota import ClientLimits, Count
from pjw.worker.settings import NO_CEILING, UID_COUNT, UID_FIRST, WAITING_INITS, Retention, WorkerSettings

# What the system takes as a name, and the launcher as a path and a user id: it ends when it is told nonsense.
_Name = Annotated[str, Meta(pattern=r"\A[^\0]+\Z")]
_Path = Annotated[str, Meta(pattern=r"\A/[^\0]*\Z", max_length=4096)]
_Address = Annotated[str, Meta(max_length=300)]
_UserId = Annotated[int, Meta(ge=1, lt=2**32 - 1)]
# init takes 64, and the state directory, the server's key, this file and the audit log are among them
_HIDDEN_MAX = 60

# What a running pjwd takes from a file that has changed. The rest is what the launcher was told as its
# policy, what was opened as root, and where is listened: all of that is done once.
RELOADED: Final = ("clients", "limits", "log_level", "retention", "roles", "stop_grace_seconds")


class JobUsers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The range of user ids that clients are given, one each, never to another."""

    uid_first: Annotated[_UserId, Meta(description="the first user id for jobs")] = UID_FIRST
    uid_count: Annotated[_UserId, Meta(description="how many there are: one for each client")] = UID_COUNT


class KeptJobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of ended jobs is kept: `worker.settings.Retention`, with the defaults of a service."""

    age_seconds: Annotated[Count, Meta(description="an ended job is removed after so long")] = 30 * 86_400
    jobs_per_client: Annotated[Count, Meta(description="ended jobs of one client")] = 100_000
    bytes_per_client: Annotated[
        Count, Meta(description="bytes of output that the ended jobs of one client have")
    ] = 100 * 1024**3
    jobs_total: Annotated[Count, Meta(description="ended jobs of all clients")] = 0
    bytes_total: Annotated[Count, Meta(description="bytes of output that all ended jobs have")] = 0


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is told to a Prometheus, without TLS: docs/monitoring.md."""

    listen: Annotated[
        _Address | None,
        Meta(description="HOST:PORT where metrics can be had by HTTP, for example 127.0.0.1:9464"),
    ] = None
    allow_remote: Annotated[
        bool, Meta(description="whether that may be an address that other hosts reach")
    ] = False
    clients_max: Annotated[
        int,
        Meta(
            ge=0, le=1000, description="clients that have metrics of their own, the busiest; the rest are one"
        ),
    ] = 20


class Traces(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is told to an OpenTelemetry collector: docs/monitoring.md."""

    endpoint: Annotated[
        _Address | None,
        Meta(description="the URL of who takes spans by OTLP over gRPC, for example http://127.0.0.1:4317"),
    ] = None


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration file may hold."""

    listen: Annotated[_Address, Meta(description="HOST:PORT of the service; port 0 is any free one")] = (
        "localhost:50051"
    )
    ca_crt: Annotated[_Path | None, Meta(description="the authority whose clients are let in")] = None
    server_crt: Annotated[_Path | None, Meta(description="the server's certificate")] = None
    server_key: Annotated[_Path | None, Meta(description="its private key")] = None
    state_dir: Annotated[_Path, Meta(description="jobs and their output")] = "/var/lib/pjw"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what is logged, from this level on")
    ] = "warning"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="lines for people, or an object of JSON in each")
    ] = "text"
    user: Annotated[
        _Name | None,
        Meta(description="whom the network process becomes, never root; without it pjw, or nobody"),
    ] = None
    client_name_oid: Annotated[
        str, Meta(description="the attribute of a certificate's subject that holds the client's name")
    ] = CLIENT_NAME_OID
    stop_grace_seconds: Annotated[
        float, Meta(description="from SIGTERM to SIGKILL when a job is stopped")
    ] = 10
    waiting_inits: Annotated[
        int, Meta(ge=0, le=1000, description="inits that are kept ready for the next jobs")
    ] = WAITING_INITS
    hidden_paths: Annotated[
        tuple[_Path, ...], Meta(max_length=_HIDDEN_MAX, description="files and directories that no job sees")
    ] = ()
    revoked: Annotated[_Path | None, Meta(description="the list of certificates that are not let in")] = None
    audit_log: Annotated[_Path | None, Meta(description="a file that gets a line of JSON for each call")] = (
        None
    )
    job_users: JobUsers = JobUsers()
    retention: KeptJobs = KeptJobs()
    roles: Roles = Roles()
    clients: ClientLimits = ClientLimits()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    limits: Annotated[
        dict[str, int], Meta(description="what a job gets when its client asks for nothing")
    ] = {}
    ceilings: Annotated[dict[str, int], Meta(description="what a client may ask for at most")] = {}

    def worker_settings(self, hidden_paths: tuple[str, ...]) -> WorkerSettings:
        """What the worker needs of it. Raises ConfigError."""
        check_client_name_oid(self.client_name_oid)
        if not 0 <= self.stop_grace_seconds <= 86_400:
            raise ConfigError("stop_grace_seconds must be from 0 to 86400")
        limits, ceiling = self.effective_limits()
        return WorkerSettings(
            default_limits=limits,
            ceiling=ceiling,
            uid_first=self.job_users.uid_first,
            uid_count=self.job_users.uid_count,
            hidden_paths=(*self.hidden_paths, *hidden_paths),
            stop_grace_seconds=self.stop_grace_seconds,
            waiting_inits=self.waiting_inits,
            retention=Retention(**msgspec.structs.asdict(self.retention)),
            quotas=self.clients.quotas(),
        )

    def effective_limits(self) -> tuple[Limits, Limits]:
        """The limits of a job whose client asks for nothing, and what it may ask for. Raises ConfigError."""
        try:
            return Limits().with_overrides(self.limits), NO_CEILING.with_overrides(self.ceilings)
        except InvalidJobError as error:
            raise ConfigError(str(error)) from None


def load_config(path: str | None, options: Mapping[str, object] | None = None) -> ServerConfig:
    """Read a configuration file; None is all defaults. Raises ConfigError that names file and key.

    *options* are keys from the command line, which go before those of the file.
    """
    return config_of(path, read_values(path), options)


def config_of(
    path: str | None, values: Mapping[str, object], options: Mapping[str, object] | None = None
) -> ServerConfig:
    """Judge what a file, by its path, and the command line say. Raises ConfigError."""
    try:
        return msgspec.convert({**values, **(options or {})}, ServerConfig)
    except msgspec.ValidationError as error:
        named = f"configuration {path}" if path else "configuration"
        raise ConfigError(f"the {named} is not valid: {error}") from error


def read_values(path: str | None) -> dict[str, object]:
    """What a configuration file says, unjudged; None says nothing. Raises ConfigError."""
    if path is None:
        return {}
    try:
        return parse_values(path, Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error


def parse_values(path: str, data: bytes) -> dict[str, object]:
    """What the bytes of a configuration file say. Raises ConfigError."""
    try:
        return tomllib.loads(data.decode())
    # tomllib has its own error only for what it has thought of: not for a number of 5,000 digits, nor "[[[[…"
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the configuration {path}: it is not TOML: {error}") from error
