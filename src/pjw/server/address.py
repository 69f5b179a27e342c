"""Where pjwd listens and sends: what an address is, whether it can be had, and who could reach it."""

import ipaddress
import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

from pjw.errors import ConfigError
from pjw.server.config import Metrics, Traces


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 address is in brackets. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(
            f"{text!r} is not HOST:PORT", hint="for example localhost:50051, or [::1]:0 for any free port"
        )
    return host, int(port)


def shown_address(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def metrics_address_of(metrics: Metrics) -> tuple[str, int] | None:
    """Where metrics can be had, if they can. Raises ConfigError for what others reach, unless they may."""
    if metrics.listen is None:
        return None
    host, port = parse_address(metrics.listen)
    if not metrics.allow_remote and not _is_loopback(host):
        raise ConfigError(
            f"metrics.listen is {metrics.listen!r}, which other hosts may reach, without TLS",
            hint="give a loopback address, such as 127.0.0.1:9464, or set metrics.allow_remote = true",
        )
    return host, port


def traces_endpoint_of(traces: Traces) -> str | None:
    """Who takes traces, if anybody. Raises ConfigError, also when what sends them is not installed."""
    if traces.endpoint is None:
        return None
    what = f"traces.endpoint is {traces.endpoint!r}"
    try:
        url = urlsplit(traces.endpoint)
        parse_address(url.netloc)
    except (ValueError, ConfigError):
        url = urlsplit("")
    if url.scheme not in ("http", "https") or url.path.strip("/") or url.query or url.fragment:
        raise ConfigError(
            f"{what}, which is no URL for OTLP over gRPC", hint="for example http://127.0.0.1:4317"
        )
    if not _is_installed("opentelemetry.exporter.otlp.proto.grpc"):
        raise ConfigError(
            f"{what}, but OpenTelemetry is not installed beside pjwd", hint="pip install 'pjw[traces]'"
        )
    return traces.endpoint


def _is_installed(module: str) -> bool:
    # looked for, not imported: gRPC may not be yet
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _is_loopback(host: str) -> bool:
    # a name is what the resolver says today; localhost is loopback by definition (RFC 6761)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def fault_of_address(host: str, port: int) -> str | None:
    """Why nobody could listen there now; None when one could."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
