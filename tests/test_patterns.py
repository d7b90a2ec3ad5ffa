"""Go's regular expressions against what RE2's syntax document says of them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.patterns import compile_go


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("eth0|eth1", "veth1", "eth1"),
        (r"^192\.168\.(1|2)\.", "192.168.2.7", "192.168.2."),
        ("[[:alpha:]]+[[:digit:]]", "-ens3", "ens3"),
        ("[^[:alpha:]]", "ab7", "7"),
        (r"[\w.]+", "-a.b", "a.b"),
        (r"\Qa.b\E+", "a.bb", "a.bb"),
        (r"\Q1.2", "1x2 1.2", "1.2"),
        (r"th0\z", "eth0", "th0"),
        ("(?i)ETH", "eth", "eth"),
        ("(?P<x>e)(?:t)", "et", "et"),
        ("a{2,3}?", "aaa", "aa"),
        ("", "x", ""),
    ],
)
def test_what_is_found(pattern: str, text: str, found: str) -> None:
    match = compile_go(pattern).search(text)
    assert match is not None
    assert match[0] == found


def test_classes_are_ascii_as_in_go() -> None:
    assert compile_go(r"\d").search("٣") is None
    assert compile_go(r"\w").search("ä") is None


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*", "a**", "(?=x)", "(?!x)", "(?<=x)", "(?<!x)", r"(a)\1", "(?P=x)", "(?#x)", "(?>x)", "a++", r"\Z",
     "[[:nope:]]", "a{5,2}"],
)  # fmt: skip
def test_what_re2_refuses_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        compile_go(pattern)


@given(st.text(max_size=40))
def test_any_text_is_a_pattern_or_a_value_error(pattern: str) -> None:
    with contextlib.suppress(ValueError):
        compile_go(pattern)
