"""Run attacks on a real pjwd, and measure their victim, as root: `make attack`.

    python -m benchmarks.attack [--short | --deadlines] [--queue NAME=VALUE]... [--json FILE]
                                [--revision COMMIT] [ROW]...

Each row measures the victim in turns, during a busy loop of the attacker's client and during the attack. A
ratio is that of the two. The exit code is 1 when a goal is missed.
"""

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks import against, pjwd
from benchmarks.attack.rows import OPEN, ROWS, Row
from benchmarks.attack.stage import DIRECTORY, Stage, open_stage
from benchmarks.attack.verdict import DEADLINES, FULL, HEADINGS, SHORT, WIDTH, Goals, Result
from benchmarks.attack.victim import why
from benchmarks.machine import describe
from tests.support.disks import disk_with_queue

CALL_SECONDS: Final = 10.0
# a virtual machine is slower by this factor
SLOW_CALL_SECONDS: Final = 30.0
# of a disk with its own settings; sparse
DISK_MEGABYTES: Final = 6144


@dataclass(frozen=True, slots=True)
class Plan:
    """The number of turns and samples, and the goals."""

    goals: Goals
    turns: int
    # in each turn, in each state
    count: int
    deadline: float
    # whether each row also measures the victim on an idle machine
    quiet: bool = False
    kernel_only: bool = False
    # how often a row that misses a goal is repeated: on a shared machine few samples have little meaning
    again: int = 0


PLANS: Final = {
    "full": Plan(FULL, turns=5, count=40, deadline=CALL_SECONDS, quiet=True),
    "short": Plan(SHORT, turns=2, count=6, deadline=CALL_SECONDS, again=2),
    "deadlines": Plan(DEADLINES, turns=1, count=3, deadline=SLOW_CALL_SECONDS, kernel_only=True, again=2),
}


def main() -> int:
    """Run the rows; the exit code."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("attacks need root: they start jobs", file=sys.stderr)
        return 1
    name = "deadlines" if arguments.deadlines else "short" if arguments.short else "full"
    plan = PLANS[name]
    rows = [row for row in ROWS if _chosen(row, arguments.row, plan)]
    machine = describe()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    samples = plan.turns * plan.count
    print(f"{name}: {samples} samples; goals: {plan.goals}; each call within {plan.deadline:.0f} s")
    commit, program = against.install(arguments.revision) if arguments.revision else ("", pjwd.THIS)
    if commit:
        print(f"attacked is the pjwd of {commit}", flush=True)
    if left := [row.name for row in ROWS if row.name in OPEN and row not in rows]:
        print(f"not run, as they do not hold yet: {', '.join(left)} (benchmarks/attack/rows.py, OPEN)")
    with pjwd.measured(program), ExitStack() as stack:
        base = DIRECTORY
        if arguments.queue:
            settings = dict(each.split("=", 1) for each in arguments.queue)
            base = stack.enter_context(disk_with_queue(DISK_MEGABYTES, settings))
            print(f"the service and all files are on a disk of their own with {', '.join(arguments.queue)}")
        results = run(rows, plan, base)
    missed = [result.name for result in results if result.misses(plan.goals) and not _excused(result)]
    if arguments.json:
        _save(arguments.json, name, plan, machine, results)
    print(
        f"\n{len(results) - len(missed)} of {len(results)} held"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack", description=__doc__)
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("row", nargs="*", help=f"which, by the beginnings of names: {names}; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--short", action="store_true", help="few samples and looser ratios, for CI")
    how.add_argument("--deadlines", action="store_true", help="only what touches the kernel; no ratios")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument(
        "--queue",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="on a disk (a loop device) with this setting of its queue, such as scheduler=bfq or"
        " wbt_lat_usec=2000 (several; /sys/block/DISK/queue); default: on the disk of /var/lib",
    )
    parser.add_argument("--revision", metavar="COMMIT", help="attack the pjwd of that commit")
    arguments = parser.parse_args()
    for setting in arguments.queue:
        if "=" not in setting:
            parser.error(f"--queue takes NAME=VALUE, not {setting!r}")
    for wanted in arguments.row:
        if not any(row.name.startswith(wanted) for row in ROWS):
            parser.error(f"{wanted!r} begins none of {names}")
    return arguments


def _chosen(row: Row, wanted: list[str], plan: Plan) -> bool:
    if wanted:
        return any(row.name.startswith(prefix) for prefix in wanted)
    if row.name in OPEN and plan.goals is not FULL:
        return False
    return row.kernel or not plan.kernel_only


def run(rows: list[Row], plan: Plan, base: Path = DIRECTORY) -> list[Result]:
    """Run each row, on one service as long as rows leave it clean and need no other."""
    print(f"\n{HEADINGS}\n{'-' * WIDTH}", flush=True)
    results = []
    with ExitStack() as stack:
        stage: Stage | None = None
        kept = stack.enter_context(ExitStack())

        def measure(row: Row) -> Result:
            nonlocal stage
            began = time.monotonic()
            if stage is None or row.stage:
                kept.close()
                stage = kept.enter_context(open_stage(plan.deadline, base, **row.stage))
            result = _measure(row, stage, plan)
            print("\n".join(result.lines(plan.goals)), f"({time.monotonic() - began:.0f} s)\n", flush=True)
            if row.stage or result.failures or not stage.is_clean():
                kept.close()
                stage = None
            return result

        for row in rows:
            result = measure(row)
            for _ in range(plan.again):
                if not result.misses(plan.goals):
                    break
                print("once more:", flush=True)
                result = measure(row)
            results.append(result)
    return results


def _measure(row: Row, stage: Stage, plan: Plan) -> Result:
    result = Result(row.name, row.entry, row.what, row.only)
    if plan.quiet and row.beside:
        result.quiet.add(stage.victim.work(plan.count * plan.turns))
    try:
        for turn in range(plan.turns):
            if row.beside:
                with row.beside(stage):
                    result.beside.add(stage.victim.work(plan.count))
            with row.attack(stage):
                if row.beside:
                    result.attack.add(stage.victim.work(plan.count))
                if turn == plan.turns - 1:
                    result.facts += row.facts(stage)
            if result.attack.failures or stage.failures:
                break
    except (grpc.RpcError, RuntimeError) as error:
        result.failures.append(f"the attack ended: a call {why(error)}")
    result.failures += stage.failures
    return result


def _excused(result: Result) -> bool:
    """Whether this row cannot be judged on this machine."""
    version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    return bool(result.only) and not result.only.startswith(version)


def _save(path: Path, name: str, plan: Plan, machine: dict[str, str], results: list[Result]) -> None:
    data: dict[str, Any] = {
        "machine": machine,
        "form": name,
        "samples": plan.turns * plan.count,
        "rows": [result.data(plan.goals) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
