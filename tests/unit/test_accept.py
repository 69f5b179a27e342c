"""gRPC's server as pjwd makes it: its log has nothing that a caller alone brings about."""

import logging

import pytest
from grpc._cython import cygrpc

from pjw.server.accept import make_server


async def test_a_caller_that_hangs_up_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC raises this when a caller is gone as it begins to send the answer, some times in a thousand."""
    make_server([])
    log = logging.getLogger(cygrpc.__name__)
    for error in (cygrpc.ExecuteBatchError("Failed"), ValueError("a bug of gRPC's")):
        try:
            raise error
        except (cygrpc.ExecuteBatchError, ValueError):
            log.exception("%s raised by servicer method", type(error).__name__)
    assert [record.getMessage() for record in caplog.records] == ["ValueError raised by servicer method"]
