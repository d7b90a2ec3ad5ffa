"""Owns `loden read`: a capture file as lines, or as a table of its flows.

Free of: files and packets (dataplane.debug.reading). Invariant: what a broken file holds before its break is shown, and
the exit code then says that it is broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataplane.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dataplane.debug.pcapng import Statistics
    from dataplane.debug.reading import Flow, Pair, Summary


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "read",
        help="a capture file: its flows, or a line for each packet",
        description="Read one capture, or those of the two nodes between which packets travel: then the delay from one "
        "to the other is told too, as true as their clocks agree.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pcapng; one, or one of each node")
    parser.add_argument("--lines", action="store_true", help="a line for each packet instead of the flows")
    parser.add_argument("--drops", action="store_true", help="only packets that were not carried")
    parser.add_argument("--json", action="store_true", help="the flows, or with --lines the packets, as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read and print. Raises LodenError."""
    from dataplane.debug import dissect, reading

    if len(arguments.files) > 2:
        raise ConfigError("at most two files: those of the two nodes between which packets travel")
    with reading.open_captures(arguments.files) as items:
        whole = _Whole(items, drops=arguments.drops)
        if arguments.lines:
            for item in whole:
                if isinstance(item, reading.Pair):
                    print(json.dumps(dissect.document(item.first)) if arguments.json else dissect.line(item.first))
        else:
            summary = reading.flows(whole, merged=len(arguments.files) == 2)
            print(json.dumps(document(summary), indent=2) if arguments.json else table(summary))
    if whole.broken:
        print(f"loden: {whole.broken}", file=sys.stderr)
    return 1 if whole.broken else 0


class _Whole:
    """Everything up to the end, or up to the break; `broken` says then what is wrong."""

    def __init__(self, items: Iterator[Pair | Statistics], *, drops: bool) -> None:
        self._items = items
        self._drops = drops
        self._any = False
        self.broken = ""

    def __iter__(self) -> Iterator[Pair | Statistics]:
        try:
            for item in self._items:
                self._any = True
                if not self._drops or getattr(item, "drop", True):
                    yield item
        except CaptureError as error:
            if not self._any:
                raise
            self.broken = str(error)


def document(summary: Summary) -> dict[str, Any]:
    """The summary in JSON's types."""
    return {
        "flows": [
            {
                "protocol": flow.key[0],
                "source": flow.key[1],
                "destination": flow.key[2],
                "packets": flow.packets,
                "bytes": flow.bytes,
                "seconds": (flow.last_ns - flow.first_ns) / 1e9,
                "retransmitted": flow.retransmitted,
                "gaps": flow.gaps,
                "drops": flow.drops,
                "sent": flow.sent if summary.merged else None,
                "arrived": flow.arrived if summary.merged else None,
                "delay_ms": _delays(flow),
            }
            for flow in summary.flows.values()
        ],
        "not_ip": summary.not_ip,
        "missing": summary.missing,
    }


def _delays(flow: Flow) -> dict[str, float] | None:
    if not flow.delays:
        return None
    return {"min": min(flow.delays), "median": statistics.median(flow.delays), "max": max(flow.delays)}


def table(summary: Summary) -> str:
    """A line for each flow, the largest first."""
    from dataplane.lab.measure import table as columns

    header = ["protocol", "from", "to", "packets", "bytes", "again", "gaps", "dropped"]
    if summary.merged:
        header += ["sent", "arrived", "delay ms"]
    rows = []
    for flow in sorted(summary.flows.values(), key=lambda flow: -flow.bytes):
        dropped = ", ".join(f"{reason} {count}" for reason, count in flow.drops.items()) or "-"
        row: list[Any] = [*flow.key, flow.packets, flow.bytes, flow.retransmitted, flow.gaps, dropped]
        if summary.merged:
            delays = _delays(flow)
            row += [flow.sent, flow.arrived, f"{delays['median']:.3f}" if delays else "-"]
        rows.append(row)
    lines = [columns(header, rows) if rows else "no packets"]
    if summary.not_ip:
        lines.append(f"{summary.not_ip} datagrams held no IP packet")
    if summary.missing:
        lines.append(f"{summary.missing} packets found no room in the ring and are missing: gaps may be theirs")
    return "\n".join(lines)
