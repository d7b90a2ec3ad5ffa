"""Puts what compiles and fuzzes behind every other test, so that a plain mistake shows before; and gives it time."""

from __future__ import annotations

from pathlib import Path

import pytest

COMPILING = 1800
"""Seconds that a test may take which has no limit of its own: whichever comes first of those that share a tree compiles
it, which takes a busy machine longer than the usual limit."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.is_relative_to(here))
    for item in items:
        if item.path.is_relative_to(here) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(COMPILING))
