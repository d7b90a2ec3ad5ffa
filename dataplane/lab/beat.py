"""Owns the steady beat of the lab: numbered datagrams at a fixed pace, whatever happens on the way, and their gaps.

Free of: namespaces and daemons; it is a plain program for two pods, `python -m dataplane.lab.beat VERB ...`.
Where `dataplane.lab.traffic` waits for its acknowledgements, this goes on: so it shows how long a network was away.
The sink prints `ready` once it listens, the source once it has begun. It sends until its standard input closes, then
asks the sink by TCP what has come, and prints one line of JSON: `sent`, `lost`, `duplicated`, and `gap`, the longest
time in seconds in which nothing arrived.

Invariant: a time in which the source itself could not send counts as a gap as well; nothing shows better than it was.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import socket
import struct
import sys
import time

PORT = 5202
_NUMBER = struct.Struct("!Q")
_LATE = 0.5
"""Seconds after the last datagram in which the sink still counts what comes."""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def beat_sink(arguments: argparse.Namespace) -> int:
    """Note when each datagram comes, until the source asks."""
    came: dict[int, float] = {}
    duplicated = 0
    family = _family(arguments.host)
    with (
        socket.create_server((arguments.host, PORT), family=family, backlog=1) as listener,
        socket.socket(family, socket.SOCK_DGRAM) as incoming,
    ):
        incoming.bind((arguments.host, PORT))
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([incoming, listener], [], [])
            if incoming in readable:
                (number,) = _NUMBER.unpack(incoming.recv(64))
                duplicated += number in came
                came.setdefault(number, time.monotonic())
            elif listener in readable:
                break
        with listener.accept()[0] as connection:
            times = sorted(came.values())
            gap = max((later - earlier for earlier, later in itertools.pairwise(times)), default=None)
            connection.sendall(json.dumps({"received": len(came), "duplicated": duplicated, "gap": gap}).encode())
    return 0


def beat_source(arguments: argparse.Namespace) -> int:
    """Send `--rate` datagrams a second until standard input closes. Ends with 0 if none was lost."""
    pause, sent, next_at = 1.0 / arguments.rate, 0, time.monotonic()
    with socket.socket(_family(arguments.host), socket.SOCK_DGRAM) as outgoing:
        while not _stdin_closed(max(0.0, next_at - time.monotonic())):
            with contextlib.suppress(OSError):  # no route or a full queue: lost like any other on the way
                outgoing.sendto(_NUMBER.pack(sent), (arguments.host, PORT))
            sent += 1
            if sent == 1:
                print("ready", flush=True)
            next_at = max(next_at + pause, time.monotonic())  # what was missed is not made up for in a burst
    time.sleep(_LATE)
    with socket.create_connection((arguments.host, PORT), timeout=30) as connection:
        answer = json.loads(b"".join(iter(lambda: connection.recv(4096), b"")))
    lost = sent - answer["received"]
    print(json.dumps({"sent": sent, "lost": lost, **answer}), flush=True)
    return 1 if lost or answer["duplicated"] else 0


def _stdin_closed(wait: float) -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], wait)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dataplane.lab.beat", description="A steady beat between two pods.")
    verbs = parser.add_subparsers(required=True)
    for run in (beat_sink, beat_source):
        verb = verbs.add_parser(run.__name__.replace("_", "-"), help=(run.__doc__ or "").splitlines()[0])
        verb.set_defaults(run=run)
        verb.add_argument("host", help="the sink's address")
        if run is beat_source:
            verb.add_argument("--rate", type=float, default=1000.0, help="datagrams a second (1000)")
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
