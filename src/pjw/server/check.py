"""pjwd check: what this host offers, and what is missing, in plain words. Changes nothing."""

import os
import platform
import pwd
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from pjw.errors import ConfigError, PjwError
from pjw.launcher.cgroup import describe_host, disks_under
from pjw.launcher.spawn import INIT_PROGRAM
from pjw.server.check_config import Finding, configuration_findings, nearest
from pjw.server.config import ServerConfig, load_config
from pjw.server.start import DEFAULT_USER, FALLBACK_UID
from pjw.worker.settings import UID_COUNT, UID_FIRST

# mount_setattr(2) came with 5.12; clone3 and CLONE_INTO_CGROUP with 5.7; cgroup.kill with 5.14
KERNEL_MINIMUM: Final = (5, 14)
NAMESPACES: Final = ("pid", "mnt", "net", "ipc", "uts", "cgroup")

_MARKS: Final = {True: "ok     ", None: "warning", False: "missing"}


def check(path: str | None, options: Mapping[str, object]) -> int:
    """Print each finding; the exit code is 0 when pjwd can run here.

    With a configuration file or with certificates, also what serve needs of them.
    """
    able, state_dir = True, load_state_dir(path, options)
    found = host_findings(state_dir)
    if path is not None or any(key in options for key in ("ca_crt", "server_crt", "server_key")):
        found = chain(found, configuration_findings(path, options))
    for good, text, hint in found:
        print(f"{_MARKS[good]}  {text}")
        if hint:
            print(f"         hint: {hint}")
        able = able and good is not False
    print("this host can run pjwd" if able else "this host cannot run pjwd as it is")
    return 0 if able else 1


def load_state_dir(path: str | None, options: Mapping[str, object]) -> str:
    """The state directory; the default's where the configuration cannot be read, which is a finding then."""
    try:
        return load_config(path, options).state_dir
    except ConfigError:
        return ServerConfig().state_dir


def host_findings(state_dir: str) -> Iterator[Finding]:
    """Each thing that pjwd needs of the host: whether it is there, in words, and what to do."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    wanted = ".".join(map(str, KERNEL_MINIMUM))
    yield numbers >= KERNEL_MINIMUM, f"kernel {release} (at least {wanted})", None
    root = os.geteuid() == 0
    yield root, "root" if root else "not root", None if root else "run pjwd with sudo, or as a service"
    yield _namespaces()
    yield _init()
    host = describe_host()
    controllers = ", ".join(host.present) or "no controllers"
    text = f"cgroup v{host.version} at {host.location or 'nowhere'}: {controllers}"
    if host.missing:
        text += f"; missing: {', '.join(host.missing)}"
    yield not host.missing, text, host.hint
    yield _disks(state_dir)
    yield from _users()


def _namespaces() -> Finding:
    lacking = [name for name in NAMESPACES if not os.path.exists(f"/proc/self/ns/{name}")]
    if lacking:
        return False, f"namespaces: no {', '.join(lacking)}", "this kernel was built without them"
    return True, f"namespaces: {', '.join(NAMESPACES)}", None


def _init() -> Finding:
    if os.access(INIT_PROGRAM, os.X_OK):
        return True, f"pjw-init at {INIT_PROGRAM}", None
    return False, f"no pjw-init at {INIT_PROGRAM}", "install pjw as a package: make install, or pip install"


def _disks(state_dir: str) -> Finding:
    there = nearest(state_dir)
    try:
        disks = disks_under(["/", there])
    except ConfigError as error:
        return False, str(error), error.hint
    except PjwError as error:
        return False, str(error), None
    return True, f"disks for io limits: {', '.join(disks)} (under / and {there})", None


def _users() -> Iterator[Finding]:
    try:
        entry = pwd.getpwnam(DEFAULT_USER)
        yield True, f"server user {DEFAULT_USER} ({entry.pw_uid})", None
    except KeyError:
        text = f"server user: no user {DEFAULT_USER}, so uid {FALLBACK_UID}, which is nobody's"
        yield True, text, f"useradd --system --shell /usr/sbin/nologin {DEFAULT_USER} gives it a name"
    last = UID_FIRST + UID_COUNT - 1
    taken = [entry.pw_name for entry in pwd.getpwall() if UID_FIRST <= entry.pw_uid <= last]
    text = f"user ids for jobs: {UID_FIRST} to {last}"
    if taken:
        yield False, f"{text}; taken by {', '.join(taken)}", "configure another range (job_users)"
    else:
        yield True, text, None
