"""Owns `loden migrate check`: shows what `cli.migration` finds, and tells by its code whether a node can be swapped.

Exit codes: 0 it can, 1 it cannot (each `blocked` line says why), 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import json

from dataplane.cli import found_flanneld


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("migrate", help="from flannel's flanneld to this one")
    subverbs = parser.add_subparsers(metavar="COMMAND", required=True)
    checker = subverbs.add_parser(
        "check",
        help="whether this node can be swapped, and what differs; changes nothing",
        description="Look at this node's flanneld (a running one, else its systemd unit, or the flags given here), its"
        " store, lease, port, devices and rules, and say whether ours can take its place. Changes nothing.",
        allow_abbrev=False,
    )
    checker.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    checker.add_argument("flags", nargs="*", metavar="-- FLAG", help="flanneld's flags, in place of those found here")
    checker.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    import asyncio

    from dataplane.cli import migration

    found = found_flanneld.Found("flags given here", tuple(arguments.flags)) if arguments.flags else None
    findings = asyncio.run(migration.check(found or found_flanneld.find()))
    swappable = all(finding.level != migration.BLOCKED for finding in findings)
    if arguments.json:
        rows = [{"area": each.area, "level": each.level, "text": each.text} for each in findings]
        print(json.dumps({"swappable": swappable, "findings": rows}, indent=2))
    else:
        for each in findings:
            print(f"{each.level:8} {each.area:12} {each.text.replace(chr(10), chr(10) + ' ' * 22)}")
        print("\nThis node can be swapped." if swappable else "\nThis node cannot be swapped yet: see blocked lines.")
    return 0 if swappable else 1
