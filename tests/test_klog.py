"""klog's line format, and that no record can forge another."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.klog import JsonFormatter, KlogFormatter, configure

HEAD = re.compile(r"[IWEF]\d{4} \d{2}:\d{2}:\d{2}\.\d{6} [ \d]{7} [^ :]+:\d+\] ")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def record(text: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    made = logging.LogRecord("x", level, "/somewhere/file.py", 386, text, args, None)
    made.created = datetime(2026, 6, 29, 14, 28, 35, 866793).timestamp()
    made.process = 5522
    return made


def test_the_example_of_the_facts() -> None:
    assert KlogFormatter().format(record("text")) == "I0629 14:28:35.866793    5522 file.py:386] text"


@pytest.mark.parametrize(
    ("level", "letter"),
    [(logging.DEBUG, "I"), (logging.INFO, "I"), (logging.WARNING, "W"), (logging.ERROR, "E"), (logging.CRITICAL, "F")],
)
def test_severity(level: int, letter: str) -> None:
    assert KlogFormatter().format(record("text", level=level))[0] == letter


def test_control_characters_are_escaped_and_lines_continue_with_four_blanks() -> None:
    line = KlogFormatter().format(record("bad %s\n  caret\r", "\x1b[2J\u202e\x00\t\u2028é\udcff"))
    assert line.endswith("] bad \\x1b[2J\\u202e\\x00\\t\\u2028é\\udcff\n      caret\\r")


@given(st.text())
def test_one_record_is_one_line_with_indented_rest(text: str) -> None:
    first, *rest = KlogFormatter().format(record("%s", text)).split("\n")
    assert HEAD.match(first)
    assert all(line.startswith("    ") for line in rest)
    assert all(line.isprintable() for line in [first, *rest])
    assert len(rest) == text.count("\n")


def test_verbosity_and_a_second_configure() -> None:
    log = logging.getLogger("dataplane.test-klog")
    quiet, loud = io.StringIO(), io.StringIO()
    configure(0, quiet)
    log.debug("hidden")
    log.info("seen")
    configure(1, loud)
    log.debug("debug %d", 7)
    assert quiet.getvalue().count("\n") == 1
    assert quiet.getvalue().endswith("] seen\n")
    assert loud.getvalue().endswith("] debug 7\n")
    assert f" {os.getpid():7d} test_klog.py:" in loud.getvalue()


def test_an_exception_is_part_of_its_record() -> None:
    stream = io.StringIO()
    configure(0, stream)
    try:
        raise ValueError("why\x07")
    except ValueError:
        logging.getLogger("dataplane.test-klog").exception("it broke")
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("] it broke")
    assert lines[-1] == "    ValueError: why\\x07"


# --- which records, and in which form -------------------------------------------------------------------------


def lines(*, verbosity: int = 0, **settings: object) -> list[str]:
    """What reaches the stream of one debug and one info record, both of this file."""
    stream = io.StringIO()
    configure(verbosity, stream, **settings)  # type: ignore[arg-type]  # any of its settings
    logging.getLogger("x").debug("small")
    logging.getLogger("x").info("large")
    return stream.getvalue().splitlines()


def test_vmodule_shows_debug_lines_of_matching_files_only() -> None:
    for pattern in ("test_klog", "test_*", "t?st_klog"):
        assert len(lines(by_file={pattern: 1})) == 2
    for pattern in ("keeper", "klog", "test_klog.py"):
        assert len(lines(by_file={pattern: 9})) == 1
    assert len(lines(by_file={"test_klog": 0})) == 1
    assert len(lines(verbosity=1, by_file={"keeper": 0})) == 2


def test_a_stack_trace_at_the_place_that_was_asked_for() -> None:
    (plain,) = lines()
    place = plain.partition("]")[0].rpartition(" ")[2]
    traced = lines(backtrace_at=place)
    assert traced[0].endswith("large")
    assert any("test_a_stack_trace_at_the_place" in line for line in traced[1:])
    assert all(line.startswith("    ") for line in traced[1:])


def test_json_is_one_object_a_line_whatever_stands_in_it() -> None:
    logged = record("a\nb \x1b[31m \u202e %s", "ä", level=logging.WARNING)
    text = JsonFormatter().format(logged)
    assert text.isascii()
    assert "\n" not in text
    document = json.loads(text)
    assert document["msg"] == "a\nb \x1b[31m \u202e ä"
    assert (document["level"], document["caller"]) == ("warning", "file.py:386")
    assert datetime.fromisoformat(document["ts"]).timestamp() == pytest.approx(logged.created)


def test_the_form_is_chosen_by_its_flag() -> None:
    assert [json.loads(line)["msg"] for line in lines(form="json")] == ["large"]
