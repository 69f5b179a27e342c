"""One function for each short command: what it asks, and what it prints; each returns the exit code.

What a command needs beyond the standard library's core is imported in it: `pjw get` pays for nothing else.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from pjw.cli.connection import JobName, connect, resolve
from pjw.cli.exits import SIGNALLED, complain
from pjw.errors import PjwError, ServerFailedError

if TYPE_CHECKING:
    from pjw.client.sync import Client
    from pjw.model import Job

T = TypeVar("T")


def list_jobs(arguments: Namespace) -> int:
    """The jobs that are asked for, in the order of their ids, in the format that is asked for."""
    from pjw.model import JobState

    form = arguments.format or ("table" if sys.stdout.isatty() else "ids")
    with connect(arguments) as client:
        jobs: Iterable[Job] = client.list(
            states=[JobState(state) for state in arguments.state],
            labels=dict(arguments.label),
            name=arguments.name or "",
            newest_first=arguments.limit is not None,
            limit=arguments.limit,
        )
        if arguments.limit is not None:
            # the newest ones, shown as all others are
            jobs = reversed(list(jobs))
        if form == "ids":
            for job in jobs:
                print(job.id)
        else:
            _print_jobs(jobs, arguments, form)
    return 0


def _print_jobs(jobs: "Iterable[Job]", arguments: Namespace, form: object) -> None:
    from pjw.cli import render
    from pjw.cli.terminal import has_colours

    if form == "json":
        for piece in render.jobs_json(jobs):
            sys.stdout.write(piece)
        print()
    elif form == "jsonl":
        for job in jobs:
            print(render.job_line(job))
    elif form == "table":
        for line in render.job_table(jobs, with_clients=arguments.all, with_colours=has_colours()):
            print(line)
    else:
        from pjw.cli.template import Template

        assert isinstance(form, Template)
        # only a terminal can be steered; what reads a pipe wants the text as it is
        shown = render.printable if sys.stdout.isatty() else str
        for job in jobs:
            print(form.fill(job, shown))


def get(arguments: Namespace) -> int:
    """One job as the seed shows it; several as an array, without those that are not there."""
    with connect(arguments) as client:
        if len(arguments.jobs) == 1:
            from pjw.cli.render import job_json

            print(job_json(client.get(resolve(client, arguments.jobs[0]))))
            return 0
        return _print_array(arguments.jobs, lambda job: client.get(resolve(client, job)))


def start(arguments: Namespace) -> int:
    """Start a job; its id alone."""
    from pjw.cli import stdin

    with stdin.opened(arguments.stdin) as descriptor, connect(arguments) as client:
        job = start_job(client, arguments)
        print(job.id, flush=True)
        if descriptor is not None:
            stdin.send(client, job.id, descriptor)
    return 0


def start_job(client: "Client", arguments: Namespace) -> "Job":
    """Start the job that is asked for. What is refused is refused in the words of the command line."""
    from pjw.cli.spec import in_options, spec_from

    spec = spec_from(arguments)
    try:
        return client.start(spec)
    except PjwError as error:
        raise in_options(error) from None


def run(arguments: Namespace) -> int:
    """Start a job, be its terminal, and end as it does."""
    if arguments.detach:
        return start(arguments)
    from pjw.cli import stdin
    from pjw.cli.run import run_attached

    with stdin.opened(arguments.stdin) as descriptor, connect(arguments) as client:
        return run_attached(client, arguments, descriptor)


def wait(arguments: Namespace) -> int:
    """The exit code of each job, a line each, when it has ended; 128+n for a signal."""
    from pjw.cli.progress import Progress

    def ended(job: JobName) -> int:
        with Progress(lambda seconds: f"waiting for job {job} to end: {seconds:.0f} s"):
            return exit_code_of_job(client.wait(resolve(client, job)))

    with connect(arguments) as client:
        return each(arguments.jobs, ended, lambda code, _: print(code, flush=True))


def exit_code_of_job(job: "Job") -> int:
    """The exit code of a job as a shell would tell it. Raises ServerFailedError when nobody knows it."""
    status = job.exit_status
    if status is None:
        raise ServerFailedError(f"nobody knows how job {job.id} ended: {job.reason}")
    return SIGNALLED + status.signal if status.signal is not None else status.code or 0


def stop(arguments: Namespace) -> int:
    """Stop jobs at once; each as JSON when all have ended."""
    from pjw.cli.progress import Progress

    with connect(arguments) as client, Progress(_stopping(arguments)):
        jobs = arguments.jobs
        stopping = _beside_each_other(
            jobs,
            lambda job: client.stop(resolve(client, job), grace=arguments.grace, signal=arguments.signal),
        )
        if len(jobs) == 1:
            from pjw.cli.render import job_json

            shown = job_json(stopping(jobs[0]))
        else:
            return _print_array(jobs, stopping)
    print(shown)
    return 0


def _stopping(arguments: Namespace) -> Callable[[float], str]:
    jobs = arguments.jobs
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"{len(jobs)} jobs"

    def words(seconds: float) -> str:
        if arguments.grace is None:
            return f"waiting for {what} to end: {seconds:.0f} s"
        left = arguments.grace - seconds
        return f"waiting for {what} to end: " + (
            f"SIGKILL in {left:.0f} s" if left > 0 else "SIGKILL was sent"
        )

    return words


def _beside_each_other(jobs: list[JobName], ask: "Callable[[JobName], Job]") -> "Callable[[JobName], Job]":
    """Ask for all jobs at once: what gives the answer for one of them."""
    if len(jobs) == 1:
        return ask
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(min(len(jobs), 64))
    asked = {job: threads.submit(ask, job) for job in jobs}
    threads.shutdown(wait=False)
    return lambda job: asked[job].result()


def remove(arguments: Namespace) -> int:
    """Forget jobs; each, as it was typed, when it is gone."""
    with connect(arguments) as client:
        return each(
            arguments.jobs,
            lambda job: client.delete(resolve(client, job)),
            lambda _, job: print(job, flush=True),
        )


def each(jobs: list[JobName], ask: Callable[[JobName], T], show: Callable[[T, JobName], None]) -> int:
    """Ask for one job after the other, and show what comes; a refusal is told, and does not end it."""
    code = 0
    for job in jobs:
        try:
            answer = ask(job)
        except PjwError as error:
            code = complain(error)
        else:
            show(answer, job)
    return code


def _print_array(jobs: list[JobName], ask: "Callable[[JobName], Job]") -> int:
    from pjw.cli.render import jobs_json

    found: list[Job] = []
    code = each(jobs, ask, lambda job, _: found.append(job))
    print("".join(jobs_json(found)))
    return code


def logs(arguments: Namespace) -> int:
    """The bytes of a job's output, and nothing else."""
    with connect(arguments) as client:
        job_id = resolve(client, arguments.job)
        which = {"follow": arguments.follow, "tail": arguments.tail, "stderr": arguments.stderr}
        if arguments.timestamps:
            from pjw.cli.stamps import stamped

            pieces = stamped(client.timed_logs(job_id, arguments.since, **which))
        else:
            pieces = client.logs(job_id, arguments.since, **which)
        write_all(pieces, sys.stdout.fileno())
    return 0


def write_all(pieces: Iterator[bytes], descriptor: int) -> None:
    """Straight to the descriptor: no decoding, and each piece is out before we wait for the next."""
    for data in pieces:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                # who shares this pipe or terminal with us has set it so for all
                from select import select

                select((), (descriptor,), ())
