"""pjwd serve, the part that is root: read the keys, start the launcher, drop privilege.

The order is the point. Keys are read while root may. The launcher is spawned before gRPC is
imported (children of a process with its threads die before exec). All modules are loaded
while root, since the interpreter may live where only root can read it (a venv or pyenv below
/root). Privilege is gone before anything listens.
"""

import ctypes
import logging
import os
import pwd
import resource
import stat
from collections.abc import Mapping
from importlib import import_module
from typing import Final

from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import ServerFiles, key_exposure
from pjw.certs.revocation import NOBODY_REVOKED, load_revocation_list
from pjw.certs.tls import require_tls13_environment
from pjw.errors import ConfigError, PjwError, describe_errno
from pjw.server.address import metrics_address_of, parse_address, traces_endpoint_of
from pjw.server.config import ServerConfig, load_config
from pjw.server.logs import set_up_logging
from pjw.worker.launcher_process import require_root, start_launcher
from pjw.worker.settings import UID_FIRST
from pjw.worker.state_dir import StateDir

DEFAULT_USER: Final = "pjw"
# Where no user pjw exists: a user id that belongs to nobody, just below those of jobs.
FALLBACK_UID: Final = UID_FIRST - 1

_PR_SET_NO_NEW_PRIVS: Final = 38

log: Final = logging.getLogger(__name__)


def serve(path: str | None, options: Mapping[str, object]) -> int:
    """Run the service until SIGTERM; the exit code. Raises PjwError when it cannot start.

    *path* is the configuration file, *options* the keys that the command line gives.
    """
    require_root()
    config = load_config(path, options)
    set_up_logging(config.log_level, config.log_format)
    try:
        return _serve(config, os.path.abspath(path) if path else None, options)
    except PjwError as error:
        if config.log_format == "text":
            raise
        log.error("%s", error)
        if error.hint:
            log.error("hint: %s", error.hint)
        return 1


def _serve(config: ServerConfig, path: str | None, options: Mapping[str, object]) -> int:
    host, port = parse_address(config.listen)
    metrics_address = metrics_address_of(config.metrics)
    traces_endpoint = traces_endpoint_of(config.traces)
    files = server_files(config, path)
    credentials = load_server_credentials(files.ca_crt, files.server_crt, files.server_key)
    if exposure := key_exposure(files.server_key, os.stat(files.server_key)):
        log.warning("%s", exposure)
    audit = open_audit_log(config.audit_log) if config.audit_log is not None else None
    settings = config.worker_settings(hidden_paths(config, files))
    revoked = load_revocation_list(config.revoked) if config.revoked is not None else NOBODY_REVOKED
    uid = server_uid(config.user)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o077)

    state = StateDir(config.state_dir, uid)
    launcher = start_launcher(state.path, settings, files.paths)

    require_tls13_environment()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    os.environ.setdefault("GRPC_VERBOSITY", "INFO" if config.log_level in ("info", "debug") else "ERROR")
    from pjw.server.serve import Serving, run

    preload_modules()
    if metrics_address is not None:
        import_module("pjw.server.metrics")
    if traces_endpoint is not None:
        # the second is what gRPC imports for its first channel
        for name in ("pjw.server.traces", "grpc._channel"):
            import_module(name)
    drop_privilege(uid)
    serving = Serving(
        host, port, metrics_address, files, credentials, revoked, config, options, settings, audit
    )
    return run(serving, state, launcher)


def server_files(config: ServerConfig, path: str | None) -> ServerFiles:
    """The operator's files. Raises ConfigError for one that nobody has named."""
    for key in ("ca_crt", "server_crt", "server_key"):
        if getattr(config, key) is None:
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"no {key} is configured",
                hint=f"give {option} FILE, or {key} in the configuration; `pjwd certs init` makes the files",
            )
    return ServerFiles(
        ca_crt=config.ca_crt or "",
        server_crt=config.server_crt or "",
        server_key=config.server_key or "",
        revoked=config.revoked,
        config=path,
    )


def hidden_paths(config: ServerConfig, files: ServerFiles) -> tuple[str, ...]:
    """What no job may see, whatever its mode: the key, the configuration, and who does what."""
    secret = (files.server_key, files.config, config.audit_log)
    return tuple(os.path.realpath(path) for path in secret if path)


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


def server_uid(user: str | None) -> int:
    """The unprivileged user that the network process becomes. Raises ConfigError."""
    try:
        uid = pwd.getpwnam(user or DEFAULT_USER).pw_uid
    except KeyError:
        if user is not None:
            raise ConfigError(
                f"no user is called {user!r} on this host",
                hint=f"useradd --system --shell /usr/sbin/nologin {user}",
            ) from None
        return FALLBACK_UID
    if uid == 0:
        raise ConfigError("the server must not run as root", hint="name another user in the configuration")
    return uid


def drop_privilege(uid: int) -> None:
    """Become *uid* for good: no groups, no capabilities, nothing to be gained by an exec."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise ConfigError(
            f"cannot become user {uid}: {describe_errno(error.errno or 0)}",
            hint="this takes the capabilities CAP_SETUID and CAP_SETGID",
        ) from error
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise ConfigError(f"cannot set no_new_privs: {os.strerror(ctypes.get_errno())}")
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise ConfigError("cannot drop root: it could be taken back")


def preload_modules() -> None:
    """Import what the standard library and gRPC themselves import only when it is first needed."""
    late = ("encodings.idna", "asyncio", "concurrent.futures.thread", "linecache", "traceback", "shutil")
    for name in (*late, "grpc._utilities"):
        import_module(name)
