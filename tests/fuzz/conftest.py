"""Puts what compiles and fuzzes behind every other test, so that a plain mistake shows before."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.is_relative_to(Path(__file__).parent))
