"""docs/compatibility.md: the public surface is the recorded one, and what it says is so."""

from typing import Final

import pytest

from tests.support.surface import KINDS, RECORDED, ROOT, lines_of

PROMISE: Final = ROOT / "docs/compatibility.md"


@pytest.mark.parametrize("kind", KINDS)
def test_the_surface_is_the_recorded_one(kind: str) -> None:
    """Nothing that a user may rely on goes or changes unnoticed; what is new is promised from then on."""
    recorded = (RECORDED / f"{kind}.txt").read_text().splitlines()
    now = lines_of(kind)
    gone = [line for line in recorded if line not in now]
    new = [line for line in now if line not in recorded]
    if gone:
        pytest.fail(
            f"gone or changed in tests/data/surface/{kind}.txt, which breaks what users rely on:"
            + "".join(f"\n- {line}" for line in gone)
            + "".join(f"\n+ {line}" for line in new)
            + "\nKeep it. If it must go, retire it (docs/compatibility.md); then run scripts/record-surface",
            pytrace=False,
        )
    if new:
        pytest.fail(
            f"not in tests/data/surface/{kind}.txt:"
            + "".join(f"\n+ {line}" for line in new)
            + "\nWhat is public stays: if it should be, run scripts/record-surface and commit what it writes",
            pytrace=False,
        )
    assert recorded == now


def test_nothing_else_is_recorded() -> None:
    """A file that nothing is compared with would hold no promise."""
    assert {path.name for path in RECORDED.iterdir()} == {f"{kind}.txt" for kind in KINDS}


def test_the_promise_names_each_kind_and_each_variable() -> None:
    """A reader finds where each of them is listed."""
    text = PROMISE.read_text()
    for kind in KINDS:
        assert f"surface/{kind}.txt" in text, kind
    for name in (RECORDED / "environment.txt").read_text().split():
        assert f"`{name}`" in text, name
