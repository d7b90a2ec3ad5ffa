"""The tests against extensions that look at each index and each length: Cython at those of bytes and memoryviews, gcc
at those of C's arrays and at undefined behaviour, glibc at what is copied into memory of known size.

In the suite that is tests/path and tests/backend; `make checked` runs every test but these, with what they start:
daemons in their namespaces, programs of the command line.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.lab import Lab, Settings, members, node
from tests.fuzz.building import Flavour, build_tree, environment
from tests.fuzz.running import extensions, run_tests, symbols

SHORT = ("tests/path", "tests/backend")
LONG = ("tests", "--ignore=tests/fuzz", "--ignore=tests/netns/test_wheel.py")
"""A wheel is compiled as it is shipped, whatever surrounds it."""
WHOLE = bool(os.environ.get("LODEN_CHECK_ALL"))
UNRAISABLE = "-Werror::pytest.PytestUnraisableExceptionWarning"
"""What Cython finds in a function that can raise nothing is printed only."""

pytestmark = pytest.mark.xdist_group("checked")  # who builds the tree uses it


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("checked") / "tree"
    build_tree(tree, Flavour.CHECKED, whole=WHOLE)
    return tree


@pytest.fixture
def name() -> Iterator[str]:
    made = f"e{secrets.token_hex(4)}"
    yield made
    Lab.destroy(made)


def test_the_checks_are_at_work(checked: Path) -> None:
    taken = symbols(checked, "_engine")
    assert "__ubsan_handle_out_of_bounds_abort" in taken
    assert "__memcpy_chk" in taken


@pytest.mark.netns
@pytest.mark.parametrize(
    "program", [node.DAEMON, (str(Path(sys.executable).with_name("flanneld")),)], ids=["module", "script"]
)
def test_a_daemon_that_a_test_starts_is_checked(
    checked: Path, name: str, program: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is started by the script of an installation that belongs to the checkout."""
    for key, value in environment(Flavour.CHECKED, checked).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(node, "DAEMON", program)
    Lab.create(name, 1, Settings())
    (daemon,) = members.running(name, "n1/flanneld")
    assert Path(f"/proc/{daemon.pid}/cmdline").read_text().split("\0")[1] == program[min(1, len(program) - 1)]
    loaded = extensions(daemon.pid)
    assert any(file.name.startswith("_engine.") for file in loaded)
    assert all(file.is_relative_to(checked) for file in loaded), f"not the copy is tested: {loaded}"


@pytest.mark.timeout(7200 if WHOLE else 1200)
def test_tests_pass_with_checks(checked: Path) -> None:
    surroundings = {**environment(Flavour.CHECKED, checked), "LODEN_CASES": "1" if WHOLE else "10"}
    run_tests(checked, surroundings, *(LONG if WHOLE else SHORT), UNRAISABLE)
