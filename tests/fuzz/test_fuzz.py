"""Ten million executions of the fuzz targets, in processes of their own. LODEN_FUZZ_FIRST is the number of the first
(by chance otherwise), LODEN_FUZZ_COUNT says how many."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.fuzz.building import build_fuzzer
from tests.fuzz.fuzzing import fuzz

COUNT = int(os.environ.get("LODEN_FUZZ_COUNT", "10000000"))
FIRST = int(os.environ.get("LODEN_FUZZ_FIRST", "0")) or secrets.randbits(62)

pytestmark = pytest.mark.xdist_group("fuzz")  # who builds the targets uses them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    build_fuzzer(directory)
    return directory


def test_no_input_crashes_or_breaks_a_property(built: Path) -> None:
    found = fuzz(built, FIRST, COUNT)
    assert found["executions"] >= COUNT
    assert found["reached"] * 4 >= COUNT, f"too few executions cut or made a superframe: {found}"
    assert found["accepted"] * 4 >= COUNT, f"too few datagrams were accepted: {found}"
    assert found["tapped"] * 4 >= COUNT, f"too few packets were shown to taps: {found}"


def test_an_execution_can_be_repeated(built: Path) -> None:
    assert fuzz(built, FIRST, 1000, processes=1) == fuzz(built, FIRST, 1000, processes=1)
    assert fuzz(built, FIRST, 1000, processes=1) != fuzz(built, FIRST + 1000, 1000, processes=1)
