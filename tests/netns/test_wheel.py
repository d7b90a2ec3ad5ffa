"""A wheel, installed where nothing else is, is the whole program: `flanneld -version`, and a lab of two nodes."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]


def run(*argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=400, cwd=cwd, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_an_installed_wheel_runs_a_lab(tmp_path: Path) -> None:
    """Built from the tree without its build folder, so that a file that is not in the tree is missed."""
    source = tmp_path / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source, cwd=tmp_path)
    wheels = tmp_path / "wheels"
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", wheels, source, cwd=tmp_path)
    (wheel,) = wheels.iterdir()
    run(sys.executable, "-m", "venv", tmp_path / "elsewhere", cwd=tmp_path)
    bin_ = tmp_path / "elsewhere" / "bin"
    run(bin_ / "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    assert run(bin_ / "flanneld", "-version", cwd=tmp_path).stderr.startswith("Loden ")
    name = f"w{secrets.token_hex(4)}"
    try:
        run(bin_ / "loden", "lab", "up", "2", "--name", name, cwd=tmp_path)
        assert run(bin_ / "loden", "lab", "ping", "--name", name, cwd=tmp_path).stdout
    finally:
        run(bin_ / "loden", "lab", "down", "--name", name, cwd=tmp_path)
