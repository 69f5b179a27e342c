"""Attacks that are the kernel's doing, beside a victim on pure cgroup v2: deadlines and facts, not speeds.

Elsewhere, and with speeds: `make attack`.
"""

from typing import Final

import pytest

from benchmarks.attack.__main__ import PLANS, run
from benchmarks.attack.rows import OPEN, ROWS
from benchmarks.attack.verdict import Result

PLAN: Final = PLANS["deadlines"]
KERNEL_ROWS: Final = [row for row in ROWS if row.kernel and row.name not in OPEN]


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """All of them, on one service as far as it goes."""
    return {result.name: result for result in run(KERNEL_ROWS, PLAN)}


# all of them are run for the first
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [row.name for row in KERNEL_ROWS])
def test_nobody_is_hurt(results: dict[str, Result], name: str) -> None:
    """The victim's calls and root's reads come in time, the attacker's jobs end, the host is out of reach."""
    result = results[name]
    assert result.only.startswith("v1") or result.misses(PLAN.goals) == []
