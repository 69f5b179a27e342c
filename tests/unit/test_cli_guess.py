"""What pjw says to a word that it does not know."""

import pytest

from pjw.cli.main import main


@pytest.mark.parametrize(
    ("typed", "usage", "hint"),
    [
        ("ls", "usage: pjw [-h]", "perhaps pjw list"),
        ("ps", "usage: pjw [-h]", "perhaps pjw list"),
        ("statr echo", "usage: pjw [-h]", "perhaps pjw stats or pjw start"),
        ("strt echo", "usage: pjw [-h]", "perhaps pjw start"),
        ("context remove x", "usage: pjw context", "perhaps pjw context rm"),
        ("start --mem 5M true", "usage: pjw start", "perhaps --memory; pjw start --help has all options"),
        ("start --memroy=5M true", "usage: pjw start", "perhaps --memory; pjw start --help has all options"),
        ("list --quiet", "usage: pjw list", "pjw list --help has all options"),
        ("list --server x:1", "usage: pjw list", "--server belongs before the command: pjw --server … list"),
        ("--sever x:1 list", "usage: pjw", None),
        ("qwertz", "usage: pjw [-h]", None),
        ("logs", "usage: pjw logs", None),
    ],
)
def test_a_wrong_word(capsys: pytest.CaptureFixture[str], typed: str, usage: str, hint: str | None) -> None:
    """The usage is that of the command; what resembles the word is named, and what does not is not."""
    with pytest.raises(SystemExit) as caught:
        main(typed.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith(usage)
    assert [line for line in err.splitlines() if line.startswith("hint: ")] == (
        [f"hint: {hint}"] if hint else []
    )
