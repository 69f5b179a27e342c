"""`make test-gpu`: jobs with the GPUs of this machine. It prints what it did."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pjw.client.sync import Client
from pjw.errors import LimitReachedError
from pjw.launcher.cdi import read_devices
from pjw.model import JobSpec
from tests.support.cdi import KIND
from tests.support.service import Service, end_all

CONFIG = '[gpus]\nkind = "{kind}"\ncdi_dirs = ["{directory}/cdi"]\n'
# a CUDA program's own words, where there is a program that has some
TORCH = "import torch; print(torch.ones(1000, device='cuda').sum().item(), torch.cuda.device_count())"


def describe(directory: Path) -> None:
    """Write the machine's CDI file."""
    (directory / "cdi").mkdir()
    path = directory / "cdi/nvidia.json"
    if shutil.which("nvidia-ctk"):
        command = ["nvidia-ctk", "cdi", "generate", "--format=json", f"--output={path}"]
        subprocess.run(command, check=True, capture_output=True)
        print("nvidia-ctk has described the GPUs")
    else:
        path.write_text(json.dumps(nodes_alone()))
        print("without nvidia-ctk: device nodes alone")
    path.chmod(0o644)


def nodes_alone() -> dict[str, Any]:
    """What the file says of device nodes."""
    there = [str(path) for path in sorted(Path("/dev").glob("nvidia*")) if path.is_char_device()]
    gpus = [path for path in there if re.fullmatch(r"/dev/nvidia\d+", path)]
    return {
        "kind": KIND,
        "devices": [
            {"name": path.removeprefix("/dev/nvidia"), "containerEdits": {"deviceNodes": [{"path": path}]}}
            for path in gpus
        ],
        "containerEdits": {"deviceNodes": [{"path": path} for path in there if path not in gpus]},
    }


def check(client: Client, count: int) -> None:
    """One GPU and all GPUs, by nvidia-smi; none twice, none unasked."""
    for gpus in sorted({1, count}):
        job, output, _ = client.run(JobSpec("exec 2>&1; nvidia-smi -L; ls /dev/nvidia*", gpus=gpus))
        print(output.decode(), end="")
        assert job.succeeded
        assert len(re.findall(rb"^GPU \d+: ", output, re.MULTILINE)) == gpus
    none = client.run(JobSpec("exec 2>&1; ls /dev; nvidia-smi -L"))
    assert b"nvidia0" not in none.output
    assert not none.job.succeeded, none.output
    holder = client.start(JobSpec("exec sleep 1000", gpus=count))
    try:
        client.run(JobSpec("true", gpus=1))
        raise AssertionError("a GPU was given twice")
    except LimitReachedError as error:
        print(f"all {count} are in use: {error}")
    [queued] = client.submit([JobSpec("nvidia-smi -L", gpus=1)])
    client.stop(holder.id, grace=0)
    assert client.wait(queued.id).succeeded
    python = shutil.which("python3") or "python3"
    if subprocess.run([python, "-c", "import torch"], check=False, capture_output=True).returncode == 0:
        limits: dict[str, int | str] = {"memory_max_bytes": "16G", "pids_max": 4096}
        job, output, _ = client.run(JobSpec(["python3", "-c", TORCH], limits, gpus=1))
        print(f"torch: {output.decode().strip()}")
        assert job.succeeded
    else:
        print("no torch here: no program of CUDA was tried")


def main() -> None:
    """A service of its own, and away with it."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    describe(directory)
    service = Service(directory, config=CONFIG.format(kind=KIND, directory=directory)).start()
    try:
        with service.client() as client:
            count = len(read_devices(KIND, [str(directory / "cdi")]))
            assert client.quota().gpus == count > 0
            check(client, count)
        print("test-gpu: passed")
    finally:
        service.stop()
        end_all(service.state)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
