"""The tests in which threads meet, below gcc's sanitizer of data races: pumps that hand TX to each other, tables and
taps that are replaced while pumps use them, counters that are read while they grow.

Python is not compiled with it; its locks are seen, so what a thread did before it gave the GIL away came before what
another does with it. Nothing is suppressed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.building import Flavour, build_tree, environment
from tests.fuzz.running import run_tests

SHORT = [f"tests/path/test_{name}.py" for name in ("meeting", "duty", "datapath", "queues", "frames")]
LONG = [f"tests/backend/test_{name}.py" for name in ("duty", "queues", "vxlan")]
"""With devices and sockets of the kernel, under load, while the node moves: `make sanitize`."""

RACE = """
unsigned long word;
void race(void) { for (int i = 0; i < 10000000 && word < 10000000; i++) word++; }
"""
RACING = """
import ctypes, sys, threading
race = ctypes.CDLL(sys.argv[1]).race
threads = [threading.Thread(target=race) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

pytestmark = pytest.mark.xdist_group("threads")  # who builds the tree uses it


@pytest.fixture(scope="module")
def prefix() -> list[str]:
    """The sanitizer wants memory where it looks for it: gcc 12's gives up where a kernel scatters it over more than 28
    bits (vm.mmap_rnd_bits), unless it is asked not to scatter, which not every container may ask."""
    fixed = ["setarch", "--addr-no-randomize"]
    return fixed if subprocess.run([*fixed, "true"], capture_output=True).returncode == 0 else []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("threads") / "tree"
    build_tree(tree, Flavour.THREADS)
    return tree


def reports(beside: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(beside.parent.glob(f"{beside.name}.*")))


def test_a_race_is_found(tmp_path: Path, prefix: list[str]) -> None:
    """Between two threads of this Python, in a library that it loads; so silence means something."""
    source, library = tmp_path / "race.c", tmp_path / "race.so"
    source.write_text(RACE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O0", "-fsanitize=thread", source, "-o", library], check=True)
    surroundings = environment(Flavour.THREADS, tmp_path, tmp_path / "report")
    command = [*prefix, sys.executable, "-c", RACING, str(library)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    said = reports(tmp_path / "report") + done.stderr
    assert "unexpected memory mapping" not in said, "as root: sysctl vm.mmap_rnd_bits=28, or allow personality(2) here"
    assert "WARNING: ThreadSanitizer: data race" in said, (done.returncode, said)


@pytest.mark.timeout(3600)
def test_no_thread_races_with_another(tree: Path, tmp_path: Path, prefix: list[str]) -> None:
    surroundings = environment(Flavour.THREADS, tree, tmp_path / "report")
    files = SHORT + LONG if os.environ.get("LODEN_SANITIZE_ALL") else SHORT
    run_tests(tree, surroundings, *files, prefix=prefix)
    assert not reports(tmp_path / "report"), reports(tmp_path / "report")[:8000]
