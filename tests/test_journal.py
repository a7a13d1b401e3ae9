"""Journals of long steps: kept over a failure, removed after success, and by `gc` a week after the last write."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgepack.store import Store

INPUTS = {"model": "a"}


def journals(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "journals").iterdir())


def test_a_journal_that_ends_well_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.journal("calibrate", INPUTS) as folder:
        (folder / "sums").write_bytes(b"1")
    assert journals(store) == []


def test_a_journal_outlives_a_failure_and_is_found_by_the_same_inputs_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.journal("calibrate", INPUTS) as folder:
        (folder / "sums").write_bytes(b"1")
        raise KeyboardInterrupt
    with store.journal("calibrate", {"model": "b"}) as other:
        assert list(other.iterdir()) == []
    with Store(tmp_path).journal("calibrate", INPUTS) as again:
        assert (again / "sums").read_bytes() == b"1"
    assert journals(store) == []


def test_gc_removes_a_journal_a_week_after_it_was_last_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("old", "written", "young"):
        with pytest.raises(ZeroDivisionError), store.journal(name, INPUTS) as folder:
            (folder / "sums").write_bytes(b"12345")
            raise ZeroDivisionError
        if name != "young":
            week = time.time() - 8 * 24 * 3600
            os.utime(folder, (week, week))
            if name == "old":
                os.utime(folder / "sums", (week, week))
    (store.root / "journals" / "notes.txt").write_text("of somebody else")
    removed = store.gc(keep_bytes=1 << 30)
    assert removed == 5
    left = journals(store)
    assert len(left) == 3 and "notes.txt" in left


def test_a_store_without_journals_is_cleaned(tmp_path: Path) -> None:
    assert Store(tmp_path).gc() == 0
