"""The mutants of tests/mutants.py fit the code of today; whether they are caught is for `make mutants`."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted({path for path, _ in MUTANTS}))
def test_what_a_mutant_replaces_is_there_once_and_its_tests_are_there(path: str) -> None:
    code = (ROOT / path).read_text(encoding="utf-8")
    for (file, areas), mutants in MUTANTS.items():
        if file == path:
            assert all((ROOT / "tests" / f"test_{area}.py").is_file() for area in areas.split())
            stale = [about for old, new, about in mutants if code.count(old) != 1 or old == new]
            assert not stale, f"{path}: {stale}"
