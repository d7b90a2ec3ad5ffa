"""The packet tests and a short fuzz against a packet path that is compiled to notice what a test would not: by gcc's
address and undefined-behaviour sanitizers, and by Cython's checks of indices and of memoryviews."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fuzz.building import Flavour, build_tree, sanitizer_environment
from tests.fuzz.fuzzing import fuzz

SAME_WORKER = pytest.mark.xdist_group("sanitized")  # who builds the tree uses it
FUZZ_FIRST = int(os.environ.get("LODEN_FUZZ_FIRST", "0")) or secrets.randbits(62)
SLOW = (
    "tests/path/test_superframe.py::test_coalescing_equals_the_oracle",
    "tests/path/test_superframe.py::test_cutting_gives_back_what_was_merged_in_order",
)
"""Minutes of generated input under the sanitizers; `make sanitize` runs them, the fuzz goes the same ways at once."""
FUZZ_COUNT = int(os.environ.get("LODEN_SANITIZED_COUNT", "300000"))


def run_packet_tests(tree: Path, environment: dict[str, str], without: Sequence[str] = ()) -> None:
    """Run tests/path of a copy of the checkout; what is printed is shown if one fails."""
    loaded = "import dataplane._engine as e, dataplane._offload as o; print(e.__file__); print(o.__file__)"
    where = subprocess.run([sys.executable, "-c", loaded], cwd=tree, env=environment, capture_output=True, text=True)
    assert where.returncode == 0, where.stderr
    files = where.stdout.split()
    assert all(Path(file).is_relative_to(tree) for file in files), f"not the copy is tested: {files}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "tests/path"]
    command += ["--timeout", "3600"]  # below the sanitizers one test can take minutes; what calls this has a limit too
    command += [argument for test in without for argument in ("--deselect", test)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-8000:]}"
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("sanitized") / "tree"
    build_tree(tree, Flavour.SANITIZED, fuzz=True)
    return tree


@SAME_WORKER
def test_the_sanitizers_are_at_work(sanitized: Path) -> None:
    """A test that could not fail would say nothing: the runtime must be there, and the extensions must use it."""
    (offload,) = sanitized.glob("dataplane/_offload*.so")
    symbols = subprocess.run(["nm", "-D", str(offload)], capture_output=True, text=True, check=True).stdout
    assert "__asan_report_load" in symbols
    assert "__ubsan_handle" in symbols


@SAME_WORKER
def test_fuzzing_finds_nothing_with_sanitizers(sanitized: Path) -> None:
    found = fuzz(sanitized, FUZZ_FIRST, FUZZ_COUNT, environment=sanitizer_environment(), root=sanitized)
    assert found["reached"] * 4 >= FUZZ_COUNT


@SAME_WORKER
@pytest.mark.timeout(3600)  # alone it takes two minutes; on a busy machine the usual limit is too near
def test_packet_tests_pass_with_sanitizers(sanitized: Path) -> None:
    run_packet_tests(sanitized, sanitizer_environment(), () if os.environ.get("LODEN_SANITIZE_ALL") else SLOW)


def test_packet_tests_pass_with_cythons_checks(tmp_path: Path) -> None:
    build_tree(tmp_path / "tree", Flavour.CHECKED, fuzz=False)
    run_packet_tests(tmp_path / "tree", dict(os.environ))
