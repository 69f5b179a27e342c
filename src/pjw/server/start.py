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
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import ServerFiles, key_exposure
from pjw.certs.revocation import NOBODY_REVOKED, load_revocation_list
from pjw.certs.tls import require_tls13_environment
from pjw.errors import ConfigError, describe_errno
from pjw.server.config import load_config
from pjw.worker.launcher_process import require_root, start_launcher
from pjw.worker.settings import UID_FIRST
from pjw.worker.state_dir import StateDir

DEFAULT_USER: Final = "pjw"
# Where no user pjw exists: a user id that belongs to nobody, just below those of jobs.
FALLBACK_UID: Final = UID_FIRST - 1

_PR_SET_NO_NEW_PRIVS: Final = 38

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of `pjwd serve`."""

    host: str
    port: int
    ca_crt: str
    server_crt: str
    server_key: str
    state_dir: str
    config: str | None
    log_level: str


def serve(options: ServeOptions) -> int:
    """Run the service until SIGTERM; the exit code. Raises PjwError when it cannot start."""
    require_root()
    _set_up_logging(options.log_level)
    config = load_config(options.config)
    credentials = load_server_credentials(options.ca_crt, options.server_crt, options.server_key)
    if exposure := key_exposure(options.server_key, os.stat(options.server_key)):
        log.warning("%s", exposure)
    audit = open_audit_log(config.audit_log) if config.audit_log is not None else None
    # no job may see the key, nor the configuration, nor who does what, whatever their modes
    secret = (options.server_key, options.config, config.audit_log)
    hidden = [os.path.realpath(path) for path in secret if path]
    settings = config.worker_settings(tuple(hidden))
    revoked = load_revocation_list(config.revoked) if config.revoked is not None else NOBODY_REVOKED
    here = os.getcwd()
    files = ServerFiles(
        ca_crt=os.path.join(here, options.ca_crt),
        server_crt=os.path.join(here, options.server_crt),
        server_key=os.path.join(here, options.server_key),
        revoked=config.revoked,
    )
    uid = server_uid(config.user)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o077)

    state = StateDir(options.state_dir, uid)
    launcher = start_launcher(state.path, settings, files.paths)

    require_tls13_environment()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    os.environ.setdefault("GRPC_VERBOSITY", "INFO" if options.log_level in ("info", "debug") else "ERROR")
    from pjw.server.serve import Serving, run

    preload_modules()
    drop_privilege(uid)
    serving = Serving(options.host, options.port, files, credentials, revoked, config, settings, audit)
    return run(serving, state, launcher)


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


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="pjwd: %(levelname)s: %(message)s")
