"""Owns `loden bench`: the words of its command line, and where its results go.

Free of: measuring and comparing. Invariant: what is asked for is checked before the first namespace is made.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane.errors import ConfigError

if TYPE_CHECKING:
    from dataplane.bench.record import Run

_PROFILES = ("p1", "p2", "p2x", "p3")
_WORKLOADS = ("tcp-1", "tcp-4", "udp-64", "rtt-busy", "rtt-idle")
_CANDIDATES = "raw host-gw kernel-vxlan vxlan udp baseline asyncio uvloop prototype"
_SYNTAX = (
    "tcp-FLOWS[-down|-both] udp-BYTES[@RATE] udp-mtu sweep-BYTES sweep-mtu rtt-busy rtt-idle rtt-load connect "
    "peers-COUNT publish table gil capture"
)
_QUICK = ("tcp-1", "udp-64", "rtt-busy")
_FULL = (
    *("tcp-1", "tcp-4", "tcp-16", "tcp-1-down", "tcp-1-both", "udp-64", "udp-512", "udp-mtu", "sweep-64", "sweep-mtu"),
    *("rtt-busy", "rtt-idle", "rtt-load", "connect", "peers-1", "peers-100", "peers-10000", "publish", "table", "gil"),
    "capture",
)
REGRESSION = 3
"""Exit code of a comparison that has found one; 1 is an error, 2 a wrong command line."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "bench",
        help="measure all paths side by side on this machine",
        description="Measure all paths side by side, in network namespaces; docs/benchmarks.md has more.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_bench)
    _add_choices(parser)
    _add_brought(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="for run.json and the report (loden-bench-DATE)")
    parser.add_argument("--name", default="bench", help="of the test stand (bench)")
    quick = (
        "first profile, three rounds of one second, tcp-1 udp-64 rtt-busy, and four candidates beside those you bring"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=quick)
    size.add_argument("--full", action="store_true", help="every workload; takes a night")
    _add_verbs(parser)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    for option, text in (
        ("--candidates", f"of {_CANDIDATES} (default: all but prototype)"),
        ("--profiles", f"names or .toml files (default: {','.join(_PROFILES)})"),
        ("--workloads", f"{_SYNTAX} (default: {','.join(_WORKLOADS)})"),
    ):
        parser.add_argument(option, type=_split, metavar="A,B,...", help=text)
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each candidate (5)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each sample (2)")


def _add_brought(parser: argparse.ArgumentParser) -> None:
    for option, metavar, text in (
        ("--ours", "NAME=BACKEND[,FLAG...]", "our flanneld once more, with flags of its own; repeatable"),
        ("--flanneld", "NAME=PATH[,BACKEND...]", "another flanneld, with each backend (udp,vxlan); repeatable"),
        ("--tunnel", "NAME=SCRIPT", "any tunnel: `SCRIPT up|down` on each node, see docs/benchmarks.md; repeatable"),
    ):
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=text)
    prototype = "a C file that is measured too, called as PROGRAM DEVICE LOCAL REMOTE 0"
    parser.add_argument("--prototype", type=Path, metavar="FILE.c", help=prototype)
    parser.add_argument(
        "--our-flags",
        type=shlex.split,
        default=[],
        metavar="'FLAGS'",
        help="further flags for our flanneld, with = before them: --our-flags='--spin=0 --tun-uso=false'",
    )


def _add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="COMMAND", title="commands (none: measure)")
    report = verbs.add_parser("report", help="write pictures, a page and tables of former runs", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, or its run.json")
    report.add_argument("--to", type=Path, metavar="DIR", help="where to (the directory of the first run)")
    into = "write the short form into a Markdown page that has a place for it, and the rest into its folder"
    report.add_argument("--into", type=Path, metavar="FILE.md", help=into)
    report.set_defaults(run=_report)
    compare = verbs.add_parser(
        "compare", help=f"what has changed between two runs; exit code {REGRESSION} on a regression", allow_abbrev=False
    )
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    tolerance = "changes up to this share are none, however sure (0.1)"
    compare.add_argument("--tolerance", type=float, default=0.1, metavar="SHARE", help=tolerance)
    compare.set_defaults(run=_compare)
    selftest = verbs.add_parser("selftest", help="does the harness find faults of known size?", allow_abbrev=False)
    selftest.add_argument("--keep", type=Path, metavar="DIR", help="keep its run there")
    selftest.set_defaults(run=_selftest)
    schema = verbs.add_parser("schema", help="print the JSON Schema of run.json", allow_abbrev=False)
    schema.set_defaults(run=_schema)


def _split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _bench(arguments: argparse.Namespace) -> int:
    from dataplane.bench import profile, report, roster
    from dataplane.bench.ends import Timing
    from dataplane.bench.run import Plan, execute
    from dataplane.bench.workload import Workload

    quick: bool = arguments.quick
    seconds = (1.0 if quick else 2.0) if arguments.seconds is None else arguments.seconds
    rounds = (3 if quick else 5) if arguments.rounds is None else arguments.rounds
    if rounds < 1 or not 0.1 <= seconds <= 600:
        raise ConfigError("--rounds is at least 1, --seconds from 0.1 to 600")
    usual = _QUICK if quick else _FULL if arguments.full else _WORKLOADS
    workloads = [Workload.parse(name) for name in arguments.workloads or usual]
    given = arguments
    brought = roster.Brought(given.prototype, given.flanneld, given.tunnel, given.our_flags, given.ours)
    plan = Plan(
        candidates=roster.candidates(
            arguments.candidates or (roster.QUICK if quick else roster.DEFAULT), brought, workloads
        ),
        profiles=[profile.load(name) for name in arguments.profiles or _PROFILES[: 1 if quick else None]],
        workloads=workloads,
        rounds=rounds,
        timing=Timing(warmup=min(0.2 if quick else 0.5, seconds / 2), seconds=seconds),
        directory=arguments.out or Path(time.strftime("loden-bench-%Y%m%d-%H%M%S")),
        name=arguments.name,
        arguments=sys.argv[1:],
    )
    run = execute(plan, _say)
    print(report.markdown(run), end="")
    _say(f"written: {plan.directory}/report.html, report.md with its pictures, run.json, pytest-benchmark.json")
    return _verdict(run)


def _verdict(run: Run) -> int:
    """1 where a candidate has given nothing but failures."""
    silent = [
        name
        for name in run.settings.candidates
        if all("failed" in sample.figures for sample in run.samples if sample.candidate == name)
    ]
    if silent:
        _say(f"nothing could be measured of: {', '.join(silent)}")
    return 1 if silent else 0


def _report(arguments: argparse.Namespace) -> int:
    from dataplane.bench import report
    from dataplane.bench.record import Run

    runs = [Run.read(path) for path in arguments.runs]
    first: Path = arguments.runs[0]
    if arguments.into is not None:
        written = report.into(runs, arguments.into)
    else:
        written = report.write_all(runs, arguments.to or (first if first.is_dir() else first.parent))
    for path in written:
        print(path)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from dataplane.bench import compare, document
    from dataplane.bench.record import Run

    old, new = Run.read(arguments.old), Run.read(arguments.new)
    changes = compare.compare(old, new, arguments.tolerance)
    print(document.markdown(compare.blocks(old, new, changes)), end="")
    return REGRESSION if any(change.regression for change in changes) else 0


def _selftest(arguments: argparse.Namespace) -> int:
    import tempfile

    from dataplane.bench import selftest

    with tempfile.TemporaryDirectory(prefix="loden-bench-") as temporary:
        found = selftest.run(arguments.keep or Path(temporary), arguments.name, _say)
    for one in found:
        word = "found" if one.good else "NOT FOUND"
        print(f"{one.what}: injected {one.injected:g}, measured {one.found:.3f}: {word}")
    return 0 if all(one.good for one in found) else 1


def _schema(_arguments: argparse.Namespace) -> int:
    from dataplane.bench import record

    print(json.dumps(record.schema(), indent=1))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
