"""Owns the reading of a JSON object that people write: Go's rules for names, and faults that show their place.

Free of: IO, and of what the members mean. Invariant: any bytes give a JsonText or a ConfigError with line, column and
caret, never another exception.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dataplane.errors import ConfigError

MAX_BYTES = 65_536
"""A longer text is no network config: a real one has a few hundred bytes."""

_WIDTH = 100
"""Most characters of a faulty line that are shown."""

# The parts of a text that is known to be JSON: a string, a mark, or a number or word
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+')
_KINDS = {'"': "a string", "{": "an object", "[": "an array", "t": "a boolean", "f": "a boolean"}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an object, by offsets into the text: its key, and its value from start to end."""

    name: str
    key_at: int
    start: int
    end: int


class JsonObject:
    """One JSON object whose members are looked up as Go does, and which knows where each stands."""

    def __init__(self, source: JsonText, start: int, known: Iterable[str]) -> None:
        self.source = source
        self.start, self.members = source.members(start)
        self.warnings: list[str] = []
        self._known: dict[str, _Member] = {}
        self._near_misses: dict[str, _Member] = {}
        folded = {name.casefold(): name for name in known}
        for member in self.members:
            name = folded.get(member.name.casefold())
            if name is None:
                near = nearest(member.name, folded.values())
                if near is not None:
                    self._near_misses[near] = member
                self._warn(member, f"is no known key and is ignored{did_you_mean(near)}")
                continue
            if name in self._known:
                self._warn(member, "stands here for the second time: the last one counts")
            if source.text[member.start : member.end] != "null":
                self._known[name] = member

    def _warn(self, member: _Member, message: str) -> None:
        self.warnings.append(f"{self.source.place(member.key_at)}: {quoted(member.name)} {message}")

    def fault(self, name: str, message: str) -> ConfigError:
        """An error at a member's value; where it is missing, at a key that looks like it or at the object."""
        if name in self._known:
            return self.source.fault(self._known[name].start, message)
        near = self._near_misses.get(name)
        if near is None:
            return self.source.fault(self.start, message)
        return self.source.fault(near.key_at, message + did_you_mean(name))

    def boolean(self, name: str, *, default: bool) -> bool:
        value: bool | None = self._value(name, bool, "a boolean")
        return default if value is None else value

    def whole_number(self, name: str, *, default: int) -> int:
        value: int | None = self._value(name, int, "a whole number")
        if value is not None and value < 0:
            raise self.fault(name, f"{name} must not be negative")
        return default if value is None else value

    def string(self, name: str) -> str | None:
        value: str | None = self._value(name, str, "a string")
        return value

    def object(self, name: str) -> int | None:
        """The offset of a member that is an object."""
        member = self._known.get(name)
        if member is not None and self.source.text[member.start] != "{":
            kind = self.source.kind(member.start)
            raise self.fault(name, f"error decoding {name} property of config: it must be an object, not {kind}")
        return None if member is None else member.start

    def parsed(self, name: str, read: Callable[[str], _T | None], complaint: str) -> _T | None:
        """What `read` makes of a string; None or ValueError from it is a fault with this complaint."""
        text = self.string(name)
        if text is None:
            return None
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None:
            raise self.fault(name, f"{name} {quoted(text)}: {complaint}")
        return value

    def everything(self) -> dict[str, Any]:
        """Every member as it stands, for a backend that reads its own options."""
        return {member.name: self.source.decode(member.start, member.end) for member in self.members}

    def _value(self, name: str, kind: type[bool | int | str], wanted: str) -> Any:
        member = self._known.get(name)
        if member is None:
            return None
        try:
            return msgspec.json.decode(self.source.text[member.start : member.end], type=kind)
        except (msgspec.DecodeError, RecursionError):
            raise self.fault(name, f"{name} must be {wanted}, not {self.source.kind(member.start)}") from None


@dataclass(frozen=True, slots=True)
class JsonText:
    """A text that is JSON, and how a place in it is shown. Offsets count characters."""

    text: str
    origin: str

    @classmethod
    def of(cls, raw: bytes, origin: str) -> JsonText:
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{origin}: this is no network config: {len(raw)} bytes, more than {MAX_BYTES}")
        source = cls(raw.decode(errors="replace"), origin)
        if raw.startswith(b"\xef\xbb\xbf"):
            raise source.fault(0, "a byte order mark stands before the JSON: save it as UTF-8 without one")
        try:
            raw.decode()
            msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except UnicodeDecodeError as error:
            raise source.fault(len(raw[: error.start].decode()), "this is not UTF-8") from None
        except RecursionError:
            raise source.fault(0, "the JSON is nested too deeply") from None
        except msgspec.ValidationError:
            start = len(source.text) - len(source.text.lstrip())
            raise source.fault(start, f"a network config is a JSON object, not {source.kind(start)}") from None
        except msgspec.DecodeError as error:
            match = re.fullmatch(r"JSON is malformed: (.*) \(byte (\d+)\)", str(error))
            if match is None:
                raise source.fault(len(source.text.rstrip()), "the JSON ends too early") from None
            # msgspec counts one too far where the text goes on behind the document
            offset = int(match[2]) - (match[1] == "trailing characters")
            at = len(raw[:offset].decode(errors="ignore"))
            raise source.fault(at, f"this is not JSON: {match[1]}") from None
        return source

    def members(self, start: int) -> tuple[int, list[_Member]]:
        """The members of the object that opens at or behind `start`, and where it opens."""
        found: list[_Member] = []
        tokens = _TOKEN.finditer(self.text, start)
        opening = next(tokens).start()
        depth, key, begin, end = 1, None, -1, -1
        for token in tokens:
            mark = token[0]
            if depth == 1 and mark in ",}":
                if key is not None:
                    name: str = msgspec.json.decode(key[0], type=str)
                    found.append(_Member(name, key.start(), begin, end))
                key, begin = None, -1
            elif depth == 1 and key is None:
                key = token
            elif begin < 0 and mark != ":":
                begin = token.start()
            depth += (mark in "{[") - (mark in "}]")
            end = token.end()
            if depth == 0:
                break
        return opening, found

    def decode(self, start: int, end: int) -> Any:
        try:
            return msgspec.json.decode(self.text[start:end])
        except (msgspec.DecodeError, RecursionError) as error:
            raise self.fault(start, f"this value cannot be read: {error}") from None

    def kind(self, at: int) -> str:
        return _KINDS.get(self.text[at : at + 1], "null" if self.text.startswith("null", at) else "a number")

    def place(self, at: int) -> str:
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return f"{self.origin}, line {line}, column {column}"

    def fault(self, at: int, message: str) -> ConfigError:
        """The error for a place: where, what, then the line itself with a caret under the place."""
        begin = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        line = self.text[begin : len(self.text) if end < 0 else end]
        cut = max(0, at - begin - _WIDTH * 3 // 4)
        # one column a character, whatever it is, so that the caret stands right
        shown = "".join(c if c.isprintable() else " " for c in line[cut : cut + _WIDTH])
        return ConfigError(f"{self.place(at)}: {message}\n{shown}\n{' ' * (at - begin - cut)}^")


def nearest(word: str, known: Iterable[str]) -> str | None:
    by_folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word[:_WIDTH].casefold(), by_folded, n=1, cutoff=0.7)
    return by_folded[near[0]] if near else None


def did_you_mean(near: str | None) -> str:
    return "" if near is None else f'; did you mean "{near}"?'


def quoted(word: str) -> str:
    """A word from the text, quoted and cut to a sane length."""
    return f'"{word}"' if len(word) <= _WIDTH else f'"{word[:_WIDTH]}"...'
