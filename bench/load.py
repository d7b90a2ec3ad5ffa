"""Owns the load generator as a program, `python -m dataplane.bench.load VERB ...`: one side of a run, in a namespace.

Free of: the inner loops, which are C (generator/), and of what the numbers mean. What listens prints `ready` once it
does; every verb then prints one line of JSON. Invariant: congestion control is set on the socket and read back from it:
a namespace refuses the sysctl, and a default that nobody names would be measured instead. """

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import struct
import sys
from array import array
from ipaddress import IPv4Address
from typing import Any

from dataplane.bench import _load

PORT = 5301
PATIENCE = 5.0
"""Seconds that a sink waits for the first byte, and a source for its connection."""
_RECEIVE_BUFFER = 8 << 20
_PARALLEL = 32
"""Connections under way at a time: enough that the path is never idle, few enough for a listener's backlog."""
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
_TOTAL_RETRANS = 100  # offset in struct tcp_info, include/uapi/linux/tcp.h
_SOL_RAW = 255  # include/linux/socket.h
_ICMP_FILTER = 1  # include/uapi/linux/icmp.h
_ONLY_ECHO_REPLIES = struct.pack("=I", 0xFFFF_FFFE)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def tcp_sink(arguments: argparse.Namespace) -> dict[str, Any]:
    connections = _connections(arguments)
    try:
        seen = _load.tcp_drain(_descriptors(connections), arguments.warmup, arguments.seconds)
    finally:
        for connection in connections:  # by a reset: the source shall stop now, not after its buffer is empty
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    return dict(seen)


def tcp_source(arguments: argparse.Namespace) -> dict[str, Any]:
    connections = _connections(arguments)
    sent = _load.tcp_flood(_descriptors(connections), arguments.warmup + arguments.seconds + PATIENCE)
    control = connections[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return {
        "sent": sent,
        "congestion": control.rstrip(b"\0").decode(),
        "retransmits": sum(_retransmits(connection) for connection in connections),
    }


def _connections(arguments: argparse.Namespace) -> list[socket.socket]:
    """The flows: to `--host`, or as they come in where there is none. An accepted one has its listener's congestion
    control (tcp(7))."""
    control = arguments.congestion.encode()
    if not arguments.host:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
            listener.bind(("", arguments.port))
            listener.listen(arguments.flows)
            listener.settimeout(PATIENCE)
            _ready()
            return [listener.accept()[0] for _ in range(arguments.flows)]
    connections = []
    for _ in range(arguments.flows):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control)
        connection.settimeout(PATIENCE)
        connection.connect((arguments.host, arguments.port))
        connections.append(connection)
    return connections


def udp_sink(arguments: argparse.Namespace) -> dict[str, Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as incoming:
        incoming.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        incoming.bind(("", arguments.port))
        _ready()
        timing = arguments.warmup, arguments.seconds, arguments.slice
        seen, timeline = _load.udp_drain(incoming.fileno(), arguments.tag, PATIENCE, *timing)
    return {**seen, "timeline": timeline}


def udp_source(arguments: argparse.Namespace) -> dict[str, Any]:
    # Longer than the sink's window, which opens at its first arrival.
    seconds = arguments.warmup + arguments.seconds + 0.1
    hosts = spread(IPv4Address(arguments.host), arguments.spread)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outgoing:
        if not hosts:
            outgoing.connect((arguments.host, arguments.port))
        how = arguments.tag, arguments.size, arguments.rate, seconds, hosts, arguments.port
        sent = _load.udp_flood(outgoing.fileno(), *how)
    return dict(sent)


def spread(first: IPv4Address, count: int) -> list[int]:
    """One address in each of `count` /24s beside each other, shuffled, the same way each time."""
    hosts = [int(first) + 256 * number for number in range(count)]
    random.Random(1).shuffle(hosts)
    return hosts


def connect_sink(arguments: argparse.Namespace) -> dict[str, Any]:
    with socket.create_server(("", arguments.port), backlog=4096) as listener:
        listener.setblocking(False)
        _ready()
        return dict(_load.connect_drain(listener.fileno(), arguments.warmup, arguments.seconds))


def connect_source(arguments: argparse.Namespace) -> dict[str, Any]:
    seconds = arguments.warmup + arguments.seconds + 0.1
    made = _load.connect_flood(int(IPv4Address(arguments.host)), arguments.port, _PARALLEL, seconds)
    return dict(made)


def echo(arguments: argparse.Namespace) -> dict[str, Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setsockopt(_SOL_RAW, _ICMP_FILTER, _ONLY_ECHO_REPLIES)
        raw.connect((arguments.host, 0))
        identifier = os.getpid() & 0xFFFF
        seen, times = _load.echo(raw.fileno(), identifier, arguments.interval, arguments.warmup, arguments.seconds)
    return {**seen, **{name: value / 1000 for name, value in quantiles(times).items()}}


def quantiles(nanoseconds: array[int]) -> dict[str, float]:
    """Nearest-rank quantiles of the samples, with the least and the greatest; empty where there are none."""
    ordered = sorted(nanoseconds)
    if not ordered:
        return {}
    found = {name: float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for name, q in QUANTILES.items()}
    return {**found, "least": float(ordered[0]), "greatest": float(ordered[-1])}


def _descriptors(connections: list[socket.socket]) -> array[int]:
    return array("i", [connection.fileno() for connection in connections])


def _retransmits(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANS + 4)
    count: int = struct.unpack_from("=I", info, _TOTAL_RETRANS)[0]
    return count


def _ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dataplane.bench.load", description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    for run in (tcp_sink, tcp_source, udp_sink, udp_source, connect_sink, connect_source, echo):
        verb = verbs.add_parser(run.__name__.replace("_", "-"))
        verb.set_defaults(run=run)
        verb.add_argument("--port", type=int, default=PORT)
        verb.add_argument("--warmup", type=float, default=0.2)
        verb.add_argument("--seconds", type=float, default=1.0)
        watch = "a process whose processor time is told too; repeatable"
        verb.add_argument("--watch", type=int, action="append", default=[], metavar="PID", help=watch)
        if run in (udp_source, connect_source, echo):
            verb.add_argument("host")
        if run in (tcp_sink, tcp_source):
            verb.add_argument("--host", help="connect to it instead of listening")
            verb.add_argument("--flows", type=int, default=1)
            verb.add_argument("--congestion", default="cubic")
        if run in (udp_sink, udp_source):
            verb.add_argument("--tag", type=int, default=0, help="of this run; other datagrams are not counted")
        if run is udp_sink:
            verb.add_argument("--slice", type=float, default=0.0, help="seconds of a slice of the timeline; 0 is none")
        if run is udp_source:
            verb.add_argument("--size", type=int, default=64, help="payload bytes, 12 at least")
            verb.add_argument("--rate", type=float, default=0.0, help="datagrams a second; 0 is saturation")
            verb.add_argument("--spread", type=int, default=0, help="take turns over this many /24s from the host on")
        if run is echo:
            verb.add_argument("--interval", type=float, default=0.0, help="seconds; 0 is back to back")
    return parser


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the harness answers Ctrl-C; its sources and sinks just end
    arguments = _parser().parse_args()
    try:
        _load.watch_processes(array("i", arguments.watch))
        result = arguments.run(arguments)
    except OSError as error:
        sys.stderr.write(f"{' '.join(sys.argv[1:])}: {error}\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
