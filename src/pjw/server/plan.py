"""Judges a configuration in one place, for the start, a reload and `pjwd check`.

This module makes the checks that the file alone decides. Checks of the host (does the user exist, is the port
free) are elsewhere, because a server that reloads cannot make them: it is no longer root.
"""

import os
from dataclasses import dataclass
from typing import Final

from pjw.certs.files import ServerFiles
from pjw.errors import ConfigError, InvalidJobError, PjwError
from pjw.launcher.operator_files import open_audit_log, open_operator_file
from pjw.launcher.policy import Policy
from pjw.launcher.visible import check_visible
from pjw.server.address import parse_address
from pjw.server.config import ServerConfig
from pjw.worker import WorkerSettings
from pjw.worker.launcher_process import hello_of

RELOAD_HINT: Final = "keep them where only root can change the directories on their way, such as /etc/pjw"


@dataclass(frozen=True, slots=True)
class Plan:
    """The addresses, files and settings of the worker that a configuration comes to."""

    listen: tuple[str, int]
    # the address of metrics, if there is one
    metrics: tuple[str, int] | None
    files: ServerFiles
    settings: WorkerSettings


def plan_of(config: ServerConfig, path: str | None) -> Plan:
    """Make the plan for a configuration; *path* is the absolute path of its file. Raises ConfigError."""
    files = _files(config, path)
    settings = config.worker_settings(_hidden_paths(config, files))
    try:
        Policy.from_hello(
            hello_of(config.state_dir, settings, files.paths, config.audit_log or "", files.config or "")
        )
    except InvalidJobError as error:
        raise ConfigError(str(error), hint=error.hint) from None
    check_visible(settings.visible_paths)
    return Plan(
        listen=parse_address(config.listen),
        metrics=parse_address(config.metrics.listen) if config.metrics.listen is not None else None,
        files=files,
        settings=settings,
    )


def _files(config: ServerConfig, path: str | None) -> ServerFiles:
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


def _hidden_paths(config: ServerConfig, files: ServerFiles) -> tuple[str, ...]:
    """Return the files no job may see, whatever their mode: key, configuration and audit log."""
    secret = (files.server_key, files.config, config.audit_log)
    return tuple(os.path.realpath(path) for path in secret if path)


def check_reloads(files: ServerFiles, audit_log: str | None) -> str | None:
    """Return a warning about files that no reload can open. Opens them as root, as the launcher will.

    Raises ConfigError for the revocation list: in an emergency the operator would trust a new one.
    """
    unread: dict[str, PjwError] = {}
    for path in files.paths:
        try:
            os.close(open_operator_file(path))
        except PjwError as error:
            unread[path] = error
    # a reload makes a missing one
    if audit_log is not None and os.path.lexists(audit_log):
        try:
            os.close(open_audit_log(audit_log))
        except PjwError as error:
            unread[audit_log] = error
    if (refused := unread.get(files.revoked or "")) is not None:
        raise ConfigError(f"no reload could read the revocation list: {refused}", hint=RELOAD_HINT)
    if not unread:
        return None
    return f"a restart can open {', '.join(unread)}, but no reload can: {next(iter(unread.values()))}"
