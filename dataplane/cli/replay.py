"""Owns `loden replay`: its words, how differences are printed, and what its exit code says.

Free of packets (dataplane.debug.replay). Invariant: as diff(1) does, it ends with 0 where nothing differs, 1 where
something does, and 2 where the file cannot be used, or not to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataplane.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from dataplane.debug.comparison import Difference
    from dataplane.debug.pcapng import Statistics
    from dataplane.debug.reading import Pair
    from dataplane.debug.replay import Tally

DIFFERS, UNUSABLE = 1, 2
_EPILOG = """\
exit code: 0 nothing differs, 1 something does, 2 the file cannot be used

examples:
  loden replay fault.pcapng                     does the path still do what it did then?
  loden replay --json fault.pcapng | jq .differ
  loden replay --port 4789 --wire vxlan eth0.pcapng
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "replay",
        help="a capture file through the path once more: what comes out otherwise than it was recorded",
        description="Feed the packets of a capture through this version's path, without any network, and print what "
        "differs from what was recorded. A file of the underlay alone is decapsulated and encapsulated again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="pcapng of `loden capture`, or of the underlay")
    parser.add_argument(
        "--source-check", choices=("node", "strict", "off"), default="node", help="what the daemon had (node)"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="of the overlay, in a file of the underlay (8285 8472 4789)"
    )
    parser.add_argument("--wire", choices=("udp", "vxlan"), help="what its datagrams carry (udp on 8285, else vxlan)")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="differences to print, 0 for all (20)")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay and print. Raises ConfigError."""
    from dataplane.debug import replay
    from dataplane.path.facts import SourceCheck

    if arguments.most < 0 or (arguments.port is not None and not 0 < arguments.port < 1 << 16):
        raise ConfigError("--most counts up from 0, --port from 1 to 65535")
    wire = replay.Wire(arguments.port, None if arguments.wire is None else arguments.wire == "vxlan")
    path: Path = arguments.file
    played = replay.Replay(lambda: _items(path), SourceCheck[arguments.source_check.upper()], wire)
    shown: list[Difference] = []
    broken = ""
    try:
        for difference in played.run(_items(path)):
            if arguments.most == 0 or len(shown) < arguments.most:
                shown.append(difference)
                if not arguments.json:
                    print(text(difference))
    except CaptureError as error:
        broken = str(error) if str(path) in str(error) else f"{path}: {error}"
    finally:
        played.close()
    if arguments.json:
        print(json.dumps(document(played.tally, shown, broken), indent=2))
    elif played.tally.tx + played.tally.rx or not broken:
        print("\n".join(summary(played.tally, len(shown))))
    if broken:
        print(f"loden: {broken}", file=sys.stderr)
        return UNUSABLE
    if not played.tally.tx + played.tally.rx:
        print(f"loden: {path}: nothing in it could be fed to the path", file=sys.stderr)
        return UNUSABLE
    return DIFFERS if played.tally.differ else 0


def _items(path: Path) -> Iterator[Pair | Statistics]:
    from dataplane.debug import reading

    with reading.open_captures([path]) as items:
        yield from items


def text(difference: Difference) -> str:
    """A difference in four lines."""
    where = difference.what
    if difference.at is not None:
        where += f", byte {difference.at}: {difference.field}"
    return "\n".join(
        (
            f"packet {difference.record.number}  {difference.record}",
            f"  {where}",
            f"    recorded   {difference.recorded}",
            f"    comes out  {difference.comes_out}",
        )
    )


def summary(tally: Tally, shown: int) -> list[str]:
    """What was fed, and what was not or could not be judged."""
    lines = [f"{tally.tx} packets encapsulated, {tally.rx} datagrams decapsulated: {tally.differ or 'none'} differ"]
    if shown < tally.differ:
        lines[0] += f", of which the first {shown} are shown"
    if tally.superframes:
        lines.append(f"{tally.superframes} superframes were made whole again and fed as such")
    if tally.cut:
        lines.append(f"{tally.cut} were cut by the capture, and compared as far as they were kept")
    for reason, count in sorted(tally.undecided.items()):
        lines.append(f"{count} drops were not the path's to decide: {reason}")
    if tally.unfit:
        lines.append(f"{tally.unfit} were not fed: too little was kept of them, or they are of no overlay")
    if tally.missing:
        lines.append(f"{tally.missing} packets are missing in the capture")
    return lines


def document(tally: Tally, shown: list[Difference], broken: str) -> dict[str, Any]:
    """The result in JSON's types."""
    return {
        "encapsulated": tally.tx,
        "decapsulated": tally.rx,
        "differ": tally.differ,
        "superframes": tally.superframes,
        "cut": tally.cut,
        "undecided": dict(sorted(tally.undecided.items())),
        "unfit": tally.unfit,
        "missing": tally.missing,
        "broken": broken,
        "differences": [
            {
                "packet": one.record.number,
                "what": str(one.record),
                "differs": one.what,
                "byte": one.at,
                "field": one.field,
                "recorded": one.recorded,
                "comes_out": one.comes_out,
            }
            for one in shown
        ],
    }
