"""Owns the `loden` command: gathers the verbs, turns errors into one line and an exit code.

Free of: work; each verb imports what it needs when it runs, so that `loden --help` is quick.
Invariant: an error that we know ends in `loden: <text>` on standard error and exit code 1, never in a traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from dataplane.cli import (
    bench,
    capture,
    demo,
    explain,
    extcap,
    lab,
    migrate,
    net_conf,
    read,
    replay,
    status,
    systemd_unit,
    version,
)
from dataplane.errors import LodenError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        prog="loden",
        allow_abbrev=False,
        description="Loden, a container overlay network: how a node is, its packets, the config of all nodes, labs.",
    )
    parser.add_argument("--version", action="version", version=version.TEXT, help="print the version and exit")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    lab_verbs = lab.add(verbs)
    demo.add(lab_verbs)
    bench.add(verbs)
    status.add(verbs)
    explain.add(verbs)
    capture.add(verbs)
    read.add(verbs)
    replay.add(verbs)
    extcap.add(verbs)
    net_conf.add(verbs)
    migrate.add(verbs)
    systemd_unit.add(verbs)
    version.add(verbs)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    try:
        return int(arguments.run(arguments))
    except LodenError as error:
        print(f"loden: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a table went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _leave(number: int, _frame: FrameType | None) -> None:
    """An ordered end, so that a lab that is being built is taken down again."""
    raise SystemExit(128 + number)
