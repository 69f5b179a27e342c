"""Where traces go, as the configuration says it; and that they cost nothing where they go nowhere."""

import subprocess
import sys

import pytest

from pjw.errors import ConfigError
from pjw.server.address import traces_endpoint_of
from pjw.server.config import Traces


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:4317", "https://collector.example:4317/", "http://[::1]:4317"]
)
def test_an_endpoint(endpoint: str) -> None:
    """A URL with a port; with https, by TLS."""
    assert traces_endpoint_of(Traces(endpoint)) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:4317",
        "http://127.0.0.1",
        "http://:4317",
        "http://[::1:4317",
        "http://localhost:otlp",
        "grpc://localhost:4317",
        "http://localhost:4318/v1/traces",
        "http://localhost:4317?x=y",
    ],
)
def test_no_endpoint(endpoint: str) -> None:
    """What is none is refused; so is the address of OTLP over HTTP."""
    with pytest.raises(ConfigError, match="no URL for OTLP over gRPC"):
        traces_endpoint_of(Traces(endpoint))


def test_without_an_endpoint_nothing_is_imported() -> None:
    """No module of OpenTelemetry, wherever pjwd looks at its configuration."""
    program = (
        "import sys\nimport pjw.server.check, pjw.server.serve\n"
        "from pjw.server.address import traces_endpoint_of\nfrom pjw.server.config import Traces\n"
        "assert traces_endpoint_of(Traces()) is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"
