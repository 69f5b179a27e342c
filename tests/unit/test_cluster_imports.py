"""A pjwd that is no node of a gateway loads nothing of a cluster, and neither does a client's program."""

import subprocess
import sys

import pytest

OF_A_CLUSTER = ("pjw.cluster", "pjw.gateway", "pjw.node", "pjw.server.as_node")


@pytest.mark.parametrize(
    "module",
    [
        "pjw.server.boot",
        "pjw.server.serve",
        "pjw.server.main",
        "pjw.worker",
        "pjw.cli.main",
        "pjw.client.sync",
    ],
)
def test_nothing_of_a_cluster_is_loaded(module: str) -> None:
    """Whatever is imported on the way."""
    program = (
        "import sys; from pjw.certs.tls import require_tls13_environment; require_tls13_environment();"
        f" import {module}; print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded
    assert [name for name in loaded if name.startswith(OF_A_CLUSTER)] == []
