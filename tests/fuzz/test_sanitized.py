"""The packet tests and a short fuzz against a packet path that is compiled to notice what a test would not, by gcc's
sanitizers of addresses and of undefined behaviour. `make sanitize` does it at length."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.fuzz.building import Flavour, build_tree, environment
from tests.fuzz.fuzzing import fuzz
from tests.fuzz.running import run_tests, symbols

FUZZ_FIRST = int(os.environ.get("LODEN_FUZZ_FIRST", "0")) or secrets.randbits(62)
FUZZ_COUNT = int(os.environ.get("LODEN_SANITIZED_COUNT", "300000"))
SHARE = "1" if os.environ.get("LODEN_SANITIZE_ALL") else "10"
"""LODEN_CASES: below the sanitizers it is Python, which makes the generated cases, that takes minutes."""

pytestmark = pytest.mark.xdist_group("sanitized")  # who builds the tree uses it


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("sanitized") / "tree"
    build_tree(tree, Flavour.SANITIZED, fuzz=True)
    return tree


def test_the_sanitizers_are_at_work(sanitized: Path) -> None:
    """A test that could not fail would say nothing: the runtime must be there, and the extensions must use it."""
    taken = symbols(sanitized, "_coalesce")
    assert "__asan_report_load" in taken
    assert "__ubsan_handle" in taken


def test_fuzzing_finds_nothing_with_sanitizers(sanitized: Path) -> None:
    surroundings = environment(Flavour.SANITIZED, sanitized)
    found = fuzz(sanitized, FUZZ_FIRST, FUZZ_COUNT, timeout=3000, environment=surroundings, root=sanitized)
    assert found["reached"] * 4 >= FUZZ_COUNT


@pytest.mark.timeout(3600)  # alone it takes two minutes; on a busy machine the usual limit is too near
def test_packet_tests_pass_with_sanitizers(sanitized: Path) -> None:
    run_tests(sanitized, {**environment(Flavour.SANITIZED, sanitized), "LODEN_CASES": SHARE}, "tests/path")
