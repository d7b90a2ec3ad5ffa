"""Owns how numbers are written in reports: three significant digits, never an exponent.

Free of: what they mean. Invariant: a table and a picture write the same number the same way.
"""

from __future__ import annotations


def plain(value: float) -> str:
    """1234, 123, 12.3, 1.23, 0.12."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def percent(share: float) -> str:
    """A share as percent: 0 where it is none, and never 0 where it is some."""
    if share <= 0:
        return "0 %"
    if share < 0.0001:
        return "<0.01 %"
    return f"{share * 100:.2f} %" if share < 0.0995 else f"{share * 100:.0f} %"
