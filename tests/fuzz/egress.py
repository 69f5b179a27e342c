"""What a job sends to its proxy: any bytes are a request to a host that is written in one way, or refused."""

import h11

from pjw.egress.proxy import HEAD_BYTES_MAX
from pjw.egress.proxy_requests import Failure, request_for, wanted_of
from pjw.network import Allowed, host_of

_HOP_BY_HOP = {b"proxy-authorization", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade"}


def seeds() -> list[bytes]:
    """One of each kind."""
    return [
        b"CONNECT good.test:443 HTTP/1.1\r\nHost: good.test:443\r\n\r\nearly",
        b"CONNECT [2001:db8::1]:443 HTTP/1.0\r\n\r\n",
        b"GET http://good.test:8080/a?b#c HTTP/1.1\r\nHost: x\r\nConnection: x-own\r\nX-Own: 1\r\n\r\n",
        b"GET HTTP://1.2.3.4?q HTTP/1.1\r\nHost: x\r\nProxy-Authorization: y\r\n\r\n",
        b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET http://a@b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]


def one_input(data: bytes) -> None:
    """Read it as the proxy does; what goes on to a host is one request for that host alone."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    try:
        connection.receive_data(data)
        request = connection.next_event()
        if not isinstance(request, h11.Request):
            return
        wanted = wanted_of(request)
    except (h11.RemoteProtocolError, Failure):
        return
    assert host_of(wanted.host) == wanted.host
    assert 1 <= wanted.port <= 65_535
    assert Allowed.of(str(Allowed(wanted.host, wanted.port))) == Allowed(wanted.host, wanted.port)
    if not wanted.path:
        return
    sent = h11.Connection(h11.CLIENT).send(request_for(request, wanted))
    assert sent is not None
    host = h11.Connection(h11.SERVER, max_incomplete_event_size=4 * HEAD_BYTES_MAX)
    host.receive_data(sent)
    got = host.next_event()
    assert isinstance(got, h11.Request)
    assert (got.method, got.target) == (request.method, wanted.path)
    names = [name for name, _ in got.headers]
    assert names.count(b"host") == 1
    assert not _HOP_BY_HOP & set(names)
    assert not (b"content-length" in names and b"transfer-encoding" in names)
    assert dict(got.headers)[b"connection"] == b"close"
    # nothing stands behind it
    assert host.trailing_data[0] == b""
