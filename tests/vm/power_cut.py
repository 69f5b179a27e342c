"""What scripts/test-vm runs before it cuts the power: jobs in every stage, and what was promised of each.

The last line that it prints is the promises, in JSON, and that line is what cuts the power:
test_power_cut.py looks for what is left on the disk.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

from pjw.model import After, Condition, Job, JobSpec, JobState, QueueSpec, Retry
from pjw.worker import QueueSlots, Worker, WorkerSettings

STATE: Final = Path("/var/lib/pjw-power-cut")
ACKNOWLEDGED: Final = 30
# at the end of the line of promises; scripts/test-vm cuts the power when it sees this
CUT: Final = "CUT-THE-POWER"
# jobs of the queue that say in which boot they run, and how many of them have ended when the power is cut
QUEUED: Final = 40
ENDED: Final = 10
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
SECRET: Final = "s3cr3t"
# jobs that keep a file, and are not waited for; and one whose files take long to look for
KEEPING: Final = 8
KEPT_LINES: Final = 200_000
KEEP: Final = JobSpec(f"seq 1 {KEPT_LINES} > kept", outputs=["kept"])
LOOKING: Final = JobSpec(
    "mkdir -p $(printf 'a/%.0s' $(seq 24))", {"cpu_max_millicores": 100}, outputs=["**/" * 12 + "z"]
)


def numbers(count: int) -> bytes:
    """The output of seq(1)."""
    return b"".join(b"%d\n" % number for number in range(1, count + 1))


async def run(worker: Worker, command: str) -> Job:
    """Run a job until its end was told."""
    return await worker.wait((await worker.start(JobSpec(command), "alice")).id)


async def put(worker: Worker, command: str, *after: After, **queue: Any) -> Job:
    """Put a job of carol's into the queue."""
    spec = JobSpec(command, queue=QueueSpec(after=after, **queue))
    return (await worker.submit([spec], "carol"))[0]


async def running(worker: Worker, job: Job) -> None:
    """Wait until a job of the queue runs."""
    async for batch in worker.watch_jobs("carol"):
        if any(each.job.id == job.id and each.job.state is JobState.RUNNING for each in batch.changes):
            return


async def fill_the_queue(worker: Worker) -> dict[str, Any]:
    """Jobs that wait for everything that a job can wait for; what was told of them when some have ended."""
    lost = await put(worker, "exec sleep 10000", priority=9)
    rerun = await put(
        worker, "[ $PJW_ATTEMPT = 2 ] || exec sleep 10000", priority=9, retry=Retry(if_lost=True)
    )
    after = {each: await put(worker, f"cat {BOOT_ID}", After(lost.id, each)) for each in Condition}
    [held] = await worker.submit(
        [JobSpec("echo $TOKEN", secrets={"TOKEN": SECRET}, queue=QueueSpec(held=True))], "carol"
    )
    failed = await put(worker, "exit 1", priority=9, retry=Retry(3, backoff_seconds=3000))
    for job in (lost, rerun):
        await running(worker, job)
    jobs = [await put(worker, f"cat {BOOT_ID}") for _ in range(QUEUED)]
    for job in jobs[:ENDED]:
        await worker.wait(job.id)
    changes = [
        [change.sequence, change.job.id, change.job.state]
        async for batch in worker.watch_jobs("carol", since=0, follow=False)
        for change in batch.changes
    ]
    next_id = (await worker.get(failed.id)).retried_as
    assert next_id is not None
    pause = await worker.get(next_id)
    return {
        "lost": lost.id,
        "rerun": rerun.id,
        "after": {each.value: job.id for each, job in after.items()},
        "held": held.id,
        "pause": pause.id,
        "not_before": str(pause.not_before),
        "jobs": [job.id for job in jobs],
        "ended": [job.id for job in await worker.list("carol") if job.state is JobState.EXITED],
        "changes": changes[-20:],
    }


async def keep_files(worker: Worker) -> dict[str, Any]:
    """Jobs whose files are kept, at every stage of that, and a workspace with a file that was synced."""
    looking = await worker.start(LOOKING, "dave")
    while "artifacts" not in (await worker.get(looking.id)).detail:
        await asyncio.sleep(0.05)
    kept = await worker.wait((await worker.start(KEEP, "dave")).id)
    assert kept.artifacts is not None
    await worker.wait(
        (await worker.start(JobSpec("seq 1 1000 > file; sync file .", workspace="things"), "dave")).id
    )
    return {
        "looking": looking.id,
        "kept": [kept.id, kept.artifacts.bytes],
        "keeping": [(await worker.start(KEEP, "dave")).id for _ in range(KEEPING)],
    }


async def main() -> None:
    """Start what is to be cut off, and never return."""
    settings = WorkerSettings(queue=QueueSlots(running_max=6, cpu_max_millicores=0))
    worker = await Worker.open(str(STATE), settings)
    settled = await run(worker, "seq 1 100000")
    status = STATE / "jobs" / str(settled.id) / "status"
    while status.exists():
        await asyncio.sleep(0.05)
    deleted = await run(worker, "echo deleted")
    await worker.delete(deleted.id)
    running = await worker.start(JobSpec("echo words; exec sleep 10000"), "bob")
    async for chunk in worker.logs(running.id):
        assert chunk == b"words\n"
        break
    # from here on the kernel's own writeback, every 5 s, would be of no help
    started = [(await worker.start(JobSpec("exec sleep 10000"), "alice")).id for _ in range(ACKNOWLEDGED)]
    told = await run(worker, "seq 1 300000; exit 7")
    facts = {
        "settled": settled.id,
        "deleted": deleted.id,
        "running": running.id,
        "started": started,
        "told": told.id,
        "told_bytes": told.output_bytes,
        "boot": BOOT_ID.read_text().strip(),
        "queue": await fill_the_queue(worker),
        "files": await keep_files(worker),
    }
    print("PROMISED", json.dumps(facts), CUT, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
