"""The root switch, and what tests of every room share."""

import os

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
    """Make files as most users do: jobs and other users read some of those that tests make."""
    os.umask(0o022)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root unless it was asked for; asked for without root, fail."""
    wanted = config.getoption("--root")
    if wanted and os.geteuid() != 0:
        raise pytest.UsageError("--root was given, and this is not root: the tests of the kernel cannot run")
    for item in items:
        if item.path.is_relative_to(config.rootpath / "tests" / "root") and not wanted:
            item.add_marker(pytest.mark.skip(reason="needs --root"))
