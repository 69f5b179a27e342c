"""The command line: every command and option, and no code that carries them out."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pjw.cli import commands, units
from pjw.cli.connection import job_name, server
from pjw.cli.exits import EXIT_USAGE
from pjw.cli.subcommands import ADDERS, STATES, add_all, add_outputs, add_secrets, add_upload
from pjw.cli.terminal import columns
from pjw.given import DEFAULT_ADDRESS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]  # noqa: SLF001  it has no other name

_EPILOG: Final = """\
exit codes: 0 done, 1 refused, 2 wrong usage, 125 pjw failed (no server, no
certificate), 126 not executable, 127 no such program, 130 interrupted;
pjw run, and pjw wait for one job: the job's own, 128+n for signal n

Put these options before COMMAND; --all may also follow it. All but --all can
also be set as PJW_SERVER, PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY and
PJW_CONTEXT, or in ~/.config/pjw/config.toml. PJW_BUNDLE is a bundle, by its
path or its text.
A JOB is given by its id or its name, an element of an array as 17_5.
"""
_ENDED: Final = ("exited", "lost")
_STOPPABLE: Final = ("queued", "starting", "running", "stopping")
_REASONS: Final = (
    "completed", "stopped", "timed_out", "output_limit", "oom_killed", "lost", "host_restarted",
    "launch_interrupted", "disk_limit", "output_failed", "cancelled", "start_failed",
    "artifacts_missing", "node_lost", "revoked",
)  # fmt: skip
_FORMATS: Final = ("table", "ids", "json", "jsonl")


class Parser(argparse.ArgumentParser):
    """Formatters with a given width: argparse makes one for each argument, which would import shutil."""

    def __init__(
        self,
        *,
        formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **options: Any,  # noqa: ANN401  argparse's own
    ) -> None:
        super().__init__(
            formatter_class=partial(formatter, width=columns() - 2), allow_abbrev=False, **options
        )
        # a command's own parser reports the faults in its words
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Report a fault, and the word that may have been meant."""
        from pjw.cli.help import guess

        self.print_usage(sys.stderr)
        hint = guess(self, message)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n" + (f"hint: {hint}\n" if hint else ""))


def build_parser(words: Sequence[str] = ()) -> Parser:
    """Build the parser of all commands; `run` of its result is the function that carries one out.

    For *words* that begin with a command it has that command alone: building all takes 3 % of a `pjw get`.
    """
    parser = Parser(
        prog="pjw",
        description="Run commands on a machine with pjwd: isolated, limited, their output streamed.",
        epilog=_EPILOG,
        formatter=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version, and exit")
    parser.add_argument("--server", type=server, metavar="HOST[:PORT]", help=f"default {DEFAULT_ADDRESS}")
    parser.add_argument("--ca-crt", metavar="FILE", help="the authority of the server's certificate")
    parser.add_argument("--client-crt", metavar="FILE", help="your certificate")
    parser.add_argument("--client-key", metavar="FILE", help="your key")
    parser.add_argument("--context", metavar="CONTEXT", help="a service by its name, see pjw context")
    parser.add_argument(
        "--all",
        action="store_true",
        help="the jobs of every client, not only yours; your operator must allow it",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    adders = {
        "run": _add_run,
        "start": _add_start,
        "exec": _add_exec,
        "attach": _add_attach,
        "forward": _add_forward,
        "list": _add_list,
        "get": _add_get,
        "logs": _add_logs,
        "wait": _add_wait,
        "stop": _add_stop,
        "rm": _add_rm,
        "prune": _add_prune,
        "queue": _add_queue,
        "hold": _add_hold,
        "release": _add_release,
        **ADDERS,
    }
    only = adders.get(words[0]) if words else None
    for add in adders.values() if only is None else (only,):
        add(subparsers)
    return parser


def _add_run(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "run",
        help="start a job, show its output, and exit as it does",
        usage="pjw run [OPTION]... CMD | pjw run [OPTION]... [--] PROGRAM ARG...",
        description="Start a job, show its output, and exit with its exit code (128+n for signal n). Ctrl-C"
        " stops the job, a second one kills it, a third one leaves it to itself. A lost connection is made"
        " again. One argument is a shell command, run by /bin/sh -c; several are a program with arguments.",
    )
    command.set_defaults(run=commands.run, starts=True)
    command.add_argument("-d", "--detach", action="store_true", help="print the id, and leave it running")
    _add_escape(command)
    command.add_argument("--id-file", metavar="FILE", help="write the job's id into this new file")
    _add_grace(command)
    command.add_argument(
        "--output-dir", metavar="DIR", help="copy what --output has kept into DIR when it has ended"
    )
    _add_job_options(command)


def _add_start(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "start",
        help="start a job and print its id",
        usage="pjw start [OPTION]... CMD | pjw start [OPTION]... [--] PROGRAM ARG...",
        description="Start a job and print its id. One argument is a shell command, run by /bin/sh -c;"
        " several are a program and its arguments, executed as they are.",
    )
    command.set_defaults(run=commands.start, starts=True)
    _add_job_options(command)


def _add_exec(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "exec",
        help="run another command in a job that runs, and exit as it does",
        usage="pjw exec [OPTION]... JOB CMD | pjw exec [OPTION]... JOB [--] PROGRAM ARG...",
        description="Run another command in a job that runs: as its user, with its files, its network and its"
        " limits. Show its output, and exit with its exit code (128+n for signal n). Ctrl-C hangs it up, a"
        " second one leaves it to itself. One argument is a shell command, several are a program with"
        " arguments.",
    )
    command.set_defaults(run=commands.execute, starts=True)
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


def _add_job_options(command: Parser) -> None:
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
    add_secrets(job)
    add_upload(job)
    add_outputs(job, sizes=True)
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


def _add_environment(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "-e", "--env", action="append", default=[], metavar="KEY[=VALUE]",
        help="set a variable, or pass on the one that is set here",
    )  # fmt: skip
    group.add_argument(
        "--env-file", action="append", default=[], metavar="FILE", help="the same, a line each; # comments"
    )
    group.add_argument("-w", "--workdir", metavar="DIR", help="begin there; an absolute path")


def _add_attach(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "attach",
        help="come back to the terminal of a job or of a session",
        description="Be the terminal of a job that was started with -it, or of a session (JOB/NUMBER): show"
        " its last lines, and type into it. The terminal that did so before is detached.",
    )
    command.set_defaults(run=commands.attach, starts=True)
    command.add_argument(
        "terminal",
        type=_terminal,
        metavar="JOB[/NUMBER]",
        help="a job's id or name, and a session's number",
    )
    _add_escape(command)


def _add_forward(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "forward",
        help="let a port of this machine lead to one within a job",
        description="Listen on a port of this machine (127.0.0.1), and carry each connection to a TCP port"
        " within a job that runs, until the job ends, or pjw does.",
    )
    command.set_defaults(run=commands.forward, starts=True)
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


def _add_terminal(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "-t",
        "--terminal",
        action="store_true",
        help="give it a terminal, of the size of yours; with -i yours is that",
    )


def _add_escape(command: Parser) -> None:
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


def _terminal(text: str) -> tuple[int | str, int]:
    name, slash, number = text.partition("/")
    if slash and not (number.isascii() and number.isdecimal() and 0 < int(number) < 2**31):
        raise argparse.ArgumentTypeError(f"{number[:40]!r} is not the number of a session")
    return job_name(name), int(number) if slash else 0


def _add_list(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "list",
        help="list your jobs: their ids, or a table at a terminal",
        description="List your jobs, in the order of their ids. A template is a line for each job, with"
        " names of the JSON in braces: template:'{id} {state} {labels.team} {duration:>9}'.",
    )
    command.set_defaults(run=commands.list_jobs)
    command.add_argument(
        "--format", type=_list_format, metavar="FORMAT", help=f"{', '.join(_FORMATS)} or template:…"
    )
    command.add_argument(
        "--state", choices=STATES, action="append", default=[], help="only in this state, or one of several"
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
    add_all(command)


def _add_label_filter(command: Parser) -> None:
    command.add_argument(
        "--label", type=units.key_and_value, action="append", default=[], metavar="KEY=VALUE",
        help="only with this label, and all others that are given",
    )  # fmt: skip


def _add_get(subparsers: "Commands") -> None:
    command = subparsers.add_parser("get", help="show a job as JSON; several as an array")
    command.set_defaults(run=commands.get)
    _add_jobs(command)
    add_all(command)


def _add_logs(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "logs",
        help="stream a job's output from its first byte until the job ends",
        description="Stream a job's output: its bytes alone, from the first one until the job ends.",
    )
    command.set_defaults(run=commands.logs)
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
    add_all(command)


def _add_wait(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "wait",
        help="wait until jobs have ended; prints the exit code of each",
        description="Wait until jobs have ended, and print the exit code of each (128+n for signal n), a line"
        " each in the order in which they are given. For one job pjw also exits with that code.",
    )
    command.set_defaults(run=commands.wait)
    _add_jobs(command)
    command.add_argument(
        "--format", type=_line_format, metavar="FORMAT",
        help="print each job as jsonl or template:…, as `list` does, instead of its exit code",
    )  # fmt: skip
    add_all(command)


def _add_stop(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "stop",
        help="stop a job, wait for its end, and show it as JSON",
        description="Stop jobs: SIGTERM, after the grace period SIGKILL. Waits until they have ended, and"
        " prints one as JSON, several as an array; at a terminal it prints a line for each.",
    )
    command.set_defaults(run=commands.stop)
    _add_jobs_or_filters(command, _STOPPABLE)
    add_all(command)
    _add_grace(command)
    command.add_argument(
        "-s",
        "--signal",
        type=units.signal_number,
        default=0,
        metavar="SIGNAL",
        help="instead of TERM: INT",
    )


def _add_rm(subparsers: "Commands") -> None:
    command = subparsers.add_parser("rm", help="forget ended jobs, with their output; prints each")
    command.set_defaults(run=commands.remove)
    _add_jobs_or_filters(command, _ENDED)
    add_all(command)


def _add_prune(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "prune",
        help="forget all jobs that have ended, with their output; prints each",
        description="Forget all of your jobs that have ended, with their output. Asks first, at a terminal.",
    )
    command.set_defaults(run=commands.prune)
    _add_label_filter(command)
    command.add_argument(
        "--before", type=units.moment, metavar="TIME", help="only those that ended before this time: 7d (ago)"
    )
    command.add_argument("-f", "--force", action="store_true", help="do not ask")


def _add_queue(subparsers: "Commands") -> None:
    command = subparsers.add_parser(
        "queue",
        help="show your jobs that wait in the queue, in the order of their turns, and why",
        description="Show your jobs that wait in the queue, in the order of their turns, and why they wait:"
        " their ids, or a table at a terminal.",
    )
    command.set_defaults(run=commands.show_queue)
    command.add_argument(
        "--format", choices=("table", "ids", "json"), help="default table at a terminal, else ids"
    )
    add_all(command)


def _add_hold(subparsers: "Commands") -> None:
    command = subparsers.add_parser("hold", help="keep jobs of the queue from being started; prints each")
    command.set_defaults(run=commands.hold)
    _add_jobs(command)
    add_all(command)


def _add_release(subparsers: "Commands") -> None:
    command = subparsers.add_parser("release", help="let held jobs of the queue be started; prints each")
    command.set_defaults(run=commands.release)
    _add_jobs(command)
    add_all(command)


def _add_jobs_or_filters(command: Parser, states: tuple[str, ...]) -> None:
    command.add_argument("jobs", type=job_name, nargs="*", metavar="JOB", help="a job's id, or its name")
    _add_label_filter(command)
    command.add_argument(
        "--state", choices=states, action="append", default=[], help="all in this state, or one of several"
    )


def _add_jobs(command: Parser) -> None:
    command.add_argument("jobs", type=job_name, nargs="+", metavar="JOB", help="a job's id, or its name")


def _add_grace(command: Parser) -> None:
    command.add_argument(
        "--grace",
        type=units.seconds,
        metavar="TIME",
        help="from SIGTERM to SIGKILL; by default the server's, 10 s",
    )


def _limit(text: str) -> int | str:
    """Parse the number of jobs that `list` shows: a number, or `all`."""
    return text if text == "all" else units.count(text)


def _list_format(text: str) -> object:
    """Parse a format of `list`: a name, or a template."""
    if text in _FORMATS:
        return text
    kind, _, template = text.partition(":")
    if kind != "template":
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is none of {', '.join(_FORMATS)} and template:…")
    from pjw.cli.template import Template

    return Template(template)


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


class _Version(argparse.Action):
    """Prints the version of the package, and looks it up only for this."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  argparse's own
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pjw.version import version

        print(f"pjw {version()}")
        parser.exit()
