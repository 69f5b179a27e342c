"""The root switch, and what tests of every room share."""

import os
import signal

import pytest

# gRPC reads this once, when imported. Its fork handlers begin threads in each child of this process, and a
# child with threads cannot make a user namespace (unshare(2)).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --root."""
    parser.addoption(
        "--root", action="store_true", help="run the tests that need root; fail if they cannot run"
    )


def pytest_configure() -> None:
    """Begin as at most users' terminals.

    Jobs and other users read some of the files that tests make. Tests send SIGHUP to programs, which inherit
    that it is ignored where nohup(1) runs the tests.
    """
    os.umask(0o022)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root unless it was asked for; asked for without root, fail."""
    wanted = config.getoption("--root")
    if wanted and os.geteuid() != 0:
        raise pytest.UsageError("--root was given, and this is not root: the tests of the kernel cannot run")
    for item in items:
        if item.path.is_relative_to(config.rootpath / "tests" / "root") and not wanted:
            item.add_marker(pytest.mark.skip(reason="needs --root"))
