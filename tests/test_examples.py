"""Every printed block of the README and the docs is an example that a test prints again; Python in them compiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dataplane.errors import DropReason
from tests.examples import DOCUMENTS, ROOT, documented, normal, shape

_FENCE = re.compile(r"(?:<!-- example: (\S+) -->\n+)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"sh", "text", "python"}


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """(Name of the example, language, text) of each fenced block."""
    return [(match[1] or "", match[2], match[3]) for match in _FENCE.finditer(path.read_text())]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_printed_is_an_example(path: Path) -> None:
    for name, language, text in blocks(path):
        if language:
            assert language in LANGUAGES
            assert not name, f"{name} is an example, and of language {language}"
        else:
            assert name, f"nobody prints this again, and it is neither `sh` nor `text`:\n{text}"
        if language == "python":
            compile(text, path.name, "exec")


def test_every_example_is_printed_by_a_test() -> None:
    named = [name for path in DOCUMENTS for name, _, _ in blocks(path) if name]
    assert len(named) == len(set(named))
    asked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        asked |= set(re.findall(r'documented\("([\w-]+)"\)', path.read_text()))
    assert asked == set(named)


def test_two_runs_agree_in_shape_and_two_texts_do_not() -> None:
    assert normal(documented("status")).count("N") > 4
    assert shape("a 10.244.3.0/24  1.5 Gbit/s NO_ROUTE 3") == shape("a 10.244.77.0/24 22 Mbit/s  0")
    assert shape("node n1 ready") != shape("node n1 gone")


def test_every_reason_for_a_drop_stands_in_the_docs() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().partition("\n## Drops\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [reason.name for reason in DropReason]
