"""Owns how a log line looks: klog's text format, as guides and log shippers for flannel expect it, or JSON.

Free of: what is logged, by whom, and the Python logging API that callers use. Invariant: one record is one line, in
text plus continuation lines that start with four blanks; nothing in a record can look like a record of its own.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TextIO


def configure(
    verbosity: int,
    stream: TextIO,
    *,
    by_file: Mapping[str, int] | None = None,
    backtrace_at: str = "",
    form: str = "text",
) -> None:
    """Send every record of the process to `stream`. May be called again.

    DEBUG records pass from verbosity 1 on, klog's V(1); `by_file` raises it for files whose name without `.py` matches
    a pattern (-vmodule), and may not lower it. A record of `backtrace_at` (`file.py:line`) comes with its stack.
    `form`: "text" for klog's, "json" for one object a line.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter((JsonFormatter if form == "json" else KlogFormatter)(backtrace_at))
    patterns = [pattern for pattern, level in (by_file or {}).items() if level >= 1]
    if verbosity < 1:
        handler.addFilter(lambda record: record.levelno >= logging.INFO or _matches(record, patterns))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbosity >= 1 or patterns else logging.INFO)


def _matches(record: logging.LogRecord, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(record.module, pattern) for pattern in patterns)


class _Formatter(logging.Formatter):
    def __init__(self, backtrace_at: str = "") -> None:
        super().__init__()
        self._backtrace_at = backtrace_at

    def text(self, record: logging.LogRecord) -> str:
        """The message, and below it the traceback, or the stack that was asked for."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self._backtrace_at == f"{record.filename}:{record.lineno}":
            text += "\n" + "".join(traceback.format_stack()).rstrip()
        return text


class KlogFormatter(_Formatter):
    """`I0629 14:28:35.866793    5522 file.py:386] text`: severity, date, local time, pid, place (facts 1.8)."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%m%d %H:%M:%S.%f")
        head = f"{_severity(record.levelno)}{when} {record.process or 0:7d} {record.filename}:{record.lineno}] "
        # Text from peers, stores and files may stand in a record: without this it could move the
        # terminal's cursor, turn the direction of reading, or forge a line. Our own carets need "\n".
        return head + "\n    ".join(_printable(line) for line in self.text(record).split("\n"))


class JsonFormatter(_Formatter):
    """`{"ts":"2026-06-29T14:28:35.866793Z","level":"info","caller":"file.py:386","msg":"text"}`: always one line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "caller": f"{record.filename}:{record.lineno}",
            "msg": self.text(record),
        }
        return json.dumps(fields)  # ASCII only: nothing in it can act on a terminal


def _severity(level: int) -> str:
    """klog has no letter for debug: V(1) and above are I."""
    if level >= logging.CRITICAL:
        return "F"
    if level >= logging.ERROR:
        return "E"
    return "W" if level >= logging.WARNING else "I"


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
