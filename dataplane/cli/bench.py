"""Owns `loden bench`: the words of its command line, and where its result goes.

Free of: measuring. Invariant: what is asked for is checked before the first namespace is made.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane.errors import ConfigError

if TYPE_CHECKING:
    from dataplane.bench.candidate import Candidate

_CANDIDATES = ("raw", "kernel-vxlan", "udp", "baseline", "prototype")
_PROFILES = ("p1", "p2", "p2x", "p3")
_WORKLOADS = ("tcp-1", "tcp-4", "udp-64", "rtt-busy", "rtt-idle")
_QUICK = ("tcp-1", "udp-64", "rtt-busy", "rtt-idle")
_SUBJECT = "udp"


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("bench", help="measure all paths side by side on this machine", allow_abbrev=False)
    parser.set_defaults(run=_bench)
    for option, text in (
        ("--candidates", f"of {', '.join(_CANDIDATES)} (default: all there are)"),
        ("--profiles", f"names or .toml files (default: {','.join(_PROFILES)})"),
        ("--workloads", f"tcp-FLOWS udp-BYTES udp-mtu rtt-busy rtt-idle (default: {','.join(_WORKLOADS)})"),
    ):
        parser.add_argument(option, type=_split, metavar="A,B,...", help=text)
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each candidate (5)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of each sample (2)")
    prototype = "a C file that is measured too, called as PROGRAM DEVICE LOCAL REMOTE 0"
    parser.add_argument("--prototype", type=Path, metavar="FILE.c", help=prototype)
    parser.add_argument(
        "--udp-flags",
        type=shlex.split,
        default=[],
        metavar="'FLAGS'",
        help="further flags for our flanneld, with = before them: --udp-flags='--spin=0 --tun-uso=false'",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for run.json and report.md (loden-bench-DATE)")
    parser.add_argument("--name", default="bench", help="of the test stand (bench)")
    quick = "first profile, three rounds of one second; no raw underlay, no tcp-4"
    parser.add_argument("--quick", action="store_true", help=quick)


def _split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _candidates(arguments: argparse.Namespace) -> list[Candidate]:
    from dataplane.bench import candidate

    makers: dict[str, Callable[[], Candidate]] = {
        "raw": candidate.Raw,
        "kernel-vxlan": candidate.KernelVxlan,
        "udp": lambda: candidate.Daemon(arguments.udp_flags),
        "baseline": candidate.Baseline,
        "prototype": lambda: candidate.Prototype(arguments.prototype),
    }
    names = arguments.candidates or [name for name in _CANDIDATES if name != "raw" or not arguments.quick]
    if arguments.prototype is None:
        if "prototype" in (arguments.candidates or ()):
            raise ConfigError("candidate prototype: say which C file it is with --prototype=FILE.c")
        names = [name for name in names if name != "prototype"]
    elif "prototype" not in names:
        names = [*names, "prototype"]
    if unknown := [name for name in names if name not in makers]:
        raise ConfigError(f"{unknown[0]!r} is no candidate: take of {', '.join(_CANDIDATES)}")
    return [makers[name]() for name in dict.fromkeys(names)]


def _bench(arguments: argparse.Namespace) -> int:
    from dataplane.bench import profile, report
    from dataplane.bench.run import Plan, execute
    from dataplane.bench.workload import Timing, Workload

    quick: bool = arguments.quick
    seconds = (1.0 if quick else 2.0) if arguments.seconds is None else arguments.seconds
    rounds = (3 if quick else 5) if arguments.rounds is None else arguments.rounds
    if rounds < 1 or not 0.1 <= seconds <= 600:
        raise ConfigError("--rounds is at least 1, --seconds from 0.1 to 600")
    plan = Plan(
        candidates=_candidates(arguments),
        profiles=[profile.load(name) for name in arguments.profiles or _PROFILES[: 1 if quick else None]],
        workloads=[Workload.parse(name) for name in arguments.workloads or (_QUICK if quick else _WORKLOADS)],
        rounds=rounds,
        timing=Timing(warmup=min(0.5, seconds / 2), seconds=seconds),
        directory=arguments.out or Path(time.strftime("loden-bench-%Y%m%d-%H%M%S")),
        subject=_SUBJECT,
        name=arguments.name,
    )
    run = execute(plan, lambda text: print(text, file=sys.stderr, flush=True))
    print(report.markdown(run, plan.subject), end="")
    print(f"written: {plan.directory}/run.json and report.md", file=sys.stderr)
    return 0
