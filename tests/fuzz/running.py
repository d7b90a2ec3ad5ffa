"""Owns running the tests of a tree that was compiled to notice more (building.py).

Free of compiling. Invariant: what is run is the tree's own, in each process that a test starts too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def extensions(pid: int | str) -> list[Path]:
    """The compiled modules of ours that a process has loaded."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    return [Path(name) for name in sorted(mapped) if "/dataplane/" in name and name.endswith(".so")]


def symbols(tree: Path, module: str) -> str:
    """What a tree's compiled module takes from other libraries and gives to them, as nm prints it."""
    (file,) = tree.glob(f"dataplane/{module}*.so")
    return subprocess.run(["nm", "-D", str(file)], capture_output=True, text=True, check=True).stdout


def run_tests(
    tree: Path, environment: Mapping[str, str], *arguments: str, prefix: Sequence[str] = (), processes: int = 2
) -> str:
    """Run pytest in a copy of the checkout and return what it printed. Raises AssertionError with that if a test fails.
    """
    loaded = (
        "import dataplane._engine, dataplane._coalesce; from tests.fuzz.running import extensions;"
        "print(*extensions('self'), sep='\\n')"
    )
    command = [*prefix, sys.executable, "-c", loaded]
    where = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert where.returncode == 0, where.stderr
    files = where.stdout.split()
    assert len(files) >= 2, files
    assert all(Path(file).is_relative_to(tree) for file in files), f"not the copy is tested: {files}"
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # one test can take minutes below a sanitizer; what calls this has a limit too
    command += ["--timeout", "3600", "-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-8000:]}"
    assert " passed" in done.stdout
    return done.stdout
