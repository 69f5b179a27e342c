"""Small files of the launcher's: replaced whole, and on the disk."""

import os
from pathlib import Path

import pytest

from pjw.launcher.root_files import replace_file


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rename between two syncs: that of the data comes first, lest the new name has none."""
    steps: list[str] = []
    rename, fsync = os.rename, os.fsync

    def renamed(old: str, new: str) -> None:
        steps.append("rename")
        rename(old, new)

    def synced(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    path = tmp_path / "record"
    for data in (b"the first one\n", b"next\n"):
        replace_file(str(path), data)
        assert path.read_bytes() == data
    assert steps == ["record.new", "rename", tmp_path.name] * 2
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["record"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Nor is what it leads to written."""
    other = tmp_path / "other"
    other.write_text("words")
    (tmp_path / "record.new").symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(str(tmp_path / "record"), b"data")
    assert other.read_text() == "words"
