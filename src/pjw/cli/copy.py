"""`pjw cp` and `pjw artifacts`: files between this machine and a job; `-` is a tar archive."""

import os
import re
import sys
from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pjw.cli import render, stdin
from pjw.cli.connection import JobName, connect, job_name, resolve_id
from pjw.cli.exits import say
from pjw.cli.terminal import Progress, write_all
from pjw.cli.units import size_in_words
from pjw.errors import InvalidJobError, TerminalError
from pjw.model import ArtifactsState, EndReason, Job

if TYPE_CHECKING:
    from pjw.client.artifacts import Artifact
    from pjw.client.sync import Client


# the part before the colon; a path of this machine that has a colon begins with ./
_IN_JOB = re.compile(r"([^/:\\]+):(.*)", re.DOTALL)


class Place(NamedTuple):
    """A path in a job, or one of this machine, of which `job` is None."""

    job: JobName | None
    path: str


def place(text: str) -> Place:
    """Parse a source or target, as a `type` of argparse: JOB:PATH, a path of this machine, or `-`."""
    found = _IN_JOB.fullmatch(text)
    # C:\file, which is of this machine
    if found is None or (sys.platform == "win32" and len(found[1]) == 1):
        if not text:
            raise ArgumentTypeError("a path is empty")
        return Place(None, text)
    # as with scp, its own directory
    return Place(job_name(found[1]), found[2] or ".")


class Source(NamedTuple):
    """A file or directory to upload, and its place in the job's own directory."""

    path: str
    place: str


def source(text: str) -> Source:
    """Parse a source of an upload, as a `type` of argparse: DIR, or DIR:PATH with the last colon between."""
    from pjw.client.copies import upload_place

    path, colon, into = text.rpartition(":")
    if not colon or os.path.lexists(text):
        path, into = text, ""
    if not path:
        raise ArgumentTypeError("a path is empty")
    try:
        return Source(path, upload_place(into))
    except InvalidJobError as error:
        raise ArgumentTypeError(str(error)) from None


def upload(client: "Client", sources: list[Source]) -> str:
    """Send a job's files and report those left out; return the name for JobSpec.upload."""
    seen = Count("the upload")
    with Progress(seen.words):
        uploaded = client.upload(sources, seen)
    tell_left_out(uploaded.left_out)
    return uploaded.name


def copy(arguments: Namespace) -> int:
    """Copy in the requested direction; report the files left out."""
    source, target = arguments.source, arguments.target
    if (source.job is None) == (target.job is None):
        arguments.parser.error("one of both is in a job, as in 7:src or NAME:/tmp/x, and the other is not")
    if source.job is None:
        return _copy_in(arguments, source.path, target)
    return _copy_out(arguments, source, target.path)


class Count:
    """The number of bytes copied so far, for a user who waits."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bytes = 0

    def __call__(self, count: int) -> None:
        """Note the number of bytes copied so far."""
        self._bytes = count

    def words(self, seconds: float) -> str:
        """Describe the progress after some seconds."""
        rate = size_in_words(int(self._bytes / seconds)) if seconds else "0B"
        return f"{self._what}: {size_in_words(self._bytes)} copied, {rate}/s"


def _copy_in(arguments: Namespace, source: str, target: Place) -> int:
    seen = Count(source)
    assert target.job is not None
    with stdin.opened("-" if source == "-" else None) as descriptor, connect(arguments) as client:
        job_id = resolve_id(client, target.job)
        with Progress(seen.words):
            if descriptor is not None:
                left_out = client.write_archive(job_id, stdin.pieces(descriptor), target.path, seen)
            else:
                left_out = client.copy_to(job_id, source, target.path, seen).left_out
    tell_left_out(left_out)
    return 0


def _copy_out(arguments: Namespace, source: Place, target: str) -> int:
    seen = Count(source.path)
    assert source.job is not None
    if target == "-" and sys.stdout.isatty():
        raise TerminalError("cannot write an archive to a terminal", hint="redirect it: > FILE, or | tar t")
    with connect(arguments) as client:
        job_id = resolve_id(client, source.job)
        if target == "-":
            write_all(client.read_archive(job_id, source.path), sys.stdout.fileno())
            return 0
        with Progress(seen.words):
            left_out = client.copy_from(job_id, source.path, target, seen).left_out
    tell_left_out(left_out)
    return 0


def tell_left_out(left_out: list[str]) -> None:
    """Report the files that were not copied."""
    for each in left_out:
        say(f"left out {each}")


# `pjw artifacts`, and the part of `pjw run` that reports and fetches the artifacts of its job.


def show_artifacts(arguments: Namespace) -> None:
    """Print a job's artifacts: a line each for a person, JSON elsewhere."""
    line = _line if sys.stdout.isatty() else _json_line
    with connect(arguments) as client:
        for each in client.artifacts(resolve_id(client, arguments.job)):
            print(line(each))


def _line(artifact: "Artifact") -> str:
    size = size_in_words(artifact.bytes) if artifact.kind == "file" else ""
    after = {"directory": "/", "link": f" -> {artifact.target}"}.get(artifact.kind, "")
    named = render.printable(artifact.path + after)
    return f"{size:>8}  {artifact.time.astimezone():%Y-%m-%d %H:%M}  {named}"


def _json_line(artifact: "Artifact") -> str:
    members: dict[str, Any] = {
        # bytes that are no UTF-8 are escaped
        "path": artifact.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
        "kind": artifact.kind,
        "bytes": artifact.bytes,
        "time": f"{artifact.time:%Y-%m-%dT%H:%M:%SZ}",
        "executable": artifact.executable,
        "target": artifact.target.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
    }
    return render.json_text(members)


def fetch(client: "Client", job: Job, directory: str | None) -> None:
    """Report the artifacts of a job that has ended; copy them into *directory*, if any.

    Raises ConfigError when they cannot be written there, CopyError when they cannot be read.
    """
    artifacts = job.artifacts
    if artifacts is None or not job.state.final:
        return
    if job.reason is EndReason.ARTIFACTS_MISSING:
        # that was said with its end
        return
    if artifacts.state is not ArtifactsState.KEPT:
        say(f"job {job.ref} has no artifacts: {artifacts.detail}")
        return
    if artifacts.detail:
        say(artifacts.detail)
    if directory is None:
        return
    seen = Count(f"artifacts of job {job.ref}")
    with Progress(seen.words):
        left_out = client.copy_from(job.id, ".", directory, seen).left_out
    tell_left_out(left_out)
