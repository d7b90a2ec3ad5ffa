"""Owns Go's regular expressions (RE2) as far as interfaces are chosen by them, told in terms of Python's.

Free of: what they are searched in. Invariant: what RE2 takes and Python takes otherwise is translated or refused, so a
pattern never means something else here than in flannel.
"""

from __future__ import annotations

import re

_CLASSES = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~", "punct": r"!-/:-@\[-`{-~", "space": r"\t\n\v\f\r ",
    "upper": "A-Z", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f",
}  # fmt: skip

# One piece of a pattern that RE2 and Python may read differently
_PIECE = re.compile(
    r"\\Q(?P<literal>.*?)(?:\\E|$)"
    r"|\\(?P<escaped>.)"
    r"|\[:(?P<not>\^?)(?P<posix>\w+):\]"
    r"|\((?P<group>\?(?:=|!|<[=!]|>|\(|#|P=))"
    r"|(?P<possessive>[*+?}]\+)",
    re.DOTALL,
)


def compile_go(pattern: str) -> re.Pattern[str]:
    """The pattern, to be used with `search`. Raises ValueError with the reason where RE2 would not take it."""
    try:
        return re.compile(_PIECE.sub(_translated, pattern), re.ASCII)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _translated(piece: re.Match[str]) -> str:
    if piece["literal"] is not None:
        return re.escape(piece["literal"])
    if piece["escaped"] is not None:
        if piece["escaped"] in "123456789Z":
            raise re.error(f"invalid escape sequence: {piece[0]}")  # RE2 has no back references
        return r"\Z" if piece["escaped"] == "z" else piece[0]
    if piece["posix"] is not None:
        members = _CLASSES.get(piece["posix"])
        if members is None or piece["not"]:
            raise re.error(f"invalid character class range: {piece[0]}")
        return members
    raise re.error(f"invalid or unsupported Perl syntax: {piece[0]}")
