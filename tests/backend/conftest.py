"""Owns the one node on which kernel backends are driven (tests/backend/one_node.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backend.one_node import open_node
from tests.namespaces import Namespace


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_node() as namespace:
        yield namespace
