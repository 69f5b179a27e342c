"""`pjw artifacts`, and the part of `pjw run` that reports and fetches the artifacts of its job."""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from pjw.cli import render
from pjw.cli.connection import connect, resolve_id
from pjw.cli.copy import Count, tell_left_out
from pjw.cli.exits import say
from pjw.cli.progress import Progress
from pjw.cli.units import size_in_words
from pjw.model import ArtifactsState, EndReason, Job

if TYPE_CHECKING:
    from pjw.client.artifacts import Artifact
    from pjw.client.sync import Client


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
