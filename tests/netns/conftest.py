"""Labs for the end-to-end tests: built on demand, taken down whatever happens, their logs shown after a failure."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Generator, Iterator

import pytest

from dataplane.lab import Lab, Settings

MakeLab = Callable[..., Lab]
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture
def make_lab(request: pytest.FixtureRequest) -> Iterator[MakeLab]:
    """`make_lab(nodes, name=..., daemons=..., **settings)`: a lab that stands until the test ends."""
    made: list[Lab] = []

    def make(nodes: int = 2, *, name: str | None = None, daemons: bool = True, **settings: object) -> Lab:
        chosen = Settings(**settings)  # type: ignore[arg-type]  # any
        lab = Lab.create(name or f"e{secrets.token_hex(4)}", nodes, chosen, daemons=daemons)
        made.append(lab)
        return lab

    yield make
    for lab in made:
        if request.node.stash.get(_FAILED, True):
            for log in sorted(lab.directory.glob("*/flanneld.log")):
                sys.stdout.write(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}\n")
        Lab.destroy(lab.name)
