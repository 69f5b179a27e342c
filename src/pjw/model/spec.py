"""A job as its client asks for it, each value checking itself. No I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Self

from pjw.errors import InvalidJobError
from pjw.model.job import After, EndReason, Job, JobState
from pjw.model.limits import said
from pjw.model.offers import (
    JOB_DIRECTORY,
    PATH_MAX_BYTES,
    WORKSPACE_DIRECTORY,
    check_gpus,
    check_mounts,
    checked_size,
)

# All arguments of a command together: far below ARG_MAX, far above any command that a person types.
ARGUMENTS_MAX_BYTES: Final = 524_288
LABELS_MAX: Final = 32
LABEL_VALUE_MAX_CHARACTERS: Final = 255
PRIORITY_MAXIMUM: Final = 1000
AFTER_MAX: Final = 100
RETRIES_MAX: Final = 100
BACKOFF_SECONDS_MAX: Final = 3600
# for a job that is lost again and again: it may itself be the cause
LOST_RETRIES_MAX: Final = 3
# as struct winsize of the kernel has it
TERMINAL_MAXIMUM: Final = 65_535
# of TCP
PORT_MAX: Final = 65_535
# The number of jobs that one call puts into the queue. The table stores them in one transaction, and no other
# call can use the table for 45 ms.
SUBMITTED_MAX: Final = 500
# shown as the command of a job that uses its image's command, until it begins
IMAGES_OWN_COMMAND: Final = "(of the image)"
OUTPUTS_MAX: Final = 32
OUTPUT_MAX_BYTES: Final = 1024
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_IMAGE_CONFIG_CHARACTERS_MAX: Final = 64 * 1024
_IMAGE_KEY: Final = re.compile(r"@[0-9a-f]{16}")
_IMAGE_DIGEST: Final = re.compile(r"sha256-[0-9a-f]{64}")
_LABEL_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9._/-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# of a partition of Slurm's, and of a feature of its nodes: one, and no expression
_SLURM_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,60}")
# the keys of a job's spec that are text
_TEXTS: Final = (
    *("name", "workdir", "request_id", "upload", "workspace", "image", "link", "node"),
    *("partition", "constraint"),
)
_UPLOAD: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,64}")


def check_slurm_name(what: str, name: str) -> None:
    """Check the name of a partition or a feature; the empty name means none. Raises InvalidJobError."""
    if name and not _SLURM_NAME.fullmatch(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no {what}: up to 60 letters, digits, '.', '_' and '-'",
            hint=f"a job has one {what}; the lists and expressions of Slurm's are not taken",
        )


@dataclass(frozen=True, slots=True)
class Retry:
    """Further attempts of a job that fails: so many `times` at most. Raises InvalidJobError.

    With `codes` only after one of these exit codes, with `oom` and `timeout` after these ends; without any of
    the three after every failure of the command. The first attempt waits `backoff_seconds`, each further one
    twice as long, up to an hour. `if_lost` is for a job that is lost: it may have done anything until then.
    A job that was stopped is not tried again.
    """

    times: int = 0
    codes: frozenset[int] = frozenset()
    oom: bool = False
    timeout: bool = False
    backoff_seconds: float = 5
    if_lost: bool = False

    def __post_init__(self) -> None:
        if type(self.times) is not int or not 0 <= self.times <= RETRIES_MAX:
            raise InvalidJobError(
                f"a job is tried again from 0 to {RETRIES_MAX} times, not {self.times!r:.80}"
            )
        if not self.times and not self.if_lost:
            raise InvalidJobError("a job that is tried again needs a number of times")
        # frozen; equal however it was given
        object.__setattr__(self, "codes", frozenset(self.codes))
        if not all(type(code) is int and 1 <= code <= 255 for code in self.codes):
            raise InvalidJobError(f"exit codes of failures are from 1 to 255, not {sorted(self.codes)!r:.80}")
        if not 0 <= self.backoff_seconds <= BACKOFF_SECONDS_MAX:
            raise InvalidJobError(
                f"a pause before an attempt is from 0 to {BACKOFF_SECONDS_MAX} seconds,"
                f" not {self.backoff_seconds!r:.80}"
            )

    def pause_after(self, job: "Job") -> float | None:
        """Return the seconds from the end of this attempt to the next one; None: there is none."""
        if job.state is JobState.LOST:
            return 0.0 if self.if_lost and job.attempt <= max(self.times, LOST_RETRIES_MAX) else None
        if job.attempt > self.times or not self._fits(job):
            return None
        return min(self.backoff_seconds * 2.0 ** (job.attempt - 1), float(BACKOFF_SECONDS_MAX))

    def _fits(self, job: "Job") -> bool:
        status = job.exit_status
        if status is None or job.succeeded or job.reason in (EndReason.STOPPED, EndReason.DISK_LIMIT):
            return False
        if not (self.codes or self.oom or self.timeout):
            return True
        if job.reason in (EndReason.OOM_KILLED, EndReason.TIMED_OUT):
            return self.oom if job.reason is EndReason.OOM_KILLED else self.timeout
        return job.reason is EndReason.COMPLETED and status.code in self.codes


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """The conditions of a job in the queue (docs/queue.md). Raises InvalidJobError.

    Of one client's jobs those with a higher `priority` go first (-1000 to 1000), among equals the older one.
    `not_before` is a time, local without a time zone. A job that is `held` waits until it is released.
    `after` are jobs of the same client whose ends it waits for; when one ends otherwise, it is cancelled.
    With `array` it is started once for each of these indices: `1-100`, `1,3,7`, `0-20:5`; of `1-100%8` at
    most 8 run at once.
    """

    priority: int = 0
    not_before: datetime | None = None
    held: bool = False
    after: Sequence[After] = ()
    retry: Retry | None = None
    array: str = ""

    def __post_init__(self) -> None:
        if type(self.array) is not str:
            raise InvalidJobError(f"the indices of an array are text, not {self.array!r:.80}")
        if self.array:
            # imported here, so that the launcher, which is root, does not load it
            from pjw.arrays import Array

            object.__setattr__(self, "array", str(Array.of(self.array)))
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise InvalidJobError(f"retry is a Retry, not {self.retry!r:.80}")
        if type(self.priority) is not int or not -PRIORITY_MAXIMUM <= self.priority <= PRIORITY_MAXIMUM:
            raise InvalidJobError(
                f"a priority must be a whole number from -{PRIORITY_MAXIMUM} to {PRIORITY_MAXIMUM},"
                f" not {said(self.priority)[:80]}"
            )
        if self.not_before is not None and not isinstance(self.not_before, datetime):
            raise InvalidJobError(f"not_before is a time (a datetime), not {self.not_before!r:.80}")
        if not all(isinstance(each, After) for each in self.after):
            raise InvalidJobError(f"after names jobs by After(id), not {self.after!r:.80}")
        if len(self.after) > AFTER_MAX:
            raise InvalidJobError(f"a job waits for at most {AFTER_MAX} others, not {len(self.after)}")
        if len({(each.job_id, each.earlier, each.element) for each in self.after}) < len(self.after):
            raise InvalidJobError("a job waits for another one by one condition, not by several")
        # frozen; equal however it was given
        object.__setattr__(self, "after", tuple(self.after))


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """The size of a terminal in rows and columns of characters (docs/terminal.md). Raises InvalidJobError."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for value in (self.rows, self.columns):
            if type(value) is not int or not 1 <= value <= TERMINAL_MAXIMUM:
                raise InvalidJobError(
                    f"a terminal has from 1 to {TERMINAL_MAXIMUM} rows and columns, not {said(value)}"
                )


def check_outputs(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of files to keep, normalized. Raises InvalidJobError."""
    if len(patterns) > OUTPUTS_MAX:
        raise InvalidJobError(
            f"a job has at most {OUTPUTS_MAX} patterns of files to keep, not {len(patterns)}"
        )
    checked = []
    for pattern in patterns:
        if checked_size(pattern, "a pattern of files to keep") > OUTPUT_MAX_BYTES:
            raise InvalidJobError(f"a pattern of files to keep is longer than {OUTPUT_MAX_BYTES} bytes")
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if not pattern or pattern.startswith("/") or ".." in parts:
            raise InvalidJobError(
                f"cannot keep {pattern[:80]!r}: it is not in the job's workspace or own directory",
                hint="give a pattern such as 'dist/**', which begins there",
            )
        checked.append("/".join(parts) or "**")
    return tuple(checked)


def check_port(port: int) -> None:
    """Raise InvalidJobError for a number that is no port."""
    if not 1 <= port <= PORT_MAX:
        raise InvalidJobError(f"a port is a number from 1 to {PORT_MAX}, not {port}")


def check_upload(name: str) -> None:
    """Check the name of an upload. Raises InvalidJobError."""
    if not _UPLOAD.fullmatch(name):
        raise InvalidJobError("the name of an upload is 1 to 64 letters, digits, _ and -")


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar archive of a file or a directory in a job, or one that is unpacked there. Raises InvalidJobError.

    A `path` that is not absolute begins in the job's workspace, or else in its own directory. In the archive
    of `a/b` every name begins with `b`. With `unpack` an archive is made into files: in the directory `path`,
    which is made where it is missing; with a `name`, which every name in the archive has to begin with, as
    `path/name`, or as `path` itself where that is no directory.
    """

    path: str
    unpack: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for value, what in ((self.path, "a path in a job"), (self.name, "a name in an archive")):
            if not isinstance(value, str):
                raise InvalidJobError(f"{what} is text, not {value!r:.80}")
            if checked_size(value, what) > PATH_MAX_BYTES:
                raise InvalidJobError(f"{what} is longer than {PATH_MAX_BYTES} bytes")
        if not self.path:
            raise InvalidJobError("a path in a job is empty", hint="its own directory is .")
        if self.name and not self.unpack:
            raise InvalidJobError("only what is unpacked has a name")
        if "/" in self.name or self.name in (".", ".."):
            raise InvalidJobError(f"{self.name[:80]!r} is no name of a file")

    @property
    def argv(self) -> tuple[str, ...]:
        """The command of the program that does it."""
        if self.unpack:
            return ("pjw-archive", "unpack", self.name, self.path)
        return ("pjw-archive", "pack", self.path)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """The request for a job: a shell command (one string) or an argv (a sequence), and its settings.

    A string is run by `/bin/sh -c`; a sequence is executed as it is. `limits` replaces single defaults,
    within the operator's ceilings; sizes and times are numbers of bytes and seconds, or text: "64M", "1h30m".
    `env` is added to the job's environment, and so are `secrets`, which no other call tells and which are
    stored only while the job waits in the queue, or may be tried again. `workdir` is the command's first
    directory, as the job sees it. With `input` the command reads the bytes that are streamed to the job. With
    a `terminal` its stdin, stdout and stderr are one terminal of that size, and the streamed bytes are typed
    into it. `workspace` names a directory of the client's own, made when it is first named: it outlives jobs,
    and the command begins there. An `exclusive` job has it alone. Two starts of one client with the same
    `request_id` are one. With `queue` the job waits for its turn in the queue, instead of being started or
    refused at once. `upload` names files that were sent before (`Client.upload`); they are unpacked in the
    job's workspace, or else its own directory, before the command starts. `allow` has the names on the
    network that the job may reach, as far as the operator offers them: `pypi.org`, `*.example.org`,
    `db.example.org:5432`. Jobs of one client with the same `link` share a network. `outputs` are patterns of
    files in that directory that are kept when the command has ended (`Job.artifacts`): `*`, `?` and `[...]`
    within a name, `**` for any directories; a directory that matches is kept whole. With `output_required` a
    job that ends without such files has not succeeded. `image` is the name of an image, whose files the job
    sees instead of the host's; files that the job writes there go with it, and if it is `read_only` it writes
    nothing there. Then the command may be empty: the image's own command runs. `mounts` are directories that
    the operator offers, each as `NAME` (at /mnt/NAME) or `NAME:PATH`. `gpus` is the number of GPUs that the
    job has for itself. `node` is the only machine of a cluster that may have the job; the operator says which
    clients may choose one. `partition` and `constraint` go to Slurm, which gives the job a place in that
    partition, on a node with that feature; the operator says which ones jobs may name.

    docs/limits.md, docs/queue.md, docs/workspaces.md, docs/images.md, docs/mounts.md, docs/network.md and
    docs/gpus.md describe these settings. Raises InvalidJobError.
    """

    command: str | Sequence[str]
    limits: Mapping[str, int | str] = field(default_factory=dict)
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    split_stderr: bool = False
    input: bool = False
    request_id: str = ""
    terminal: TerminalSize | None = None
    queue: QueueSpec | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    upload: str = ""
    workspace: str = ""
    exclusive: bool = False
    outputs: Sequence[str] = ()
    output_required: bool = False
    image: str = ""
    read_only: bool = False
    mounts: Sequence[str] = ()
    allow: Sequence[str] = ()
    link: str = ""
    gpus: int = 0
    node: str = ""
    partition: str = ""
    constraint: str = ""

    @classmethod
    def of(cls, spec: "Self | str | Sequence[str]") -> "JobSpec":
        """Return the spec itself, or a spec of a command alone. Raises InvalidJobError."""
        return spec if isinstance(spec, JobSpec) else cls(spec)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_command()
        check_name(self.name)
        check_labels(self.labels)
        if self.image:
            check_image(self.image)
        elif self.read_only:
            raise InvalidJobError("a job without an image writes nothing outside its own directory anyway")
        if self.workspace:
            # a job that loads an image has the image's directory as its workspace (worker/images.py)
            if not is_image_key(self.workspace):
                check_workspace(self.workspace)
        elif self.exclusive:
            raise InvalidJobError("an exclusive job is alone in its workspace, and this one has none")
        self._check_env()
        if self.workdir and not self.workdir.startswith("/"):
            raise InvalidJobError(f"the working directory {self.workdir!r} is not an absolute path")
        if checked_size(self.workdir, "the working directory") > PATH_MAX_BYTES:
            raise InvalidJobError(f"the working directory is longer than {PATH_MAX_BYTES} bytes")
        if self.terminal is not None and self.split_stderr:
            raise InvalidJobError("a terminal has one output: stderr cannot be kept apart from it")
        if self.request_id and not _REQUEST_ID.fullmatch(self.request_id):
            raise InvalidJobError("a request id is 1 to 64 printable characters of ASCII without spaces")
        if self.upload:
            check_upload(self.upload)
        if self.outputs:
            object.__setattr__(self, "outputs", check_outputs(self.outputs))
        elif self.output_required:
            raise InvalidJobError("no output is required: say which, as in 'dist/**'")
        if self.mounts:
            object.__setattr__(self, "mounts", check_mounts(self.mounts))
        if self.allow:
            # imported here, as most jobs have no network
            from pjw.network import check_allow

            object.__setattr__(self, "allow", check_allow(self.allow))
        if self.link:
            check_link(self.link)
        check_gpus(self.gpus)
        check_slurm_name("partition", self.partition)
        check_slurm_name("constraint", self.constraint)

    def _check_types(self) -> None:
        """Refuse wrong types with a message, for programs that no type checker has seen."""
        for name in ("limits", "labels", "env"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InvalidJobError(
                    f"the {name} of a job are names with values (a dict), not {value!r:.80}"
                )
            for key, each in value.items():
                if not isinstance(key, str) or (name != "limits" and not isinstance(each, str)):
                    raise InvalidJobError(f"the {name} of a job are text, not {key!r:.80}: {each!r:.80}")
        # without a value in the words
        secrets: object = self.secrets
        if not isinstance(secrets, Mapping) or not all(
            isinstance(text, str) for each in secrets.items() for text in each
        ):
            raise InvalidJobError("the secrets of a job are names with values (a dict), both of them text")
        for name in _TEXTS:
            if not isinstance(value := getattr(self, name), str):
                raise InvalidJobError(f"the {name} of a job is text, not {value!r:.80}")
        for name in ("outputs", "mounts", "allow"):
            listed: object = getattr(self, name)
            if (
                isinstance(listed, str)
                or not isinstance(listed, Sequence)
                or not all(isinstance(each, str) for each in listed)
            ):
                raise InvalidJobError(f"the {name} of a job are a list of text, not {listed!r:.80}")
        command: object = self.command
        if not isinstance(command, Sequence) or not all(isinstance(word, str) for word in command):
            raise InvalidJobError(
                f"a command is text, or a list of a program and its arguments, not {command!r:.80}"
            )
        if self.queue is not None and not isinstance(self.queue, QueueSpec):
            raise InvalidJobError(f"the queue of a job is a QueueSpec, not {self.queue!r:.80}")
        if self.input and self.queue is not None and self.queue.retry is not None:
            raise InvalidJobError("a job that is tried again has no input: an attempt would have used it up")
        if self.input and self.queue is not None and self.queue.array:
            raise InvalidJobError("an array has no input: its first element would have used it up")

    def _check_env(self) -> None:
        total = 0
        if both := sorted(self.env.keys() & self.secrets.keys()):
            raise InvalidJobError(f"{both[0]} is given both as a variable and as a secret")
        for name, value in (*self.env.items(), *self.secrets.items()):
            if not is_variable(name):
                raise InvalidJobError(
                    f"{name[:80]!r} is no name of an environment variable: letters, digits and _"
                )
            total += len(name) + checked_size(value, f"the environment variable {name[:80]}") + 2
        if total > ARGUMENTS_MAX_BYTES:
            raise InvalidJobError(
                f"the environment is {total} bytes long; at most {ARGUMENTS_MAX_BYTES} are allowed"
            )

    def _check_command(self) -> None:
        if isinstance(self.command, str):
            if not self.command.strip():
                raise InvalidJobError("the command is empty")
        elif self.image and not self.command:
            return
        elif not self.command or not self.command[0]:
            raise InvalidJobError("the command is empty")
        total = 0
        for argument in self.argv:
            size = checked_size(argument, "the command")
            total += size + 1
        if total > ARGUMENTS_MAX_BYTES:
            raise InvalidJobError(
                f"the command is {total} bytes long with all its arguments;"
                f" at most {ARGUMENTS_MAX_BYTES} are allowed"
            )

    @property
    def argv(self) -> tuple[str, ...]:
        """The program to execute, with its arguments."""
        if isinstance(self.command, str):
            return ("/bin/sh", "-c", self.command)
        return tuple(self.command)

    @property
    def directory(self) -> str:
        """The command's first directory, as the job sees it."""
        return self.workdir or base_of(self.workspace)

    @property
    def display(self) -> str:
        """The command on one line, as it could be typed into a shell."""
        if not self.command:
            return IMAGES_OWN_COMMAND
        # of the client only `start` needs it
        import shlex

        return self.command if isinstance(self.command, str) else shlex.join(self.command)


def base_of(workspace: str) -> str:
    """Return the base of a job's relative paths, as the job sees it: its workspace, if it has one."""
    return WORKSPACE_DIRECTORY if workspace else JOB_DIRECTORY


def is_name(text: str) -> bool:
    """Return whether a job can have this name."""
    return _NAME.fullmatch(text) is not None


def is_variable(text: str) -> bool:
    """Return whether an environment variable can have this name."""
    return _VARIABLE.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Check the name of a job; the empty name means none, and is allowed. Raises InvalidJobError."""
    if name and not is_name(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for a job: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def is_workspace(text: str) -> bool:
    """Return whether a workspace can have this name: a job's name, and also a directory's."""
    return is_name(text)


def check_workspace(name: str) -> None:
    """Check the name of a workspace. Raises InvalidJobError."""
    if not is_workspace(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for a workspace: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def check_image(name: str) -> None:
    """Check the name of an image. Raises InvalidJobError."""
    if not is_name(name):
        raise InvalidJobError(
            f"{name[:80]!r} is no name for an image: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def check_link(link: str) -> None:
    """Check the name of a shared network; the rule is that of jobs' names. Raises InvalidJobError."""
    if not is_name(link):
        raise InvalidJobError(
            f"{link[:80]!r} is no name for a link: up to 63 letters, digits, '.', '_' and '-',"
            " the first a letter"
        )


def is_image_key(text: str) -> bool:
    """Return whether this is pjwd's own name of the directory of an image that a client has loaded."""
    return _IMAGE_KEY.fullmatch(text) is not None


def is_image_digest(text: str) -> bool:
    """Return whether this is the digest of an image of the operator's."""
    return _IMAGE_DIGEST.fullmatch(text) is not None


def check_labels(labels: Mapping[str, str]) -> None:
    """Check the labels of a job. Raises InvalidJobError."""
    if len(labels) > LABELS_MAX:
        raise InvalidJobError(f"a job has at most {LABELS_MAX} labels, not {len(labels)}")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidJobError(
                f"{key[:80]!r} is no key of a label: up to 63 letters, digits, '.', '_', '/' and '-',"
                " the first a letter"
            )
        if len(value) > LABEL_VALUE_MAX_CHARACTERS or not value.isprintable():
            raise InvalidJobError(
                f"the label {key} must have a printable value of at most {LABEL_VALUE_MAX_CHARACTERS}"
                " characters"
            )


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The start of jobs in an image: additions to their environment, directory, and command.

    Raises InvalidJobError for a value that no job could have.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        # as it would be in a job's own spec
        JobSpec([*self.entrypoint, *self.command] or "true", env=self.env, workdir=self.workdir)
        # all of it is in every list of images
        words = (*self.env, *self.env.values(), *self.entrypoint, *self.command)
        if sum(map(len, words)) > _IMAGE_CONFIG_CHARACTERS_MAX:
            raise InvalidJobError(
                "the variables and the command of an image have more than"
                f" {_IMAGE_CONFIG_CHARACTERS_MAX} characters"
            )

    def applied_to(self, spec: JobSpec) -> JobSpec:
        """Return the spec to execute for a spec in an image with this config. Raises InvalidJobError."""
        argv = (*self.entrypoint, *(spec.argv if spec.command else self.command))
        if not argv:
            raise InvalidJobError(f"the image {spec.image} has no command of its own", hint="give one")
        given = {*spec.env, *spec.secrets}
        env = {**{name: value for name, value in self.env.items() if name not in given}, **spec.env}
        # files that are sent or kept are in the job's own directory, and so the command is to begin there
        elsewhere = spec.workdir or spec.workspace or spec.upload or spec.outputs
        return replace(
            spec,
            # a shell's command stays one, as it is shown to people
            command=spec.command if argv == spec.argv and spec.command else argv,
            env=env,
            workdir=spec.workdir if elsewhere else self.workdir,
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image that jobs can have, at one moment. Times are in UTC.

    It is the operator's, for every client, unless it has a `client_name`. `digest` covers the whole image, as
    its maker states it. `used` is when a job was last started with it; for one of the operator's it is when
    it was made.
    """

    name: str
    digest: str
    made: datetime
    used: datetime
    bytes: int = 0
    inodes: int = 0
    jobs: int = 0
    client_name: str = ""
    config: ImageConfig = field(default_factory=ImageConfig)
