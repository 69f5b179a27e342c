"""What scripts/test-vm runs before it cuts the power: jobs in every stage, and what was promised of each.

The last line that it prints is the promises, in JSON, and that line is what cuts the power:
test_power_cut.py looks for what is left on the disk.
"""

import asyncio
import json
from pathlib import Path
from typing import Final

from pjw.model import Job, JobSpec
from pjw.worker import Worker

STATE: Final = Path("/var/lib/pjw-power-cut")
ACKNOWLEDGED: Final = 30
# at the end of the line of promises; scripts/test-vm cuts the power when it sees this
CUT: Final = "CUT-THE-POWER"


def numbers(count: int) -> bytes:
    """The output of seq(1)."""
    return b"".join(b"%d\n" % number for number in range(1, count + 1))


async def run(worker: Worker, command: str) -> Job:
    """Run a job until its end was told."""
    return await worker.wait((await worker.start(JobSpec(command), "alice")).id)


async def main() -> None:
    """Start what is to be cut off, and never return."""
    worker = await Worker.open(str(STATE))
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
    }
    print("PROMISED", json.dumps(facts), CUT, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
