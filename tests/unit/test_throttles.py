"""Limits of disk IO are lifted as far as they can be."""

from pathlib import Path

import pytest

from pjw.errors import KernelError
from pjw.launcher.cgroup import interface_files


def test_one_that_cannot_be_lifted_keeps_no_other(tmp_path: Path) -> None:
    """A job that waits in any of them would not end; what is gone throttles nothing, and is no error."""
    first, second, gone = list(interface_files.NO_THROTTLE)[:3]
    # cannot be read, as it is a directory
    (tmp_path / first).mkdir()
    (tmp_path / second).write_text("254:0 1048576\n")
    assert not (tmp_path / gone).exists()
    with pytest.raises(KernelError, match=first):
        interface_files.lift(str(tmp_path))
    assert (tmp_path / second).read_text().startswith("254:0 0")
    (tmp_path / first).rmdir()
    interface_files.lift(str(tmp_path))
