"""pjwd serve, the part that is root: read the keys, start the launcher, drop privilege.

The order is the point. Keys are read while root may. The launcher is spawned before gRPC is
imported (children of a process with its threads die before exec). All modules are loaded
while root, since the interpreter may live where only root can read it (a venv or pyenv below
/root). Privilege is gone before anything listens.
"""

import hashlib
import logging
import os
import pwd
import resource
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Final

from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import key_exposure
from pjw.certs.revocation import NOBODY_REVOKED, load_revocation_list
from pjw.certs.tls import require_tls13_environment
from pjw.errors import ConfigError, PjwError, describe_errno
from pjw.process import set_for_service
from pjw.server.address import metrics_exposure
from pjw.server.backup_port import BackupPort
from pjw.server.config import ServerConfig, config_of, read_values, removed_keys
from pjw.server.drain_port import DrainPort
from pjw.server.grpc_log import relay, take_stderr
from pjw.server.log_setup import LogWriter, set_up_logging
from pjw.server.network import egress_uid
from pjw.server.plan import check_reloads, plan_of
from pjw.server.sandbox import Sandbox, descriptors_for, enter
from pjw.server.trial import Trial, trial_of
from pjw.worker.launcher_process import require_root, start_launcher
from pjw.worker.state_dir import StateDir

DEFAULT_USER: Final = "pjw"
# Without a user pjw, each state directory has one of the user ids that systemd leaves unused
# (systemd.io/UIDS-GIDS). Where an older version has run, it is the one that this version took everywhere.
FORMER_UID: Final = 1_899_999_999
NOBODYS_UIDS: Final = range(0x7FFF_0000, 0x8000_0000)

log: Final = logging.getLogger(__name__)


def serve(path: str | None, options: Mapping[str, object]) -> int:
    """Run the service until SIGTERM; return the exit code. Raises PjwError when it cannot start.

    *path* is the configuration file, *options* the keys that the command line gives.
    """
    require_root()
    values = read_values(path)
    config = config_of(path, values, options)
    if config.gateway.crt is not None:
        raise ConfigError(f"{path} is the configuration of a gateway", hint="pjwd gateway --config FILE")
    path = os.path.abspath(path) if path else None
    return run_logged(config, path, values, partial(_serve, config, path, options))


def run_logged(
    config: ServerConfig, path: str | None, values: Mapping[str, object], run: Callable[[LogWriter], int]
) -> int:
    """Set up the log and the inherited settings, and run; return the exit code.

    *values* are those of the configuration file. With a log in JSON, an error of *run* becomes lines of it;
    with a log in text, it is raised.
    """
    set_for_service()
    writer = set_up_logging(config.log_level, config.log_format)
    for words in removed_keys(values):
        log.warning("configuration %s: %s", path, words)
    try:
        return run(writer)
    except PjwError as error:
        if config.log_format == "text":
            raise
        log.error("%s", error)
        if error.hint:
            log.error("hint: %s", error.hint)
        return 1
    finally:
        # also when the start failed before it came to this
        with suppress(RuntimeError):
            writer.start()


def _serve(config: ServerConfig, path: str | None, options: Mapping[str, object], writer: LogWriter) -> int:
    plan = plan_of(config, path)
    files, settings = plan.files, plan.settings
    credentials = load_server_credentials(files.ca_crt, files.server_crt, files.server_key)
    if exposure := key_exposure(files.server_key, os.stat(files.server_key)):
        log.warning("%s", exposure)
    if plan.metrics is not None and (exposure := metrics_exposure(*plan.metrics)):
        log.warning("%s", exposure)
    audit = open_audit_log(config.audit_log) if config.audit_log is not None else None
    revoked = load_revocation_list(config.revoked) if config.revoked is not None else NOBODY_REVOKED
    if unread := check_reloads(files, config.audit_log):
        log.warning("%s", unread)
    uid = server_uid(config.user, config.state_dir)
    settings = replace(settings, network=replace(settings.network, uid=egress_uid_of(config, uid)))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    state = StateDir(config.state_dir, uid)
    backups = BackupPort(state)
    drains = DrainPort(state)
    launcher = start_launcher(state.path, settings, files.paths, config.audit_log or "", files.config or "")
    # After the launcher, which moves this process into a leaf where cgroup v2 wants that: a trial init in the
    # old cgroup would keep the launcher from delegating controllers. Before the import of gRPC: with gRPC's
    # threads a child would die before its exec.
    trial = trial_of(config, uid)

    forget_grpc_settings()
    require_tls13_environment()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    os.environ.setdefault("GRPC_VERBOSITY", "INFO" if config.log_level in ("info", "debug") else "ERROR")
    their_lines = take_stderr()
    from pjw.server.serve import Serving, run

    preload_modules()
    if plan.metrics is not None:
        import_module("pjw.server.metrics")
    holds = None
    if config.cluster.gateway is not None:
        from pjw.server.as_node import holds_of

        holds = holds_of(config)
    _finish(trial)
    sandbox = Sandbox(state.descriptor, listening_ports(plan.listen, plan.metrics), descriptors_for(config))
    enter(sandbox, uid)
    # only now: a thread started before would keep its privileges
    writer.start()
    relay(their_lines)
    serving = Serving(
        *plan.listen,
        plan.metrics,
        files,
        credentials,
        revoked,
        config,
        options,
        settings,
        audit,
        writer,
    )
    return run(serving, state, launcher, backups, drains, holds)


def forget_grpc_settings() -> None:
    """Remove gRPC's settings from the environment, except those of its log.

    pjwd was tested with gRPC's own poller, experiments, roots and so on; operators must not change them.
    """
    for name in [name for name in os.environ if name.startswith("GRPC_")]:
        if name not in ("GRPC_TRACE", "GRPC_VERBOSITY"):
            del os.environ[name]


def _finish(trial: Trial) -> None:
    """Log an error when no job can be made. pjwd serves all the same, for the jobs that exist."""
    try:
        trial.finish()
    except ConfigError as error:
        log.error("%s", error)
        if error.hint:
            log.error("hint: %s", error.hint)


def open_audit_log(path: str) -> int:
    """Open the file, as root and before anything else runs; its descriptor. Raises ConfigError."""
    try:
        # O_NONBLOCK: a pipe without a reader must not hold us up
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot open the audit log {path}: {describe_errno(error.errno or 0)}",
            hint="its directory must be there, and it must be no link",
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"cannot open the audit log {path}: it is no regular file")
    return descriptor


def server_uid(user: str | None, state_dir: str) -> int:
    """Return the unprivileged user that the network process becomes. Raises ConfigError.

    Where there is none, a user id that no other pjwd has: that of the state directory.
    """
    try:
        uid = pwd.getpwnam(user or DEFAULT_USER).pw_uid
    except KeyError:
        if user is not None:
            raise ConfigError(
                f"no user is called {user!r} on this host",
                hint=f"useradd --system --shell /usr/sbin/nologin {user}",
            ) from None
        return _nobodys_uid(os.path.realpath(state_dir))
    if uid == 0:
        raise ConfigError("the server must not run as root", hint="name another user in the configuration")
    return uid


def egress_uid_of(config: ServerConfig, server: int) -> int:
    """Return pjwd-egress's user, not the server's; 0 where jobs have no network. Raises ConfigError."""
    first = config.job_users.uid_first
    ids = range(first, first + config.job_users.uid_count) if first else range(0)
    nobody = _id_of_nobody(f"{os.path.realpath(config.state_dir)}/egress")
    if nobody == server:
        nobody = NOBODYS_UIDS[(nobody - NOBODYS_UIDS[0] + 1) % len(NOBODYS_UIDS)]
    return egress_uid(config.network, server, ids, nobody)


def _nobodys_uid(state_dir: str) -> int:
    with suppress(OSError):
        owner = os.stat(os.path.join(state_dir, "jobs")).st_uid
        if owner == FORMER_UID:
            return owner
    return _id_of_nobody(state_dir)


def _id_of_nobody(name: str) -> int:
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return NOBODYS_UIDS[int.from_bytes(digest[:8]) % len(NOBODYS_UIDS)]


def listening_ports(*addresses: tuple[str, int] | None) -> list[int] | None:
    """Return the only ports to listen on; None when one of them is not known before."""
    ports = [address[1] for address in addresses if address is not None]
    return ports if all(ports) else None


def preload_modules() -> None:
    """Import the modules that the standard library and gRPC import only at their first use."""
    late = ("encodings.idna", "asyncio", "concurrent.futures.thread", "linecache", "traceback", "shutil")
    for name in (*late, "grpc._utilities"):
        import_module(name)
