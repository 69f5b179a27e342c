"""The options of each command, and the parsers of their values.

No code that carries out a command is imported here, except for an option that needs it.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, Final

from pjw.cli import units
from pjw.cli.connection import job_name, server
from pjw.errors import InvalidJobError

FORMATS: Final = ("table", "ids", "json", "jsonl")
# A test compares these with the model: its import would cost each command time.
_STATES: Final = ("queued", "starting", "running", "stopping", "exited", "lost")
_ENDED: Final = ("exited", "lost")
_STOPPABLE: Final = ("queued", "starting", "running", "stopping")
_REASONS: Final = (
    "completed", "stopped", "timed_out", "output_limit", "oom_killed", "lost", "host_restarted",
    "launch_interrupted", "disk_limit", "output_failed", "cancelled", "start_failed",
    "artifacts_missing", "node_lost", "revoked",
)  # fmt: skip


def for_run(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw run`."""
    command.add_argument("-d", "--detach", action="store_true", help="print the id, and leave it running")
    _add_escape(command)
    command.add_argument("--id-file", metavar="FILE", help="write the job's id into this new file")
    _add_grace(command)
    command.add_argument(
        "--output-dir", metavar="DIR", help="copy what --output has kept into DIR when it has ended"
    )
    for_start(command)


def for_start(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw start`: all that a job can have."""
    job = command.add_argument_group("the job")
    job.add_argument("--name", metavar="NAME", help="call it by this; no two that run bear the same")
    job.add_argument(
        "--label",
        type=units.key_and_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="to find it by",
    )
    _add_environment(job)
    _add_secrets(job)
    _add_upload(job)
    _add_outputs(job, sizes=True)
    job.add_argument("--stdin", metavar="FILE", help="what it reads; - for what pjw reads; default: nothing")
    job.add_argument("-i", dest="stdin", action="store_const", const="-", help="the same as --stdin -")
    _add_terminal(job)
    job.add_argument(
        "--workspace",
        metavar="WORKSPACE",
        help="a directory of yours that stays, at /run/workspace; begin there",
    )
    job.add_argument(
        "--image",
        metavar="IMAGE",
        help="see this image's files, and none of the machine's; without CMD run the image's own command",
    )
    job.add_argument("--read-only", action="store_true", help="do not let the job write to its image")
    job.add_argument("--exclusive", action="store_true", help="no other job is in its workspace meanwhile")
    job.add_argument(
        "--mount",
        dest="mounts",
        action="append",
        default=[],
        metavar="NAME[:PATH]",
        help="mount this directory of your operator's (see pjw quota) at PATH; default: /mnt/NAME",
    )
    job.add_argument(
        "--allow", action="append", default=[], metavar="HOST[:PORT]",
        help="let the job reach this host, or *.SUFFIX, through a proxy; with a port also without it",
    )  # fmt: skip
    job.add_argument(
        "--link", metavar="NAME", help="share a network with your running jobs that have this link"
    )
    job.add_argument(
        "--gpus",
        type=units.count,
        default=0,
        metavar="N",
        help="give the job N GPUs for itself (see pjw quota)",
    )
    job.add_argument(
        "--node", metavar="NAME", help="through a gateway: run on this node, if your operator allows it"
    )
    job.add_argument(
        "--partition",
        metavar="NAME",
        help="through a gateway with Slurm: run in this partition, if your operator allows it",
    )
    job.add_argument(
        "--constraint", metavar="FEATURE", help="the same: run on a node with this feature of Slurm's"
    )
    job.add_argument("--split-stderr", action="store_true", help="keep stderr apart from stdout")
    queue = command.add_argument_group("its place in the queue", "each of these puts the job into the queue")
    queue.add_argument(
        "--queue", action="store_true", help="wait for a turn, instead of being started or refused at once"
    )
    queue.add_argument(
        "--priority",
        type=units.priority,
        metavar="N",
        help="before your other jobs: -1000 to 1000, default 0",
    )
    queue.add_argument(
        "--not-before", type=units.coming, metavar="TIME", help="not before: 2h (from now), 22:30"
    )
    queue.add_argument(
        "--after", type=units.after, action="append", metavar="ID[:ok|failed|any]",
        help="not before this job of yours has ended well (ok, the default), otherwise, or however",
    )  # fmt: skip
    queue.add_argument(
        "--array", type=units.array, metavar="INDICES[%N]",
        help="once for each index, at most N at once: 1-100%%8, 1,3,7, 0-20:5; it has PJW_ARRAY_INDEX",
    )  # fmt: skip
    queue.add_argument(
        "--retry", type=units.count, metavar="N", help="try again, up to so many times, when it fails"
    )
    queue.add_argument(
        "--retry-on", type=units.ends, metavar="ENDS",
        help="only after these: exit codes, oom, timeout, separated by commas",
    )  # fmt: skip
    queue.add_argument(
        "--backoff",
        type=units.seconds,
        metavar="TIME",
        help="before the first retry, then doubled; default 5s",
    )
    queue.add_argument("--rerun-if-lost", action="store_true", help="also when nobody knows how it ended")
    queue.add_argument("--hold", action="store_true", help="not before pjw release")
    limits = command.add_argument_group(
        "its limits", "0 is no limit; your operator sets defaults and ceilings"
    )
    limits.add_argument("--cpus", type=units.millicores, metavar="N", help="processors: 0.5, 2")
    limits.add_argument("-m", "--memory", type=units.size, metavar="SIZE", help="memory: 256M, 1.5G")
    limits.add_argument("--pids", type=units.count, metavar="N", help="processes and threads")
    limits.add_argument("--io-read", type=units.size, metavar="SIZE", help="bytes a second read")
    limits.add_argument("--io-write", type=units.size, metavar="SIZE", help="bytes a second written")
    limits.add_argument("--iops", type=units.count, metavar="N", help="reads a second, and writes a second")
    limits.add_argument(
        "--timeout", type=units.whole_seconds, metavar="TIME", help="time: 90s, 1h30m; then it is killed"
    )
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")


def for_exec(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw exec`."""
    command.add_argument(
        "-d", "--detach", action="store_true", help="leave it running until the job ends; print JOB/NUMBER"
    )
    _add_environment(command)
    command.add_argument(
        "--stdin", metavar="FILE", help="what it reads; - for what pjw reads; default: nothing"
    )
    command.add_argument("-i", dest="stdin", action="store_const", const="-", help="the same as --stdin -")
    _add_terminal(command)
    _add_escape(command)
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")


def _add_environment(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "-e", "--env", action="append", default=[], metavar="KEY[=VALUE]",
        help="set a variable, or pass on the one that is set here",
    )  # fmt: skip
    group.add_argument(
        "--env-file", action="append", default=[], metavar="FILE", help="the same, a line each; # comments"
    )
    group.add_argument("-w", "--workdir", metavar="DIR", help="begin there; an absolute path")


def _add_terminal(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="give it a terminal, of the size of yours; with -i yours is that",
    )


def _add_escape(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--escape",
        type=_escape,
        default="~",
        metavar="CHAR",
        help="with -it: CHAR and . at the beginning of a line leave; default ~; none turns it off",
    )


def _escape(text: str) -> str | None:
    if text == "none":
        return None
    if len(text) != 1 or not text.isascii() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither a character of ASCII nor none")
    return text


def _add_secrets(group: "argparse._ActionsContainer") -> None:
    """Add --secret and --secret-file to the options of a command that makes jobs."""
    group.add_argument(
        "--secret", action="append", default=[], metavar="KEY[=VALUE]",
        help="a variable for the job alone, which pjw shows nowhere; KEY: the one that is set here",
    )  # fmt: skip
    group.add_argument(
        "--secret-file", action="append", default=[], metavar="FILE", help="the same, a line each; # comments"
    )


def _add_upload(group: "argparse._ActionsContainer") -> None:
    """Add --upload to the options of a command that makes jobs."""
    group.add_argument(
        "--upload", action="append", default=[], type=_source, metavar="DIR[:PATH]",
        help="put what is in DIR, or a file, into its directory before it starts, or into PATH there",
    )  # fmt: skip


def _source(text: str) -> Any:  # noqa: ANN401  imported only for this option
    from pjw.cli.copy import source

    return source(text)


class _Output(argparse.Action):
    """--output: a number of bytes, which is a limit, or else a pattern of files; of these several."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401  argparse's own word for it
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, int):
            namespace.output = values
        else:
            namespace.outputs = [*namespace.outputs, values]


def size_or_pattern(text: str) -> int | str:
    """Parse the value of --output: a number of bytes, or a pattern of files, which begins with no digit."""
    try:
        return units.size(text)
    except argparse.ArgumentTypeError as error:
        if text[:1].isdigit():
            raise argparse.ArgumentTypeError(f"{error}; a pattern of files would be ./{text}") from None
    # only for this option
    from pjw.model import check_outputs

    try:
        return check_outputs([text])[0]
    except InvalidJobError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_outputs(group: "argparse._ActionsContainer", *, sizes: bool) -> None:
    """Add --output and --output-required to the options of a command that makes jobs."""
    text = "keep what matches in its directory when it has ended, such as 'dist/**'; see pjw artifacts"
    if sizes:
        text += ". A SIZE bounds its output; then it is killed"
    group.add_argument(
        "--output", action=_Output, default=None, type=size_or_pattern if sizes else str,
        metavar="GLOB|SIZE" if sizes else "GLOB", help=text,
    )  # fmt: skip
    group.add_argument(
        "--output-required", action="store_true", help="it has not succeeded when nothing could be kept"
    )
    group.set_defaults(outputs=[])


def for_attach(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw attach`."""
    command.add_argument(
        "terminal",
        type=_terminal,
        metavar="JOB[/NUMBER]",
        help="a job's id or name, and a session's number",
    )
    _add_escape(command)


def _terminal(text: str) -> tuple[int | str, int]:
    name, slash, number = text.partition("/")
    if slash and not (number.isascii() and number.isdecimal() and 0 < int(number) < 2**31):
        raise argparse.ArgumentTypeError(f"{number[:40]!r} is not the number of a session")
    return job_name(name), int(number) if slash else 0


def for_forward(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw forward`."""
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")
    command.add_argument(
        "ports", type=_ports, metavar="PORT[:PORT]", help="the port here, 0 for any, and that of the job"
    )


def _ports(text: str) -> tuple[int, int]:
    local, colon, remote = text.partition(":")
    words = (local, remote) if colon else (local, local)
    if not all(word.isascii() and word.isdecimal() and int(word) < 65_536 for word in words) or not int(
        words[1]
    ):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither a port nor two: 8080, 8080:80, 0:80")
    return int(words[0]), int(words[1])


def for_list(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw list`."""
    command.add_argument(
        "--format", type=_list_format, metavar="FORMAT", help=f"{', '.join(FORMATS)} or template:…"
    )
    command.add_argument(
        "--state", choices=_STATES, action="append", default=[], help="only in this state, or one of several"
    )
    _add_label_filter(command)
    command.add_argument("--name", metavar="NAME", help="only of this name")
    command.add_argument(
        "--array", type=units.count, metavar="ID", help="only elements of this array that had their turn"
    )
    command.add_argument("--failed", action="store_true", help="only those that failed or are lost")
    command.add_argument(
        "--reason", choices=_REASONS, action="append", default=[], metavar="REASON",
        help=f"only those that ended for this reason: {', '.join(_REASONS)}",
    )  # fmt: skip
    command.add_argument(
        "--since", type=units.moment, metavar="TIME", help="only those started since this time: 10m (ago)"
    )
    command.add_argument(
        "-n", "--limit", type=_limit, metavar="N|all",
        help="only the N newest; by default all, but at a terminal the newest 20 and all that run",
    )  # fmt: skip
    for_all(command)


def _limit(text: str) -> int | str:
    """Parse the number of jobs that `list` shows: a number, or `all`."""
    return text if text == "all" else units.count(text)


def _list_format(text: str) -> object:
    """Parse a format of `list`: a name, or a template."""
    if text in FORMATS:
        return text
    kind, _, template = text.partition(":")
    if kind != "template":
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of {', '.join(FORMATS)} and template:…")
    from pjw.cli.template import Template

    return Template(template)


def _add_label_filter(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--label", type=units.key_and_value, action="append", default=[], metavar="KEY=VALUE",
        help="only with this label, and all others that are given",
    )  # fmt: skip


def for_logs(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw logs`."""
    command.add_argument("job", type=job_name, metavar="JOB")
    command.add_argument(
        "-f", "--follow", action=argparse.BooleanOptionalAction, default=True,
        help="go on until the job ends, which is the default; or end after the output so far",
    )  # fmt: skip
    command.add_argument("-n", "--tail", type=units.count, metavar="N", help="begin N lines before the end")
    command.add_argument(
        "--since", type=units.moment, metavar="TIME", help="begin with the output of this time: 10m (ago)"
    )
    command.add_argument("--offset", type=units.size, default=0, metavar="BYTES", help="begin at this byte")
    command.add_argument(
        "-t",
        "--timestamps",
        action="store_true",
        help="begin each line with the time of its writing",
    )
    command.add_argument("--stderr", action="store_true", help="the stderr of a job that keeps it apart")
    command.add_argument(
        "--raw",
        action="store_true",
        help="pass every byte to a terminal; without it pjw shows control characters as text",
    )
    for_all(command)


def for_wait(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw wait`."""
    _add_jobs(command)
    command.add_argument(
        "--format", type=_line_format, metavar="FORMAT",
        help="print each job as jsonl or template:…, as `list` does, instead of its exit code",
    )  # fmt: skip
    for_all(command)


def _line_format(text: str) -> object:
    """Return, for a format of `wait`, the function that makes the line of a job."""
    if text != "jsonl" and not text.startswith("template:"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither jsonl nor template:…")
    form = _list_format(text)
    from pjw.cli import render

    if form == "jsonl":
        return render.job_line
    shown = render.printable if sys.stdout.isatty() else str
    return lambda job: form.fill(job, shown)  # type: ignore[attr-defined]


def for_stop(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw stop`."""
    _add_jobs_or_filters(command, _STOPPABLE)
    for_all(command)
    _add_grace(command)
    command.add_argument(
        "-s",
        "--signal",
        type=units.signal_number,
        default=0,
        metavar="SIGNAL",
        help="instead of TERM: INT",
    )


def _add_grace(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--grace",
        type=units.seconds,
        metavar="TIME",
        help="from SIGTERM to SIGKILL; by default the server's, 10 s",
    )


def for_rm(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw rm`."""
    _add_jobs_or_filters(command, _ENDED)
    for_all(command)


def _add_jobs_or_filters(command: argparse.ArgumentParser, states: tuple[str, ...]) -> None:
    command.add_argument("jobs", type=job_name, nargs="*", metavar="JOB", help="a job's id, or its name")
    _add_label_filter(command)
    command.add_argument(
        "--state", choices=states, action="append", default=[], help="all in this state, or one of several"
    )


def for_prune(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw prune`."""
    _add_label_filter(command)
    command.add_argument(
        "--before", type=units.moment, metavar="TIME", help="only those that ended before this time: 7d (ago)"
    )
    command.add_argument("-f", "--force", action="store_true", help="do not ask")


def for_queue(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw queue`."""
    command.add_argument(
        "--format", choices=("table", "ids", "json"), help="default table at a terminal, else ids"
    )
    for_all(command)


def for_jobs(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw get`, `pjw hold` and `pjw release`."""
    _add_jobs(command)
    for_all(command)


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("jobs", type=job_name, nargs="+", metavar="JOB", help="a job's id, or its name")


def for_all(command: argparse.ArgumentParser) -> None:
    """Add --all to the options of a command."""
    command.add_argument(
        "--all",
        action="store_true",
        # the option of the same name before the command counts as well
        default=argparse.SUPPRESS,
        help="the jobs of every client, not only yours; your operator must allow it",
    )


def for_submit(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw submit`."""
    _add_secrets(command)
    _add_upload(command)
    _add_outputs(command, sizes=False)
    command.add_argument("file", metavar="FILE", help="at most 500 jobs; - for stdin")


def for_events(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw events`."""
    begin = command.add_mutually_exclusive_group()
    begin.add_argument(
        "--since",
        type=units.count,
        metavar="NUMBER",
        help="begin behind the change of this number; 0: the first",
    )
    begin.add_argument("--list", action="store_true", help="begin with the jobs as they are now")
    command.add_argument(
        "-f", "--follow", action=argparse.BooleanOptionalAction, default=True,
        help="go on for ever, which is the default; or end after the changes so far",
    )  # fmt: skip
    command.add_argument(
        "--job",
        type=job_name,
        action="append",
        default=[],
        metavar="JOB",
        help="only of this job, or of several",
    )
    command.add_argument(
        "--state", choices=_STATES, action="append", default=[], help="only to this state, or to several"
    )
    command.add_argument(
        "--label", type=units.key_and_value, action="append", default=[], metavar="KEY=VALUE",
        help="only of jobs with this label, and all others that are given",
    )  # fmt: skip
    command.add_argument("--name", metavar="NAME", help="only of jobs of this name")
    for_all(command)
    command.add_argument(
        "--format", choices=("table", "jsonl"), help="default table at a terminal, else jsonl"
    )
    command.add_argument(
        "--json", dest="format", action="store_const", const="jsonl", help="the same as --format jsonl"
    )


def for_stats(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw stats`."""
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")
    for_all(command)
    command.add_argument(
        "--format", choices=("plot", "json"), default="plot", help="default plot; json has every sample"
    )


def for_quota(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw quota`."""
    command.add_argument("client", nargs="?", default="", metavar="CLIENT", help="default: yourself")
    for_all(command)
    command.add_argument("--format", choices=("table", "json"), default="table", help="default table")


def for_cp(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw cp`."""
    command.add_argument("source", type=_place, metavar="SOURCE", help="PATH, JOB:PATH or -")
    command.add_argument("target", type=_place, metavar="TARGET", help="JOB:PATH, PATH or -")


def _place(text: str) -> Any:  # noqa: ANN401  imported only for this command
    from pjw.cli.copy import place

    return place(text)


def for_artifacts(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw artifacts`."""
    for_all(command)
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")


def for_help(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw help`."""
    command.add_argument("words", nargs="*", metavar="COMMAND|TOPIC")


def for_completion(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw completion`."""
    command.add_argument("shell", choices=("bash", "zsh", "fish"))


# The options of commands with actions, such as `pjw context add`.


def for_context_add(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw context add`."""
    command.add_argument("name", metavar="NAME")
    command.add_argument("bundle", metavar="FILE", help="- for stdin")
    command.add_argument(
        "--replace", action="store_true", help="replace a context of this name, for a new certificate"
    )
    command.add_argument(
        "--server",
        type=server,
        metavar="HOST[:PORT]",
        # the option of the same name before the command counts as well
        default=argparse.SUPPRESS,
        help="instead of the bundle's",
    )


def for_context_use(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw context use`."""
    command.add_argument("name", metavar="CONTEXT")


def for_context_show(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw context show`."""
    command.add_argument("name", metavar="CONTEXT", nargs="?", help="default: the current one")


def for_image_load(command: argparse.ArgumentParser) -> None:
    """Add the options of `pjw image load`."""
    command.add_argument("name", metavar="NAME")
    command.add_argument(
        "source", metavar="FILE", help="or oci:DIR[:TAG], docker-archive:FILE[:TAG], dir:DIR"
    )


def for_names(metavar: str) -> Callable[[argparse.ArgumentParser], None]:
    """Return the function that adds the arguments of an action on several things, by their names."""

    def add(command: argparse.ArgumentParser) -> None:
        command.add_argument("names", metavar=metavar, nargs="+")

    return add


def for_list_of_names(command: argparse.ArgumentParser) -> None:
    """Add the options of a list of workspaces, images or nodes."""
    command.add_argument("--format", choices=("table", "names", "json"), help="json has every member")
