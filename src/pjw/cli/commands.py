"""One function for each short command: it asks, prints the answer, and returns the exit code.

Imports beyond the standard library's core are in the command that needs them: `pjw get` pays for nothing
else.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pjw.cli.connection import JobName, connect, resolve
from pjw.cli.exits import EXIT_FAILED, EXIT_REFUSED, complain, exit_code_of_job, say, why_ended
from pjw.cli.terminal import write_all
from pjw.errors import ConfigError, PjwError, describe_errno

if TYPE_CHECKING:
    from pjw.client.sync import Client
    from pjw.model import Job

N = TypeVar("N")
T = TypeVar("T")


def list_jobs(arguments: Namespace) -> int:
    """Print the requested jobs, in the order of their ids, in the requested format."""
    from pjw.cli.choice import RECENT_MAX, listed, recent

    form = arguments.format or ("table" if sys.stdout.isatty() else "ids")
    with connect(arguments) as client:
        if form == "table" and sys.stdout.isatty() and arguments.limit is None:
            jobs, more = recent(client, arguments)
            _print_jobs(jobs, arguments, form)
            if more:
                say(f"only the {RECENT_MAX} newest jobs and all that run; `pjw list --limit all` shows all")
            return 0
        if form == "ids":
            for job in listed(client, arguments):
                print(job.id)
        else:
            _print_jobs(listed(client, arguments), arguments, form)
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
        # only a terminal can be steered; the reader of a pipe wants the text as it is
        shown = render.printable if sys.stdout.isatty() else str
        for job in jobs:
            print(form.fill(job, shown))


def get(arguments: Namespace) -> int:
    """Show one job as the seed does; several as an array, without those that are not there."""
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
        send_upload(client, arguments)
        job = start_job(client, arguments)
        print(job.id, flush=True)
        # a terminal's input comes by `pjw attach`
        if descriptor is not None and not arguments.terminal:
            stdin.send(client, job.id, descriptor)
    return 0


def send_upload(client: "Client", arguments: Namespace) -> None:
    """Send the files of the requested job. Nothing is started yet: Ctrl-C just ends this."""
    arguments.upload_name = ""
    if arguments.upload:
        from pjw.cli.copy import upload
        from pjw.cli.spec import spec_from

        # report faults of the job before gigabytes are sent
        spec_from(arguments)
        arguments.upload_name = upload(client, arguments.upload)


def start_job(client: "Client", arguments: Namespace) -> "Job":
    """Start the requested job; word a refusal as the command line does."""
    from pjw.cli.spec import in_options, spec_from

    spec, id_file = spec_from(arguments), getattr(arguments, "id_file", None)
    with _id_file(id_file) as write_id:
        try:
            job = client.start(replace(spec, upload=arguments.upload_name))
        except PjwError as error:
            raise in_options(error) from None
        write_id(job.id)
    if spec.outputs and job.artifacts is None and job.array is None:
        say(f"this server is older than its client: it will keep no files of job {job.id}")
    return job


@contextmanager
def _id_file(path: str | None) -> "Iterator[Callable[[int], None]]":
    """Make a new file before the job is started; give the function that writes the id into it.

    The file is removed again when the start, or the writing, fails.
    """
    if path is None:
        yield lambda _: None
        return
    words = f"cannot write --id-file {path}"
    try:
        file = open(path, "x")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"{words}: {describe_errno(error.errno or 0)}") from error

    def write(job_id: int) -> None:
        try:
            print(job_id, file=file, flush=True)
        except OSError as error:
            why = describe_errno(error.errno or 0)
            raise ConfigError(f"{words}: {why}", hint=f"job {job_id} runs all the same") from error

    try:
        yield write
    except BaseException:
        os.unlink(path)
        raise
    finally:
        with suppress(OSError):
            file.close()


def wait_for_end(
    client: "Client", job_id: Callable[[], JobName], progress: Callable[[], AbstractContextManager[object]]
) -> "Job":
    """Wait for the end of a job, and say so when it cannot go on.

    *progress* is shown while nothing else is said; to find the *job_id* may take a moment, too.
    """
    with progress():
        job = client.wait(job_id(), or_stuck=True)
    if not job.state.final:
        say(f"job {job.ref} {job.detail}")
        with progress():
            job = client.wait(job.id)
    return job


def wait(arguments: Namespace) -> int:
    """Print the exit code of each job when it has ended, 128+n for a signal; return that of a single job."""
    from pjw.cli.terminal import Progress

    codes: list[int] = []

    def ended(name: JobName) -> tuple[str, int]:
        def waiting(seconds: float) -> str:
            return f"waiting for job {name} to end: {seconds:.0f} s"

        job = wait_for_end(client, lambda: resolve(client, name), lambda: Progress(waiting))
        if words := why_ended(job):
            say(words)
        if arguments.format is None:
            code = exit_code_of_job(job)
            return str(code), code
        return arguments.format(job), exit_code_of_job(job) if job.exit_status else EXIT_FAILED

    def show(answer: tuple[str, int], _: JobName) -> None:
        line, code = answer
        codes.append(code)
        print(line, flush=True)

    with connect(arguments) as client:
        refused = each(arguments.jobs, ended, show)
    return codes[0] if len(arguments.jobs) == 1 and codes else refused


def stop(arguments: Namespace) -> int:
    """Stop jobs at once; when all have ended, print each as JSON, or at a terminal as a line."""
    from pjw.cli.choice import STOPPABLE, named_or_fitting
    from pjw.cli.terminal import Progress

    _require_jobs(arguments)
    with connect(arguments) as client:
        jobs = named_or_fitting(client, arguments, STOPPABLE)
        with Progress(_stopping(jobs, arguments.grace)):
            stopping = _beside_each_other(
                jobs,
                lambda job: client.stop(resolve(client, job), grace=arguments.grace, signal=arguments.signal),
            )
            if sys.stdout.isatty():
                from pjw.cli.render import end_line

                lines: list[str] = []
                code = each(jobs, stopping, lambda job, _: lines.append(end_line(job)))
            elif len(arguments.jobs) == 1:
                from pjw.cli.render import job_json

                code, lines = 0, [job_json(stopping(jobs[0]))]
            else:
                return _print_array(jobs, stopping)
    for line in lines:
        print(line)
    return code


def _require_jobs(arguments: Namespace) -> None:
    """Refuse a command with neither jobs nor a filter, and one with both."""
    filtered = bool(arguments.label or arguments.state)
    if filtered and arguments.jobs:
        arguments.parser.error("give either JOB, or --label and --state to select jobs, not both")
    if not filtered and not arguments.jobs:
        arguments.parser.error("the following arguments are required: JOB, or --label or --state")


def _stopping(jobs: Sequence[JobName], grace: float | None) -> Callable[[float], str]:
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"{len(jobs)} jobs"

    def words(seconds: float) -> str:
        if grace is None:
            return f"waiting for {what} to end: {seconds:.0f} s"
        left = grace - seconds
        return f"waiting for {what} to end: " + (
            f"SIGKILL in {left:.0f} s" if left > 0 else "SIGKILL was sent"
        )

    return words


def _beside_each_other(
    jobs: Sequence[JobName], ask: "Callable[[JobName], Job]"
) -> "Callable[[JobName], Job]":
    """Ask for all jobs at once; return a function that gives the answer for one of them."""
    if len(jobs) <= 1:
        return ask
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(min(len(jobs), 64))
    asked = {job: threads.submit(ask, job) for job in jobs}
    threads.shutdown(wait=False)
    return lambda job: asked[job].result()


def hold(arguments: Namespace) -> int:
    """Keep jobs of the queue from being started; each, as it was typed."""
    with connect(arguments) as client:
        return each(arguments.jobs, lambda job: client.hold(resolve(client, job)), show_name)


def release(arguments: Namespace) -> int:
    """Let held jobs of the queue be started; each, as it was typed."""
    with connect(arguments) as client:
        return each(arguments.jobs, lambda job: client.release(resolve(client, job)), show_name)


def show_name(_: object, name: object) -> None:
    """Print a name, for `each`."""
    print(name, flush=True)


def _waits_for_more(job: "Job") -> bool:
    """Return whether a job waits for something beside its turn."""
    return job.held or job.not_before is not None or job.unmet > 0


def show_queue(arguments: Namespace) -> int:
    """Show the jobs that wait, of each client in the order of their turns."""
    from pjw.cli.render import jobs_json, queue_table

    with connect(arguments) as client:
        # jobs with another condition than their turn come after those without
        jobs = sorted(
            client.list(states=["queued"]),
            key=lambda job: (job.client_name, _waits_for_more(job), -job.priority, job.id),
        )
    form = arguments.format or ("table" if sys.stdout.isatty() else "ids")
    if form == "json":
        lines: Iterable[str] = ["".join(jobs_json(jobs))]
    elif form == "table":
        lines = queue_table(jobs, with_clients=arguments.all)
    else:
        lines = (str(job.id) for job in jobs)
    for line in lines:
        print(line)
    return 0


def remove(arguments: Namespace) -> int:
    """Forget jobs; each, as it was typed, when it is gone."""
    from pjw.cli.choice import ENDED, named_or_fitting

    _require_jobs(arguments)
    with connect(arguments) as client:
        return _forget(client, named_or_fitting(client, arguments, ENDED))


def prune(arguments: Namespace) -> int:
    """Forget all jobs that have ended, once the user has confirmed it."""
    from pjw.cli.choice import ENDED, confirmed, elements_first

    if not arguments.force and not (sys.stdin and sys.stdin.isatty()):
        arguments.parser.error("cannot ask for confirmation without a terminal: give --force")
    with connect(arguments) as client:
        ended = client.list(states=ENDED, labels=dict(arguments.label))
        before = arguments.before
        old = (job for job in ended if before is None or (job.end is not None and job.end < before))
        jobs = [job.id for job in elements_first(old)]
        what = "1 job that has ended" if len(jobs) == 1 else f"{len(jobs)} jobs that have ended"
        if jobs and not arguments.force and not confirmed(f"forget {what}, with the output?"):
            return EXIT_REFUSED
        return _forget(client, jobs)


def _forget(client: "Client", jobs: Sequence[JobName]) -> int:
    return each(jobs, lambda job: client.delete(resolve(client, job)), show_name)


def each(names: Sequence[N], ask: Callable[[N], T], show: Callable[[T, N], None]) -> int:
    """Ask for each name in turn, and show the answers; report a refusal and go on."""
    code = 0
    for name in names:
        try:
            answer = ask(name)
        except PjwError as error:
            code = complain(error)
        else:
            show(answer, name)
    return code


def _print_array(jobs: Sequence[JobName], ask: "Callable[[JobName], Job]") -> int:
    from pjw.cli.render import jobs_json

    found: list[Job] = []
    code = each(jobs, ask, lambda job, _: found.append(job))
    print("".join(jobs_json(found)))
    return code


def logs(arguments: Namespace) -> int:
    """Print the bytes of a job's output, and nothing else; at a terminal none that steer it."""
    with connect(arguments) as client:
        job_id = resolve(client, arguments.job)
        which = {name: getattr(arguments, name) for name in ("follow", "tail", "since", "stderr")}
        if arguments.timestamps:
            from pjw.cli.plain import stamped

            pieces = stamped(client.timed_logs(job_id, arguments.offset, **which))
        else:
            pieces = client.logs(job_id, arguments.offset, **which)
        if sys.stdout.isatty() and not arguments.raw:
            from pjw.cli.plain import harmless

            pieces = harmless(pieces)
        with telling_if_stuck(client, job_id) if arguments.follow else nullcontext():
            write_all(pieces, sys.stdout.fileno())
    return 0


@contextmanager
def telling_if_stuck(client: "Client", job_id: JobName) -> Iterator[None]:
    """Say on stderr when the job cannot go on, while its output is followed."""
    from threading import Timer

    from pjw.cli.terminal import QUIET_SECONDS

    def tell() -> None:
        # the follower of the output reports every failure, also a server that has gone
        with suppress(Exception):
            job = client.wait(job_id, or_stuck=True)
            if not job.state.final:
                say(f"job {job.ref} {job.detail}")

    timer = Timer(QUIET_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
