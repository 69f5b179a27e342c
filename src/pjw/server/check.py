"""pjwd check: the abilities of this host, and its gaps, in plain words. Changes nothing."""

import os
import platform
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Final

from pjw.errors import ConfigError, PjwError, describe_errno
from pjw.launcher.archive_program import ARCHIVE_PROGRAM
from pjw.launcher.cgroup import describe_host, disks_under
from pjw.launcher.images import Trees
from pjw.launcher.job_users import claimed_by, known_first, own_ranges, subordinate_ranges
from pjw.launcher.root_files import require_root_s
from pjw.launcher.scratch import QUOTA_HINT, find_quotas
from pjw.launcher.spawn import INIT_PROGRAM, place_words
from pjw.launcher.visible import check_visible, mounts_of, read_mounts, template_of
from pjw.process import close_all
from pjw.server import sandbox
from pjw.server.boot import DEFAULT_USER, egress_uid_of, server_uid
from pjw.server.check_config import Finding, configuration_findings, nearest
from pjw.server.config import ServerConfig, load_config
from pjw.server.drain_port import is_drained
from pjw.server.trial import INIT_SECONDS, trial_of

# mount_setattr(2) came with 5.12; clone3 and CLONE_INTO_CGROUP with 5.7; cgroup.kill with 5.14
KERNEL_MINIMUM: Final = (5, 14)
# the kernel's default for a disk without moving parts; it is 75,000 for others, and for many virtual disks
_WRITE_BACK_USEC_MAX: Final = 2000
NAMESPACES: Final = ("pid", "mnt", "net", "ipc", "uts", "cgroup")

# the directories that an image must have
_IN_IMAGES: Final = ("dev", "etc", "proc", "run", "sys", "tmp")

_MARKS: Final = {True: "ok     ", None: "warning", False: "missing"}


def check(path: str | None, options: Mapping[str, object]) -> int:
    """Print each finding; return exit code 0 when pjwd can run here.

    With a configuration file or with certificates, also check that serve can use them.
    """
    able = True
    found = host_findings(_load(path, options))
    if path is not None or any(key in options for key in ("ca_crt", "server_crt", "server_key")):
        found = chain(found, configuration_findings(path, options))
    for good, text, hint in found:
        print(f"{_MARKS[good]}  {text}")
        if hint:
            print(f"         hint: {hint}")
        able = able and good is not False
    print("this host can run pjwd" if able else "this host cannot run pjwd as it is")
    return 0 if able else 1


def _load(path: str | None, options: Mapping[str, object]) -> ServerConfig:
    """Return the configuration, or the default if it cannot be read, which is a finding elsewhere."""
    try:
        return load_config(path, options)
    except ConfigError:
        return ServerConfig()


def host_findings(config: ServerConfig) -> Iterator[Finding]:
    """Yield each need of pjwd on the host: whether it is met, in words, and the remedy."""
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
    yield from _view(config)
    yield _disks(*filter(None, (config.state_dir, config.scratch_dir)))
    yield from _write_back(*filter(None, (config.state_dir, config.scratch_dir)))
    yield from _directories(config)
    if is_drained(config.state_dir):
        yield None, "this machine is drained: pjwd starts no jobs", "pjwd resume"
    yield from _images(config.scratch_dir or config.state_dir)
    yield from _users(config)
    yield from _egress(config)
    yield from sandbox.status()


def _namespaces() -> Finding:
    lacking = [name for name in NAMESPACES if not os.path.exists(f"/proc/self/ns/{name}")]
    if lacking:
        return False, f"namespaces: no {', '.join(lacking)}", "this kernel was built without them"
    return True, f"namespaces: {', '.join(NAMESPACES)}", None


def _init() -> Finding:
    if os.access(INIT_PROGRAM, os.X_OK):
        return True, f"pjw-init at {INIT_PROGRAM}", None
    return False, f"no pjw-init at {INIT_PROGRAM}", "install pjw as a package: make install, or pip install"


def _view(config: ServerConfig) -> Iterator[Finding]:
    """Describe the file systems that jobs see: this makes a job, and looks from within it."""
    if os.geteuid() != 0:
        return
    try:
        check_visible(config.visible_paths)
        trial = trial_of(config, server_uid(None, config.state_dir))
        seen = mounts_of(trial.finish())
    except PjwError as error:
        yield False, str(error), error.hint
        return
    paths = [place.path for place in trial.places if place.view != "cover" and place.path in seen]
    bound = [path for path in paths if seen[path].type != b"overlay"]
    yield True, f"file systems that jobs see: {', '.join(paths)}", None
    if bound:
        shared = "locks, events, sockets and FIFOs there are the host's own"
        hint = "put directories that jobs must not share into hidden_paths (docs/security.md)"
        yield None, f"no overlay is made of {', '.join(bound)}: {shared}", hint


def _disks(*directories: str) -> Finding:
    there = [nearest(directory) for directory in directories]
    try:
        disks = disks_under(["/", *there])
    except ConfigError as error:
        return False, str(error), error.hint
    except PjwError as error:
        return False, str(error), None
    return True, f"disks for io limits: {', '.join(disks)} (under / and {' and '.join(there)})", None


def _write_back(*directories: str) -> Iterator[Finding]:
    """Yield disks on which the kernel lets jobs' writes hold up pjwd's reads and syncs for long.

    wbt_lat_usec is the time that a read may take before the kernel queues fewer writes; 0 where the kernel
    never does so, as with bfq (Documentation/ABI/stable/sysfs-block).
    """
    try:
        disks = disks_under(map(nearest, directories))
    except PjwError:
        return  # the finding about disks says why
    for disk in disks:
        name = os.path.basename(os.path.realpath(f"/sys/dev/block/{disk}"))
        file = f"/sys/block/{name}/queue/wbt_lat_usec"
        try:
            with open(file, encoding="ascii") as setting:
                usec = int(setting.read())
        except OSError:
            continue  # this kernel has no such bound
        if usec > _WRITE_BACK_USEC_MAX:
            held = f"jobs' writes may hold up pjwd's reads and syncs for {usec / 1000:g} ms at a time"
            yield None, f"disk {name}: {held}", f"echo {_WRITE_BACK_USEC_MAX} > {file} (docs/security.md)"


def _directories(config: ServerConfig) -> Iterator[Finding]:
    for directory, called in (
        (config.state_dir, "state directory"),
        (config.scratch_dir, "scratch directory"),
    ):
        if directory is None:
            continue
        try:
            require_root_s(nearest(directory), called, "configure another")
        except ConfigError as error:
            yield False, str(error), error.hint
    if config.scratch.bytes_max or config.scratch.inodes_max:
        yield _quotas(nearest(config.scratch_dir or config.state_dir))


def _images(directory: str) -> Iterator[Finding]:
    """Describe a root made from an image: make such a job, in a directory that is removed again."""
    if os.geteuid() != 0:
        return
    # any user but root will do
    uid = 1
    trees = Trees()
    try:
        with tempfile.TemporaryDirectory(prefix=".pjw-check-", dir=nearest(directory)) as made:
            own = os.path.realpath(made)
            for name in ("job", "upper", "work", *(f"image/{each}" for each in _IN_IMAGES)):
                os.makedirs(os.path.join(own, name))
            for name in ("job", "upper"):
                os.chown(os.path.join(own, name), uid, uid)
            shutil.copy(ARCHIVE_PROGRAM, os.path.join(own, "image/program"))
            image = os.open(os.path.join(own, "image"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = trees.of(image, uid)
            finally:
                os.close(image)
            try:
                said = _in_image(own, uid, found)
            finally:
                close_all(found)
    except (PjwError, OSError, subprocess.SubprocessError) as error:
        said = describe_errno(error.errno or 0) if isinstance(error, OSError) else str(error)
    finally:
        trees.close()
    if not said:
        yield True, "images: jobs can write to the root that they have of one", None
    elif any(words in said.lower() for words in ("read-only", "permission denied")):
        hint = "this takes Linux 5.19, and scratch directories on ext4, xfs or btrfs (docs/images.md)"
        yield None, "images: the root that jobs have of one is read-only", hint
    else:
        yield None, f"images: jobs cannot have one: {said}", "jobs without an image need nothing of this"


def _in_image(own: str, uid: int, trees: list[int]) -> str:
    """Return why a job cannot make a file in an image; empty when it can."""
    words = ["--uid", str(uid), "--gid", str(uid), "--scratch", f"{own}/job"]
    words += place_words(template_of((), (own,), read_mounts()))
    words += [word for tree in trees for word in ("--image-fd", str(tree))]
    # an archive of nothing; by its mode init sees that no more of it comes
    archive = os.open(os.path.join(own, "archive"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        os.pwrite(archive, bytes(1024), 0)
        return _tried([*words, "--input-fd", str(archive)], [*trees, archive])
    finally:
        os.close(archive)


def _tried(words: list[str], descriptors: list[int]) -> str:
    done = subprocess.run(
        # below the root itself, which belongs to the job wherever it can be an overlay at all
        [INIT_PROGRAM, *words, "--", "/program", "unpack", "", "/etc/made"],
        stdin=subprocess.DEVNULL,
        # init passes on all that a command says as its output
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=descriptors,
        timeout=INIT_SECONDS,
        check=False,
    )
    if not done.returncode:
        return ""
    return done.stdout.decode(errors="replace").strip() or f"the trial ended with {done.returncode}"


def _quotas(directory: str) -> Finding:
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = find_quotas(descriptor, "")
    finally:
        os.close(descriptor)
    if found is None:
        return False, f"scratch.bytes_max and inodes_max: no project quotas under {directory}", QUOTA_HINT
    return True, f"project quotas under {directory}", None


def _users(config: ServerConfig) -> Iterator[Finding]:
    # a user that the configuration names is among the findings about the configuration
    if config.user is None:
        yield _default_user(config.state_dir)
    yield _job_users(
        os.path.realpath(config.state_dir), config.job_users.uid_first or 0, config.job_users.uid_count
    )


def _egress(config: ServerConfig) -> Iterator[Finding]:
    """Describe the process that connects jobs to the network, if the configuration offers names."""
    count = len(config.network.offers().offered)
    if not count:
        return
    try:
        server = server_uid(config.user, config.state_dir)
    except ConfigError:
        return  # the finding about the configuration says why
    try:
        uid = egress_uid_of(config, server)
    except ConfigError as error:
        yield False, str(error), error.hint
    else:
        yield True, f"names on the network: {count}, for which pjwd-egress connects as uid {uid}", None


def _default_user(state_dir: str) -> Finding:
    try:
        entry = pwd.getpwnam(DEFAULT_USER)
    except KeyError:
        uid = server_uid(None, state_dir)
        text = f"server user: no user {DEFAULT_USER}, so uid {uid}, which belongs to no user"
        return True, text, f"useradd --system --shell /usr/sbin/nologin {DEFAULT_USER} gives it a name"
    return True, f"server user {DEFAULT_USER} ({entry.pw_uid})", None


def _job_users(state_dir: str, first: int, count: int) -> Finding:
    try:
        first = first or known_first(state_dir)
        # as a launcher would take the first one that is free
        first = first or next(each for each in own_ranges(state_dir, count) if not claimed_by(each, count))
    except ConfigError as error:
        return False, str(error), error.hint
    last = first + count - 1
    text, hint = f"user ids for jobs: {first} to {last}", "configure another range (job_users)"
    if taken := [entry.pw_name for entry in pwd.getpwall() if first <= entry.pw_uid <= last]:
        return False, f"{text}; taken by {', '.join(taken)}", hint
    if (claim := claimed_by(first, count)) and claim.state_dir != state_dir:
        return False, f"{text}; taken by the pjwd of {claim.state_dir or 'another state directory'}", hint
    if any(first <= other.first + other.count - 1 and other.first <= last for other in subordinate_ranges()):
        return None, f"{text}; some may be a user's for containers (/etc/subuid, /etc/subgid)", hint
    return True, text, None
