"""Owns processes that open a device and keep it. Free of what they open, which is their program."""

from __future__ import annotations

import subprocess

from tests.namespaces import Namespace


def hold(ns: Namespace, program: str, adopt: str = "") -> tuple[subprocess.Popen[str], str]:
    """Another process that opened a device and keeps it; with the line that it printed."""
    process = ns.spawn_python(program, adopt)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=30)
    return process, line.strip()
