"""pjwd gateway: read the keys, give up privilege if there is any, serve.

Any user may start it. Started by root, it first becomes an unprivileged user, as `pjwd serve` does. It has no
launcher, and no other process.
"""

import asyncio
import fcntl
import logging
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Final

from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import key_exposure, load_client_credentials
from pjw.certs.revocation import NOBODY_REVOKED, load_revocation_list
from pjw.certs.tls import require_tls13_environment
from pjw.errors import ConfigError, describe_errno
from pjw.gateway import state as states
from pjw.gateway.archive import open_directory
from pjw.gateway.slurm_port import start_slurm
from pjw.gateway.state import GatewayState
from pjw.server.address import metrics_exposure
from pjw.server.boot import (
    forget_grpc_settings,
    listening_ports,
    open_audit_log,
    preload_modules,
    run_logged,
    server_uid,
)
from pjw.server.config import ServerConfig, config_of, read_values
from pjw.server.grpc_log import relay, take_stderr
from pjw.server.log_setup import LogWriter
from pjw.server.plan import Plan, plan_of
from pjw.server.sandbox import Sandbox, descriptors_for, enter, enter_as_we_are
from pjw.worker import WorkerSettings
from pjw.worker.settings import NO_CEILING

_LOCK: Final = "gateway.lock"

log: Final = logging.getLogger(__name__)


def serve(path: str | None, options: Mapping[str, object]) -> int:
    """Run the gateway until SIGTERM; the exit code. Raises PjwError when it cannot start."""
    values = read_values(path)
    config = config_of(path, values, options)
    if config.gateway.crt is None or config.gateway.key is None:
        raise ConfigError(
            "no certificate is configured by which the gateway calls its nodes",
            hint="give crt and key below [gateway]: those of a client that is in roles.gateways of the nodes",
        )
    if config.cluster.gateway is not None:
        raise ConfigError("a gateway is no node: leave cluster.gateway out")
    path = os.path.abspath(path) if path else None
    return run_logged(config, path, values, partial(_serve, config, path, options))


def settings_of(config: ServerConfig, plan: Plan) -> WorkerSettings:
    """Return the gateway's settings of a plan, without bounds by its own host, where no job runs."""
    return replace(plan.settings, ceiling=NO_CEILING.with_overrides(config.ceilings))


def _serve(config: ServerConfig, path: str | None, options: Mapping[str, object], writer: LogWriter) -> int:
    plan = plan_of(config, path)
    files = plan.files
    credentials = load_server_credentials(files.ca_crt, files.server_crt, files.server_key)
    dialling = load_client_credentials(files.ca_crt, config.gateway.crt or "", config.gateway.key or "")
    if exposure := key_exposure(files.server_key, os.stat(files.server_key)):
        log.warning("%s", exposure)
    if plan.metrics is not None and (exposure := metrics_exposure(*plan.metrics)):
        log.warning("%s", exposure)
    audit = open_audit_log(config.audit_log) if config.audit_log is not None else None
    revoked = load_revocation_list(config.revoked) if config.revoked is not None else NOBODY_REVOKED
    uid = server_uid(config.user, config.state_dir) if os.geteuid() == 0 else None
    states.make(config.state_dir, uid)
    lock = _locked(config.state_dir, uid)
    archive = open_directory(config.gateway.archive) if config.gateway.archive is not None else None
    state = GatewayState(config.state_dir, files.paths, config.audit_log, uid)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    # before the import of gRPC, as `pjwd serve` starts its launcher
    slurm = start_slurm(config.gateway.slurm, uid) if config.gateway.engine == "slurm" else None
    forget_grpc_settings()
    require_tls13_environment()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    os.environ.setdefault("GRPC_VERBOSITY", "INFO" if config.log_level in ("info", "debug") else "ERROR")
    their_lines = take_stderr()
    from pjw.server.serve import Serving
    from pjw.server.serve import serve as serve_backend

    import_module("pjw.gateway.opened")
    preload_modules()
    if plan.metrics is not None:
        import_module("pjw.server.metrics")
    # a reload reads these again, and the gateway has no launcher that could
    readable = sorted({os.path.dirname(os.path.realpath(path)) for path in files.paths})
    ports = listening_ports(plan.listen, plan.metrics)
    sandbox = Sandbox(
        state.descriptor, ports, descriptors_for(config), readable, () if archive is None else (archive,)
    )
    if uid is not None:
        enter(sandbox, uid)
    else:
        enter_as_we_are(sandbox)
    _check_reloads(state, files.paths, config.revoked)
    writer.start()
    relay(their_lines)
    settings = settings_of(config, plan)
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
    from pjw.gateway.opened import opened

    try:
        return asyncio.run(serve_backend(serving, opened(config, settings, state, dialling, slurm, archive)))
    finally:
        state.close()
        os.close(lock)


def _check_reloads(state: GatewayState, paths: Sequence[str], revoked: str | None) -> None:
    """Warn of the files that no reload can read. Raises ConfigError for the revocation list."""
    for place, path in enumerate(paths):
        try:
            os.close(state.open_operator_file(place))
        except ConfigError as error:
            if path == revoked:
                # in an emergency the operator would rely on a new list
                raise ConfigError(
                    f"no reload could read the revocation list: {error}",
                    hint="let the user of the gateway read it",
                ) from None
            log.warning("a restart can read %s, but no reload can: %s", path, error)


def _locked(state_dir: str, uid: int | None) -> int:
    """Hold the lock of the state directory. Raises ConfigError when another gateway does."""
    path = os.path.join(state_dir, _LOCK)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if uid is not None:
            os.fchown(descriptor, uid, uid)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another gateway uses the state directory {state_dir}",
            hint="stop that one, or give this one another --state-dir",
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot lock {path}: {describe_errno(error.errno or 0)}") from error
    return descriptor
