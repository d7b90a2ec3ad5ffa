"""Owns how a log line looks: klog's text format on one stream, as guides and log shippers for flannel expect it.

Free of: what is logged, by whom, and the Python logging API that callers use. Invariant: one record is one line,
plus continuation lines that start with four blanks; nothing that a record carries can look like a record of its own.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import TextIO


def configure(verbosity: int, stream: TextIO) -> None:
    """Send every record of the process to `stream`, DEBUG ones only from -v=1. May be called again."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(KlogFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbosity >= 1 else logging.INFO)


class KlogFormatter(logging.Formatter):
    """`I0629 14:28:35.866793    5522 file.py:386] text`: severity, date, local time, pid, place (facts 1.8)."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        when = datetime.fromtimestamp(record.created).strftime("%m%d %H:%M:%S.%f")
        head = f"{_severity(record.levelno)}{when} {record.process or 0:7d} {record.filename}:{record.lineno}] "
        # Text from peers, stores and files may stand in a record: without this it could move the
        # terminal's cursor, turn the direction of reading, or forge a line. Our own carets need "\n".
        return head + "\n    ".join(_printable(line) for line in text.split("\n"))


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
