"""Changes that a newcomer might be asked for, made: CONTRIBUTING.md, "Ten changes", names their files.

Each is a patch in tests/changes, applied to a copy of the source. So the number of files is counted, and the
change is seen to work: the copy generates its contract, and a program uses the new thing.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FILES_MAX: Final = 6
LIMIT = """
from pjw.cli.parser import build_parser
from pjw.cli.quota import LIMIT_WORDS
from pjw.cli.spec import spec_from
from pjw.launcher.cgroup.v1 import V1Hierarchy
from pjw.launcher.cgroup.v2 import V2Hierarchy
from pjw.model import DEFAULT_SHARE, Limits
from pjw.rpc.convert import spec_from_message, spec_to_message

words = ["start", "--memory-high", "64M", "true"]
sent = spec_to_message(spec_from(build_parser(words).parse_args(words)))
limits = Limits().with_overrides(spec_from_message(type(sent).FromString(sent.SerializeToString())).limits)
v1, v2 = object.__new__(V1Hierarchy), object.__new__(V2Hierarchy)
v1._bounds_swap = v2._bounds_swap = False
v1._io_devices = v2._io_devices = ["8:0"]
bytes_max = str(64 << 20)
# without a limit of processors, for which v1 looks at the cgroup of the client
limits = limits.with_overrides({"cpu_max_millicores": 0})
files = list(v1._settings(limits, 1000, DEFAULT_SHARE, "job 1"))
assert ("memory", "memory.soft_limit_in_bytes", bytes_max) in files
assert ("memory.high", bytes_max) in list(v2._settings(limits, "job 1"))
assert LIMIT_WORDS["memory_high_bytes"]
"""
REASON = """
from datetime import UTC, datetime

from pjw.cli.exits import why_ended
from pjw.cli.parser import build_parser
from pjw.model import EndReason, ExitStatus, Job, JobState, Limits
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.job import LiveJob
from pjw.worker.status_record import End

words = ["list", "--reason", "quota_lowered"]
assert build_parser(words).parse_args(words).reason == ["quota_lowered"]
assert pb.EndReason.Value("END_REASON_QUOTA_LOWERED") == 71
live = LiveJob(Job(1, "alice", "x", JobState.RUNNING, Limits(), datetime.now(UTC)), None, None)
live.quota_lowered = True
live.stop_asked()
live.end_seen(End(0, ExitStatus(signal=15), EndReason.STOPPED), None, 0)
assert live.job.reason is EndReason.QUOTA_LOWERED
assert "lowered a quota" in why_ended(live.job)
"""
OPTION = """
from pjw.cli.parser import build_parser

assert build_parser(["list"]).parse_args(["list", "--count"]).count
"""


@pytest.mark.parametrize(
    ("patch", "program"), [("a-new-limit", LIMIT), ("another-end-reason", REASON), ("a-new-option", OPTION)]
)
def test_a_change_touches_few_files_and_works(patch: str, program: str, tmp_path: Path) -> None:
    """At most six files, besides tests, documents and generated code; then a program uses what is new."""
    path = ROOT / f"tests/changes/{patch}.patch"
    touched = re.findall(r"^\+\+\+ b/(\S+)$", path.read_text(), re.MULTILINE)
    assert 0 < len(touched) <= FILES_MAX
    assert all(name.startswith("src/") for name in touched)

    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # -C1: lines near the change may have been edited since
    subprocess.run(["git", "apply", "-C1", path], cwd=tmp_path, check=True)
    contract = ["-I", "src", "--python_out=src", "src/pjw/v1/job_worker.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *contract], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    subprocess.run([sys.executable, "-B", "-c", program], env=environment, cwd=tmp_path, check=True)
