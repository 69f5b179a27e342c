"""What the soak's clients ask for, and what each of these jobs must have come to in the end."""

import random
from dataclasses import dataclass, field
from typing import Final

from pjw.v1 import job_worker_pb2 as pb

KIB: Final = 1024
STOPPED_CODE: Final = 5


@dataclass(slots=True)
class Task:
    """One start, from before it was asked for; the client's thread alone changes it."""

    token: str
    command: str
    size: int
    code: int | None = None
    reason: "pb.EndReason.ValueType" = pb.END_REASON_COMPLETED
    limits: dict[str, int] = field(default_factory=dict)
    # None: the answer was lost, so that the job may be there or not
    job_id: int | None = None
    # from then on it may have ended early
    stop_asked: bool = False

    def output(self, offset: int, end: int) -> bytes:
        """Bytes *offset* to *end* of what it writes."""
        end = min(end, self.size)
        line = f"{self.token} writes\n".encode()
        first = offset // len(line)
        return (line * ((end - first * len(line)) // len(line) + 1))[offset - first * len(line) :][
            : max(0, end - offset)
        ]

    def request(self) -> pb.StartRequest:
        """The start."""
        return pb.StartRequest(command=self.command, limits=pb.Limits(**self.limits))

    def complaint(self, job: pb.Job, output: bytes, *, init_killed: bool) -> str | None:
        """What is wrong with how it ended; None when all is well."""
        if output != self.output(0, len(output)):
            return "its output is not its own"
        if job.state == pb.JOB_STATE_LOST:
            if job.HasField("exit_code") or job.HasField("signal"):
                return "it is lost, and an end was guessed"
            if self.job_id is not None and not init_killed:
                return "it is lost, and nobody had killed its init"
            return None
        if job.state != pb.JOB_STATE_EXITED:
            return f"it has not ended: {job.state}"
        if self.stop_asked and job.reason == pb.END_REASON_STOPPED:
            return None
        if job.reason != self.reason:
            return f"its reason is {job.reason}, not {self.reason}"
        if self.code is not None and (not job.HasField("exit_code") or job.exit_code != self.code):
            return f"its code is {job.exit_code}, its signal {job.signal}; the code should be {self.code}"
        if len(output) != self.size:
            return f"it has {len(output)} bytes of output, not {self.size}"
        return None


def make(chance: random.Random, token: str) -> Task:
    """Any of the kinds, small ones above all."""
    # what a shell itself says of the end of its children is not in the truth below
    kind = chance.choices(["short", "big", "slow", "patient", "timed", "limited"], [50, 6, 24, 10, 5, 5])[0]
    line, code = f"{token} writes", chance.choice([0, 0, 1, 3, 77, 255])
    write = f"exec 2>/dev/null; yes '{line}' | head -c"
    match kind:
        case "short" | "big":
            size = chance.randrange(64 * KIB) if kind == "short" else chance.randrange(8 * KIB * KIB)
            return Task(token, f"{write} {size}; exit {code}", size, code)
        case "slow":
            count, pause = chance.randrange(5, 100), chance.choice([0.01, 0.05, 0.2])
            loop = f"i=0; while [ $i -lt {count} ]; do echo '{line}'; sleep {pause}; i=$((i+1)); done"
            return Task(token, f"{loop}; exit {code}", count * (len(line) + 1), code)
        case "patient":
            size = chance.randrange(1, 64 * KIB)
            wait = f"{write} {size}; while :; do sleep 1000 & wait; done"
            # it ends by a stop alone
            return Task(token, f"trap 'exit {STOPPED_CODE}' TERM; {wait}", size, reason=pb.END_REASON_STOPPED)
        case "timed":
            limits = {"time_max_seconds": 2}
            command = f"echo '{line}'; exec sleep 1000"
            return Task(token, command, len(line) + 1, reason=pb.END_REASON_TIMED_OUT, limits=limits)
        case _:
            limits = {"output_max_bytes": 10_000}
            return Task(token, f"yes '{line}'", 10_000, reason=pb.END_REASON_OUTPUT_LIMIT, limits=limits)
