"""The command of a job or session, as its init reads it: docs/launcher-protocol.md has the format."""

import os
from collections.abc import Iterable

from pjw.model import WORKSPACE_DIRECTORY, Job, JobSpec
from pjw.network import proxy_variables


def command_file(spec: JobSpec, job: Job) -> int:
    """Make a file of memory with a job's command for init; the launcher never reads it.

    Strings, each ended by NUL: the working directory; the additions to the environment, secrets included; an
    empty one; the argv.
    """
    own = {"PJW_WORKSPACE": WORKSPACE_DIRECTORY} if spec.workspace else {}
    if job.allow:
        own |= proxy_variables(job.id, is_linked=bool(job.link))
    variables = {**own, **spec.env, **spec.secrets}
    # init knows the default
    workdir = spec.directory if spec.workspace else spec.workdir
    strings = (workdir, *(f"{name}={value}" for name, value in variables.items()), "", *spec.argv)
    return memory_file("pjw-command", strings)


def memory_file(name: str, strings: Iterable[str]) -> int:
    """Make a file of memory with strings, each ended by NUL; /proc shows its *name*."""
    left = memoryview(b"".join(string.encode() + b"\0" for string in strings))
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
