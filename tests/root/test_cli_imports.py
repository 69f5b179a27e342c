"""What `pjw get` imports beyond what `import grpc` does: each of it has a reason."""

import re
import subprocess
from typing import Final

from tests.support.service import BIN, Service

# Python does not list what importlib imports: pjw.cli.commands, where `get` is.
OURS: Final = frozenset(
    """\
pjw pjw.amounts pjw.arrays pjw.certs pjw.certs.files pjw.cli pjw.cli.connection pjw.cli.exits
pjw.cli.main pjw.cli.options pjw.cli.parser pjw.cli.render pjw.cli.terminal pjw.cli.units pjw.client
pjw.client.base pjw.client.channel pjw.client.config pjw.client.requests pjw.client.retry
pjw.client.sync pjw.errors pjw.given pjw.model pjw.model.job pjw.model.limits pjw.model.offers
pjw.model.spec pjw.process pjw.rpc pjw.rpc.convert pjw.rpc.status pjw.v1 pjw.v1.job_worker_pb2
pjw.v1.job_worker_pb2_grpc
""".split()  # noqa: SIM905  one a line would be forty lines
)
# What `pjw start` imports of the command line instead of `pjw.cli.render`.
OF_START: Final = frozenset({"pjw.cli.spec", "pjw.cli.stdin"})
MESSAGES: Final = "the messages of gRPC"
OF_PROTOBUF: Final = "protobuf imports it"
# Of everything else the top level: of the standard library, and of others.
REASONS: Final = {
    "google": MESSAGES,
    "grpc": "our generated code asks for the version of grpc",
    "argparse": "the command line",
    "gettext": "argparse imports it",
    "json": "the job that is printed, and facts of errors",
    "_json": "json imports it",
    "dataclasses": "jobs, settings and credentials are values",
    "datetime": "times of jobs, and protobuf's",
    "_datetime": "datetime imports it",
    "gc": "switched off while modules are imported, which spares a tenth",
    "calendar": OF_PROTOBUF,
    "copy": OF_PROTOBUF,
    "encodings": OF_PROTOBUF,
    "numbers": OF_PROTOBUF,
    "pickle": OF_PROTOBUF,
    "_pickle": "pickle imports it",
    "_compat_pickle": "pickle imports it",
}
# before Python 3.13 pickle and copy look for Jython
IN_SOME_PYTHONS: Final = {"org"}


def imported(stderr: str) -> set[str]:
    """The modules in the words of PYTHONPROFILEIMPORTTIME."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", stderr, re.MULTILINE))


def test_get_imports_nothing_without_a_reason(service: Service) -> None:
    """Who adds an import here says in REASONS why every `pjw get` is to wait for it."""
    job_id = str(service.start_job("true"))
    measured = {"PYTHONPROFILEIMPORTTIME": "1"}
    bare = subprocess.run(
        [BIN / "python", "-c", "import grpc"], env=measured, capture_output=True, text=True, check=True
    )
    done = service.pjw("get", job_id, **measured)
    assert done.returncode == 0, done.stderr
    beyond = imported(done.stderr.decode()) - imported(bare.stderr)
    ours = {name for name in beyond if name.partition(".")[0] == "pjw"}
    others = {name.partition(".")[0] for name in beyond - ours} - IN_SOME_PYTHONS
    assert (sorted(ours), sorted(others)) == (sorted(OURS), sorted(REASONS))


def test_start_imports_no_other_command(service: Service) -> None:
    """The table of commands names the function that carries one out, and imports no other."""
    done = service.pjw("start", "true", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    ours = {name for name in imported(done.stderr.decode()) if name.startswith("pjw.cli.")}
    expected = {name for name in OURS if name.startswith("pjw.cli.")} - {"pjw.cli.render"} | OF_START
    assert sorted(ours) == sorted(expected)
