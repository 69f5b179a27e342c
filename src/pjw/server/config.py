"""The operator's configuration file (TOML). Every key, its meaning and default: docs/configuration.md."""

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from pjw.certs.identity import check_client_name_oid
from pjw.certs.profile import CLIENT_NAME_OID
from pjw.errors import ConfigError, InvalidJobError
from pjw.model import Limits
from pjw.server.authz import Roles
from pjw.server.quota import ClientLimits, Count
from pjw.worker.settings import NO_CEILING, UID_COUNT, UID_FIRST, WAITING_INITS, Retention, WorkerSettings

# What the system takes as a name, and the launcher as a path and a user id: it ends when it is told nonsense.
_Name = Annotated[str, msgspec.Meta(pattern=r"\A[^\0]+\Z")]
_Path = Annotated[str, msgspec.Meta(pattern=r"\A/[^\0]*\Z", max_length=4096)]
_UserId = Annotated[int, msgspec.Meta(ge=1, lt=2**32 - 1)]
# init takes 64, and the state directory, the server's key, this file and the audit log are among them
_HIDDEN_MAX = 60


class JobUsers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The range of user ids that clients are given, one each, never to another."""

    uid_first: _UserId = UID_FIRST
    uid_count: _UserId = UID_COUNT


class KeptJobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of ended jobs is kept: `worker.settings.Retention`, with the defaults of a service."""

    age_seconds: Count = 30 * 86_400
    jobs_per_client: Count = 100_000
    bytes_per_client: Count = 100 * 1024**3
    jobs_total: Count = 0
    bytes_total: Count = 0


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration file may hold."""

    user: _Name | None = None
    client_name_oid: str = CLIENT_NAME_OID
    stop_grace_seconds: float = 10
    waiting_inits: Annotated[int, msgspec.Meta(ge=0, le=1000)] = WAITING_INITS
    hidden_paths: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=_HIDDEN_MAX)] = ()
    revoked: _Path | None = None
    audit_log: _Path | None = None
    job_users: JobUsers = JobUsers()
    retention: KeptJobs = KeptJobs()
    roles: Roles = Roles()
    clients: ClientLimits = ClientLimits()
    limits: dict[str, int] = {}
    ceilings: dict[str, int] = {}

    def worker_settings(self, hidden_paths: tuple[str, ...]) -> WorkerSettings:
        """What the worker needs of it. Raises ConfigError."""
        check_client_name_oid(self.client_name_oid)
        if not 0 <= self.stop_grace_seconds <= 86_400:
            raise ConfigError("stop_grace_seconds must be from 0 to 86400")
        try:
            limits, ceiling = Limits().with_overrides(self.limits), NO_CEILING.with_overrides(self.ceilings)
        except InvalidJobError as error:
            raise ConfigError(str(error)) from None
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


def load_config(path: str | None) -> ServerConfig:
    """Read a configuration file; None is all defaults. Raises ConfigError that names file and key."""
    if path is None:
        return ServerConfig()
    try:
        return msgspec.convert(tomllib.loads(Path(path).read_text()), ServerConfig)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"the configuration {path} is not valid: {error}") from error
    # tomllib has its own error only for what it has thought of: not for a number of 5,000 digits, nor "[[[[…"
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the configuration {path}: it is not TOML: {error}") from error
