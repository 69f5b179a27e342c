"""The operator's configuration: a TOML file, and the options of pjwd, which take precedence.

Each key has its own description, once: `pjwd config show` and the documentation take it from there.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, get_type_hints

import msgspec
from msgspec import Meta

from pjw.certs.identity import NameRules, check_client_name_oid
from pjw.certs.profile import CLIENT_NAME_OID, identity_fault
from pjw.errors import ConfigError, InvalidJobError
from pjw.given import DEFAULT_ADDRESS, require_values
from pjw.model import CDI_DIRS_MAX, OFFERED_MAX, GpuOffer, Limits, MountSource, Sums
from pjw.server.authz import Roles
from pjw.server.connections import PortLimits
from pjw.server.network import NetworkOffers
from pjw.server.quota import ClientLimits, Count
from pjw.worker.host import default_ceiling, default_sums
from pjw.worker.settings import (
    FLOOR,
    UID_COUNT,
    WAITING_INITS,
    DiskMarks,
    QueueSlots,
    Retention,
    WorkerSettings,
)

# The values that the system takes as a name, and the launcher as a path or user id: it ends at invalid ones.
_Name = Annotated[str, Meta(pattern=r"\A[^\0]+\Z")]
_Path = Annotated[str, Meta(pattern=r"\A/[^\0]*\Z", max_length=4096)]
_Address = Annotated[str, Meta(max_length=300)]
_UserId = Annotated[int, Meta(ge=1, lt=2**32 - 1)]
# of partitions and accounts of Slurm
_SlurmName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.-]{1,60}\Z")]
# where pjw-hold finds the pjwd of its node
HOLD_SOCKET: Final = "/run/pjw/hold.sock"
# init takes 64, and the directories of state and scratch, the server's key, this file and the audit log are
# among them
_HIDDEN_MAX = 59
# of the 128 places that init takes, which are the mounts in these
_VISIBLE_MAX = 60

# The settings that a running pjwd takes from a changed file. The others are the launcher's policy, the files
# opened as root, and the listening addresses: all of these are set once.
RELOADED: Final = (
    "allowed_clients",
    "clients",
    "default_image",
    "disk",
    "limits",
    "log_level",
    "memory_overcommit",
    "mounts",
    "queue",
    "retention",
    "roles",
    "stop_grace_seconds",
)


# Keys and tables that pjwd no longer has, each with the present behaviour. pjwd ignores such a key and warns
# of it, since after an upgrade it must start with the old file. The next minor version refuses it as unknown.
REMOVED_IN: Final = "0.1.0"
REMOVED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "clients.calls_burst": "a client may begin 200 calls at once, whatever its rate",
        "clients.starts_burst": "after a rest a client may start ten times starts_per_second jobs at once",
        "metrics.allow_remote": "an address in metrics.listen that other hosts reach needs no second key",
        "metrics.clients_max": "the 100 busiest clients have their own metrics",
        "traces": "the audit log has a line for each call",
    }
)

# The default names of a service's files, in the directory of its configuration.
CERTIFICATE_FILES: Final = {"ca_crt": "ca.crt", "server_crt": "server.crt", "server_key": "server.key"}


class JobUsers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The range of user ids that clients are given, one each, never to another."""

    uid_first: Annotated[
        _UserId | None,
        Meta(description="the first user id for jobs; without it the state directory has its own range"),
    ] = None
    uid_count: Annotated[_UserId, Meta(description="how many there are: one for each client")] = UID_COUNT


class KeptJobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bounds on ended jobs that are kept: `worker.settings.Retention`, with the defaults of a service."""

    age_seconds: Annotated[Count, Meta(description="an ended job is removed after this time")] = 30 * 86_400
    jobs_per_client: Annotated[Count, Meta(description="ended jobs of one client")] = 100_000
    bytes_per_client: Annotated[
        Count, Meta(description="bytes of output that the ended jobs of one client have")
    ] = 100 * 1024**3
    jobs_total: Annotated[Count, Meta(description="ended jobs of all clients")] = 0
    bytes_total: Annotated[Count, Meta(description="bytes of output that all ended jobs have")] = 0
    workspace_age_seconds: Annotated[
        Count, Meta(description="a workspace is removed when no job has used it for this time; 0: never")
    ] = 0
    image_age_seconds: Annotated[
        Count, Meta(description="a client's image is removed when no job had it for this time")
    ] = 0


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that all jobs may use together. A missing number is a part of this host's (worker/host.py)."""

    memory_max_bytes: Annotated[
        Count | None, Meta(description="memory of all jobs together; without it four fifths of the host's")
    ] = None
    pids_max: Annotated[
        Count | None,
        Meta(
            description="processes and threads of all jobs; without it four fifths of what the host can have"
        ),
    ] = None
    cpu_max_millicores: Annotated[
        Count | None,
        Meta(description="thousandths of a processor of all jobs; without it nine tenths of all processors"),
    ] = None

    def sums(self) -> Sums:
        """Return the numbers that take effect. Raises ConfigError."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        try:
            return replace(default_sums(), **given)
        except InvalidJobError as error:
            raise ConfigError(f"[host]: {error}") from None


class QueueSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that jobs out of the queue may have at once: `worker.settings.QueueSlots`. 0 is "no limit"."""

    running_max: Annotated[Count, Meta(description="jobs out of the queue that run at once")] = 0
    cpu_max_millicores: Annotated[
        Count | None,
        Meta(
            description="thousandths of a processor that their limits come to; without it all of the host's"
        ),
    ] = None
    memory_max_bytes: Annotated[
        Count | None, Meta(description="memory that their limits come to; without it what all jobs may have")
    ] = None
    client_running_max: Annotated[Count, Meta(description="the same of one client: jobs that run")] = 0
    client_cpu_max_millicores: Annotated[
        Count, Meta(description="the same of one client: thousandths of a processor")
    ] = 0
    client_memory_max_bytes: Annotated[Count, Meta(description="the same of one client: memory")] = 0


class ScratchLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that a job may have in its scratch directory."""

    bytes_max: Annotated[
        Count, Meta(description="bytes of a job's scratch, by a project quota of its file system")
    ] = 0
    inodes_max: Annotated[Count, Meta(description="inodes of a job's scratch, likewise")] = 0


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The space that stays free of each file system that jobs write to: `worker.settings.DiskMarks`."""

    free_bytes_min: Annotated[
        Count | None,
        Meta(
            description="when fewer bytes are free, pjwd ends a job with much scratch; without it a twentieth"
        ),
    ] = None
    free_inodes_min: Annotated[
        Count | None,
        Meta(description="the same when fewer inodes are free; without it a twentieth"),
    ] = None


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gateway that this pjwd is a node of: docs/cluster.md."""

    gateway: Annotated[
        _Address | None,
        Meta(description="HOST:PORT of the gateway whose node this pjwd is; without it, it is no node"),
    ] = None
    address: Annotated[
        _Address | None,
        Meta(description="HOST:PORT where the gateway reaches this pjwd; without it what `listen` says"),
    ] = None
    hold_user: Annotated[
        _Name | None,
        Meta(description="the user that runs pjw-hold here for Slurm; without it none may connect"),
    ] = None
    hold_socket: Annotated[_Path, Meta(description="the socket where pjw-hold finds this pjwd")] = HOLD_SOCKET


class GatewaySlurm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a gateway with the engine `slurm` calls Slurm, and what it asks it for: docs/cluster.md."""

    bin: Annotated[_Path, Meta(description="the directory of sbatch, scancel, squeue and sinfo")] = "/usr/bin"
    conf: Annotated[
        _Path | None, Meta(description="the path of slurm.conf; without it where Slurm itself looks for it")
    ] = None
    partition: Annotated[
        _SlurmName | None,
        Meta(description="the partition of jobs that name none; without it Slurm's default"),
    ] = None
    account: Annotated[
        _SlurmName | None,
        Meta(description="the account of all jobs; without it the default of the gateway's user"),
    ] = None
    partitions: Annotated[
        tuple[str, ...],
        Meta(description="the partitions that jobs may name (--partition); * is any characters"),
    ] = ()
    constraints: Annotated[
        tuple[str, ...],
        Meta(description="the features of nodes that jobs may name (--constraint); * is any characters"),
    ] = ()
    hold: Annotated[_Path, Meta(description="the path of pjw-hold on the nodes")] = "/usr/lib/pjw/pjw-hold"
    socket: Annotated[
        _Path, Meta(description="where pjwd listens on the nodes for holds (cluster.hold_socket)")
    ] = HOLD_SOCKET
    warm_seconds: Annotated[
        float,
        Meta(
            ge=0, le=86_400, description="how long a place waits for the next job before Slurm gets it back"
        ),
    ] = 30
    hold_max_seconds: Annotated[
        int,
        Meta(
            ge=60,
            le=604_800,
            description="a place gets no more jobs when it is so old, so that others have a turn",
        ),
    ] = 3600


class Gateway(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The additional settings of `pjwd gateway`: docs/cluster.md."""

    crt: Annotated[
        _Path | None,
        Meta(
            description="the certificate of a client, by which the gateway calls its nodes (roles.gateways)"
        ),
    ] = None
    key: Annotated[_Path | None, Meta(description="its private key")] = None
    engine: Annotated[
        Literal["pool", "slurm"],
        Meta(description="what decides which node gets a job: `pool`, the first with room, or `slurm`"),
    ] = "pool"
    heartbeat_seconds: Annotated[
        float, Meta(ge=0.1, le=60, description="how often a node says that it is there")
    ] = 5
    choose_node: Annotated[
        tuple[str, ...],
        Meta(
            description="who may choose a job's node (--node): names of clients, in which * is any characters"
        ),
    ] = ()
    archive: Annotated[
        _Path | None,
        Meta(
            description="a directory for copies of ended jobs' output; without it the nodes alone have that"
        ),
    ] = None
    lost_after_seconds: Annotated[
        float, Meta(ge=1, le=86_400, description="a node that is silent for this time has lost its jobs")
    ] = 60
    # last, so that its keys come behind those of [gateway] in a file
    slurm: GatewaySlurm = GatewaySlurm()


class OfferedMount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory of the host that jobs may ask for by its name."""

    path: Annotated[_Path, Meta(description="the directory, without a link in its path")]
    read_only: Annotated[bool, Meta(description="whether jobs can only read it")] = True
    clients: Annotated[
        tuple[str, ...], Meta(description="whose jobs may have it: names, in which * is any characters")
    ] = ("*",)


class OfferedGpus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GPUs, or other devices of one kind, that jobs may ask for: docs/gpus.md."""

    kind: Annotated[
        str | None, Meta(description="which devices of CDI files are GPUs, such as nvidia.com/gpu")
    ] = None
    cdi_dirs: Annotated[
        tuple[_Path, ...],
        Meta(max_length=CDI_DIRS_MAX, description="directories of CDI files; a later one takes precedence"),
    ] = ("/etc/cdi", "/var/run/cdi")
    clients: Annotated[
        tuple[str, ...], Meta(description="whose jobs may have them: names, in which * is any characters")
    ] = ("*",)


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metrics for a Prometheus, without TLS: docs/monitoring.md."""

    listen: Annotated[
        _Address | None,
        Meta(description="HOST:PORT where metrics can be had by HTTP, for example 127.0.0.1:9464"),
    ] = None


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of a configuration file."""

    listen: Annotated[_Address, Meta(description="HOST:PORT of the service; port 0 is any free one")] = (
        DEFAULT_ADDRESS
    )
    ca_crt: Annotated[
        _Path | None,
        Meta(description="the authority whose clients pjwd admits; without it ca.crt next to this file"),
    ] = None
    server_crt: Annotated[
        _Path | None, Meta(description="the server's certificate; without it server.crt next to this file")
    ] = None
    server_key: Annotated[
        _Path | None, Meta(description="its private key; without it server.key next to this file")
    ] = None
    state_dir: Annotated[_Path, Meta(description="jobs and their output")] = "/var/lib/pjw"
    scratch_dir: Annotated[
        _Path | None,
        Meta(description="where jobs have their scratch directories; without it in the state directory"),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="what is logged, from this level on")
    ] = "warning"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="lines for people, or an object of JSON in each")
    ] = "text"
    user: Annotated[
        _Name | None,
        Meta(description="the account of the network process, never root; without it pjw, or nobody"),
    ] = None
    client_name_oid: Annotated[
        str, Meta(description="the attribute of a certificate's subject that holds the client's name")
    ] = CLIENT_NAME_OID
    client_name_in_cn: Annotated[
        bool,
        Meta(
            description="whether a client's name may stand behind /clientName= in the CN of its certificate"
        ),
    ] = False
    allowed_clients: Annotated[
        frozenset[str] | None,
        Meta(description="the names of the only clients that are let in; without it all of the authority's"),
    ] = None
    stop_grace_seconds: Annotated[
        float, Meta(description="from SIGTERM to SIGKILL when a job is stopped")
    ] = 10
    waiting_inits: Annotated[
        int, Meta(ge=0, le=1000, description="inits that are kept ready for the next jobs")
    ] = WAITING_INITS
    memory_overcommit: Annotated[
        float,
        Meta(
            ge=0,
            le=1_000_000,
            description="how many times the sum of memory running jobs' limits may come to; 0: any",
        ),
    ] = 0
    hidden_paths: Annotated[
        tuple[_Path, ...], Meta(max_length=_HIDDEN_MAX, description="files and directories that no job sees")
    ] = ()
    visible_paths: Annotated[
        tuple[_Path, ...],
        Meta(
            max_length=_VISIBLE_MAX,
            description="directories that jobs see besides /, /usr, /etc and /opt, with the mounts in them",
        ),
    ] = ()
    default_image: Annotated[
        _Name | None,
        Meta(description="the image of a job that names none; without it such a job sees the host's files"),
    ] = None
    revoked: Annotated[_Path | None, Meta(description="the list of certificates that are not let in")] = None
    audit_log: Annotated[_Path | None, Meta(description="a file that gets a line of JSON for each call")] = (
        None
    )
    mounts: Annotated[
        dict[str, OfferedMount],
        Meta(
            max_length=OFFERED_MAX,
            description="directories that jobs may ask for by these names: path, read_only, clients",
        ),
    ] = {}
    gpus: OfferedGpus = OfferedGpus()
    job_users: JobUsers = JobUsers()
    retention: KeptJobs = KeptJobs()
    roles: Roles = Roles()
    clients: ClientLimits = ClientLimits()
    port: PortLimits = PortLimits()
    host: Host = Host()
    disk: Disk = Disk()
    queue: QueueSection = QueueSection()
    scratch: ScratchLimits = ScratchLimits()
    network: NetworkOffers = NetworkOffers()
    metrics: Metrics = Metrics()
    cluster: Cluster = Cluster()
    gateway: Gateway = Gateway()
    limits: Annotated[
        dict[str, int], Meta(description="what a job gets when its client asks for nothing")
    ] = {}
    ceilings: Annotated[dict[str, int], Meta(description="the most that a client may ask for")] = {}
    floors: Annotated[
        dict[str, int], Meta(description="the least that a client may ask for, if it asks for a limit")
    ] = {}

    def __post_init__(self) -> None:
        for name in sorted(self.allowed_clients or ()):
            if fault := identity_fault(name):
                raise ValueError(fault)

    @property
    def let_in(self) -> frozenset[str] | None:
        """The only clients that are let in; None is all. A node lets its gateways in by default."""
        if self.allowed_clients is None and self.cluster.gateway is not None:
            return self.roles.gateways
        return self.allowed_clients

    def name_rules(self, short_names: frozenset[str]) -> NameRules:
        """Return the rules for clients' names; *short_names*, of 64 bits, are an older version's."""
        return NameRules(self.client_name_oid, self.client_name_in_cn, short_names)

    def worker_settings(self, hidden_paths: tuple[str, ...]) -> WorkerSettings:
        """Return the worker's part of the settings. Raises ConfigError."""
        check_client_name_oid(self.client_name_oid)
        if not 0 <= self.stop_grace_seconds <= 86_400:
            raise ConfigError("stop_grace_seconds must be from 0 to 86400")
        limits, ceiling, floor = self.effective_limits()
        return WorkerSettings(
            default_limits=limits,
            ceiling=ceiling,
            floor=floor,
            sums=self.host.sums(),
            shares=self.clients.shares(),
            memory_overcommit=self.memory_overcommit,
            uid_first=self.job_users.uid_first or 0,
            uid_count=self.job_users.uid_count,
            hidden_paths=(*self.hidden_paths, *hidden_paths),
            scratch_dir=self.scratch_dir or "",
            scratch_bytes_max=self.scratch.bytes_max,
            scratch_inodes_max=self.scratch.inodes_max,
            visible_paths=self.visible_paths,
            mounts=self._mounts(),
            gpus=self._gpus(),
            stop_grace_seconds=self.stop_grace_seconds,
            waiting_inits=self.waiting_inits,
            retention=Retention(
                **msgspec.structs.asdict(self.retention), keeps_untold=self.cluster.gateway is not None
            ),
            quotas=self.clients.quotas(),
            disk=DiskMarks(**msgspec.structs.asdict(self.disk)),
            queue=QueueSlots(**msgspec.structs.asdict(self.queue)),
            default_image=self.default_image or "",
            network=self.network.offers(),
        )

    def _gpus(self) -> GpuOffer:
        """Return the GPUs on offer, and their clients. Raises ConfigError."""
        try:
            offer = GpuOffer(self.gpus.kind or "", self.gpus.cdi_dirs, self.gpus.clients)
        except InvalidJobError as error:
            raise ConfigError(f"[gpus]: {error}") from None
        for client in offer.clients:
            if "*" not in client and (fault := identity_fault(client)):
                raise ConfigError(f"[gpus]: {fault}")
        return offer

    def _mounts(self) -> tuple[MountSource, ...]:
        """Return the mounts on offer, and their clients. Raises ConfigError."""
        sources = []
        for name, mount in self.mounts.items():
            try:
                sources.append(MountSource(name, **msgspec.structs.asdict(mount)))
            except InvalidJobError as error:
                raise ConfigError(f"[mounts]: {error}") from None
            for client in mount.clients:
                if "*" not in client and (fault := identity_fault(client)):
                    raise ConfigError(f"[mounts.{name}]: {fault}")
        return tuple(sources)

    def effective_limits(self) -> tuple[Limits, Limits, Limits]:
        """Return the limits of a job whose client asks for none, the ceilings and the floors.

        Raises ConfigError.
        """
        try:
            # "no limit" is above a ceiling that the file gives, and the default is then the ceiling
            bounded = {name: self.ceilings.get(name, 0) for name, value in Limits().items() if value == 0}
            limits = Limits().with_overrides({**bounded, **self.limits})
            return (
                limits,
                default_ceiling(self.host.sums(), limits).with_overrides(self.ceilings),
                FLOOR.with_overrides(self.floors),
            )
        except InvalidJobError as error:
            raise ConfigError(str(error)) from None


def load_config(path: str | None, options: Mapping[str, object] | None = None) -> ServerConfig:
    """Read a configuration file; None is all defaults. Raises ConfigError that names file and key.

    *options* are keys from the command line, which take precedence over those of the file.
    """
    return config_of(path, read_values(path), options)


def config_of(
    path: str | None, values: Mapping[str, object], options: Mapping[str, object] | None = None
) -> ServerConfig:
    """Judge the values of a file, given with its path, and of the command line. Raises ConfigError."""
    values = _without_removed(values)
    require_values(f"the configuration {path}" if path else "the options", {**values, **(options or {})})
    certificates: dict[str, object] = {}
    if path is not None:
        directory = os.path.dirname(os.path.abspath(path))
        certificates = {key: os.path.join(directory, name) for key, name in CERTIFICATE_FILES.items()}
    try:
        return msgspec.convert({**certificates, **values, **(options or {})}, ServerConfig)
    except msgspec.ValidationError as error:
        named = f"configuration {path}" if path else "configuration"
        raise ConfigError(f"the {named} is not valid: {error}", hint=_perhaps(values)) from error


def removed_keys(values: Mapping[str, object]) -> list[str]:
    """Return a warning for each key in *values* that pjwd no longer has."""
    tables = {key.rpartition(".")[0] for key in REMOVED}
    return [
        f"{key} was removed in {REMOVED_IN} and has no effect; delete it: {REMOVED[key]}"
        for key in _given(values, tables)
        if key in REMOVED
    ]


def _without_removed(values: Mapping[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            kept[key] = {name: each for name, each in value.items() if f"{key}.{name}" not in REMOVED}
        else:
            kept[key] = value
        if key in REMOVED:
            del kept[key]
    return kept


def _perhaps(values: Mapping[str, object]) -> str | None:
    """Return a hint with the key that the first unknown key may have meant."""
    known = list(_keys(ServerConfig))
    names = {key: key.rpartition(".")[2] for key in known}
    tables = {key.rpartition(".")[0] for key in known}
    for key in _given(values, tables):
        if key in known:
            continue
        table, _, name = key.rpartition(".")
        if isinstance(values.get(key), Mapping):
            likely = [f"[{each}]" for each in get_close_matches(key, tables, 1)]
        else:
            near = get_close_matches(name, set(names.values()), 1, 0.7)
            likely = [each for each in known if names[each] in near]
            # prefer a key of the same table
            likely = [each for each in likely if each.rpartition(".")[0] == table] or likely
        return f"perhaps {' or '.join(likely)}" if likely else "`pjwd config show` prints every key"
    return None


def _keys(struct: type[msgspec.Struct], table: str = "") -> Iterator[str]:
    """Yield each key, after its table's name."""
    for name, kind in get_type_hints(struct).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _keys(kind, f"{table}{name}.")
        else:
            yield f"{table}{name}"


def _given(values: Mapping[str, object], tables: set[str], table: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{table}{key}"
        if name in tables and isinstance(value, Mapping):
            yield from _given(value, tables, f"{name}.")
        else:
            yield name


def read_values(path: str | None) -> dict[str, object]:
    """Return the values of a configuration file, unjudged; None has no values. Raises ConfigError."""
    if path is None:
        return {}
    try:
        return parse_values(path, Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error


def parse_values(path: str, data: bytes) -> dict[str, object]:
    """Parse the bytes of a configuration file. Raises ConfigError."""
    try:
        return tomllib.loads(data.decode())
    # tomllib's own error covers only the faults it foresees: not a number of 5,000 digits, nor "[[[[…"
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the configuration {path}: it is not TOML: {error}") from error
