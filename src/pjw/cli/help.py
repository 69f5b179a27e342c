"""`pjw help [COMMAND|TOPIC]`, and its topics, which the man page and the documentation site have too.

A topic is Markdown that also reads well as it is: paragraphs, `- ` lists, and code that is indented by four.
"""

import argparse
from dataclasses import dataclass
from typing import Final

from pjw.cli.parser import build_parser, commands_of


@dataclass(frozen=True, slots=True)
class Topic:
    """The subject of a text, on one line, and the text."""

    title: str
    text: str


TOPICS: Final[dict[str, Topic]] = {
    "certificates": Topic(
        "the service, your certificate, and how to set both",
        """\
pjw and pjwd prove to each other who they are, by certificates of one
authority (mutual TLS 1.3). There are no passwords. The name in your
certificate is your name as a client: you see and stop the jobs of that name.

Your operator makes you a bundle, one file with all that you need, also your
private key:

    pjwd certs client /etc/pjw/certs alice --server build1.example.org:50051

Copy alice.pjw to your machine, over a connection that nobody else can read,
and add it as a context:

    pjw context add prod alice.pjw

From then on `pjw list` is enough. You no longer need the bundle.

Without a bundle pjw wants three files, --ca-crt, --client-crt and
--client-key. Certificates made with openssl work as well. A certificate ends
(`pjw context show` says when); with a new bundle, replace it:

    pjw context add --replace prod alice.pjw
""",
    ),
    "contexts": Topic(
        "several services, each by a name",
        """\
A context is a service and your certificate there.

    pjw context add prod alice.pjw      from a bundle; the first one is the current one
    pjw context list                    all of them
    pjw context use prod                make it the current one
    pjw --context lab list              another one, once
    pjw context rm lab                  forget it, with its key

They are in ~/.config/pjw/config.toml, which you may edit:

    current = "prod"

    [contexts.prod]
    server = "build1.example.org:50051"
    ca_crt = "/home/alice/.config/pjw/contexts/prod/ca.crt"
    client_crt = "/home/alice/.config/pjw/contexts/prod/client.crt"
    client_key = "/home/alice/.config/pjw/contexts/prod/client.key"

Each of the four is taken from the first of these that has it:

- the options --server, --ca-crt, --client-crt and --client-key
- the context that --context names
- the environment: PJW_SERVER, PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY
- the bundle in PJW_BUNDLE, its path or its text (without --context)
- the context that PJW_CONTEXT names, else the current one (without PJW_BUNDLE)
- the same keys in the file outside of any context

In the two weeks before a certificate expires, pjw warns at a terminal, once a
day. PJW_EXPIRY_WARNING=off hides the warning.
""",
    ),
    "exit-codes": Topic(
        "what the number at the end means",
        """\
- 0: done
- 1: refused: no such job, not allowed, a limit is reached
- 2: wrong usage
- 125: pjw failed: no server, no certificate
- 126: the command is not executable
- 127: no such program
- 130: interrupted (Ctrl-C)
- 141: the reader of the output of pjw has gone

`pjw run`, and `pjw wait` for one job, exit as the job did: with its exit
code, or with 128 plus the number of the signal that ended it. 126 and 127 are
those of env(1), nohup(1) and the shells.
""",
    ),
    "jobs": Topic(
        "what becomes of a command",
        """\
A job is one run of one command, with a number that no other job ever gets.

    starting -> running -> exited
                   |
                   +-> stopping -> exited

With --queue a job is queued before that, see pjw help queue.

One argument is a shell command, run by /bin/sh -c; several are a program and
its arguments. The command runs as a user of its own, without privileges, in
namespaces of its own: it sees the files of the host (it can write none), or
with --image those of an image, its own processes, and no network but the
hosts of --allow. It begins in an empty directory, /run/job, which is its HOME
and TMPDIR too and is removed when it ends.

`pjw get` says why a job has ended: completed, stopped, timed_out,
output_limit, oom_killed, disk_limit, output_failed (its output can never be
written), artifacts_missing (--output-required, and nothing could be kept). One
out of the queue may end without a start: cancelled, start_failed.
A job is lost when nobody could record how it ended: the host went down, or its
init was killed; or, in a cluster, its node was silent for too long
(node_lost). Slurm may take a job's place back: the job is revoked.

A running job needs neither your connection nor the service. Both can go and
come back while it runs.
""",
    ),
    "limits": Topic(
        "what a job may use",
        """\
A job gets the operator's defaults; you may ask for less, and for more up to
the operator's ceilings. `pjw get ID` shows the limits of a job, in the JSON
as `limits`.

- processor time: a job at this limit runs slower
- memory: at this limit the kernel kills the largest process of the job; if
  the command fails because of that, the reason is oom_killed. /tmp is in memory, too,
  and holds at most half of the limit; TMPDIR is on the disk. There is no swap
- processes and threads: at this limit fork fails
- bytes and operations a second, read from disk and written to it: at this
  limit they take longer
- output: a job that writes more is killed, the reason is output_limit; what
  was written stays readable
- time: a job that runs longer is killed, the reason is timed_out
- disk: when the disk is about to be full, the largest job of the client with most
  files there is killed, the reason is disk_limit

`pjw quota` shows what you may ask for, what all your jobs may have together,
and your share of the machine among clients; `pjw top` what your jobs
use now, `pjw stats ID` what one has used over its life.
""",
    ),
    "queue": Topic(
        "jobs that wait for their turn",
        """\
`pjw start` starts a job at once, or refuses. With --queue the job waits for its
turn, and you need not wait with it: you get its id at once, and `pjw wait`,
`pjw logs` and `pjw stop` work from then on.

    pjw start --queue make -C /usr/src/thing
    pjw start --queue --priority 10 ./urgent
    pjw start --queue --not-before 22:30 ./nightly
    pjw start --queue --hold ./later        waits for: pjw release ID
    pjw start --after 7 ./next              when job 7 has ended well
    pjw start --array 1-100%8 ./train       a hundred times, at most eight at once
    pjw submit FILE                         many, or none, see its --help
    pjw start --retry 3 ./flaky             again, up to three times, when it fails
    pjw queue                               what waits, in which order, and why

The operator says how many jobs of the queue run at once, and what their
limits may add up to, in all and for each client. A free slot goes to the
client that has the fewest; of your jobs the one with the highest priority is
first, then the oldest.

An array is started once for each index, which its command finds in
PJW_ARRAY_INDEX. Wherever you name a job, `17_5` is an element of array 17, and
17 is all of them: pjw wait 17, pjw stop 17, pjw logs 17_5, pjw list --array 17.

Waiting jobs outlive restarts of the service, and each is started once. A job
that is stopped while it waits ends as cancelled; a job with a command that
cannot be executed when its turn comes ends as start_failed. Neither has an exit
code, and `detail` in the JSON of pjw get says why.
""",
    ),
    "output": Topic(
        "the output of a job, and its readers",
        """\
All that a job writes to stdout and stderr is kept, byte by byte, until the
job is removed. `pjw logs ID` begins at the first byte, whenever it is called,
and ends when the job has ended. Any number of readers may follow the same
job; a slow one holds up neither the job nor the others.

A reader that loses its connection comes back by itself and goes on at the
exact byte. If the host went down before its disk had all of the output,
`logs` gives the bytes that are left and then fails, so that a part never looks
like the whole.

To a terminal `logs` passes text and colours. Other escape sequences and control
characters could steer the terminal, so `logs` shows them as text (`\\x1b[2J`);
`--raw` passes them too. In a pipe or a file each byte is as the job wrote it.

Ended jobs are removed, with their output, by `pjw rm` and `pjw prune`, or when
the operator's bounds of age and size are reached.
""",
    ),
}


def show_help(arguments: argparse.Namespace) -> None:
    """Print the text of a topic, the help of a command, or without words an overview of pjw."""
    words = arguments.words
    if len(words) == 1 and words[0] in TOPICS:
        topic = TOPICS[words[0]]
        print(f"{words[0]}: {topic.title}\n\n{topic.text}", end="")
        return
    parser: argparse.ArgumentParser = build_parser()
    for depth, word in enumerate(words):
        commands = commands_of(parser)
        if word not in commands:
            known = [*commands, *(TOPICS if depth == 0 else ())]
            parser.error(f"no help for {word[:80]!r}; there is for: {', '.join(known)}")
        parser = commands[word]
    parser.print_help()
    if not words:
        width = max(map(len, TOPICS))
        print("\ntopics (pjw help TOPIC):")
        for name, topic in TOPICS.items():
            print(f"  {name:<{width}}  {topic.title}")
