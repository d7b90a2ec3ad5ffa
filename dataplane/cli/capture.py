"""Owns `loden capture`: its words, and where the packets go.

Free of: taps and files; the daemon captures, dataplane.debug.recording writes. Invariant: an interrupt ends a capture
in order, so that the file is whole and has its statistics.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import socket
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataplane.cli import asking
from dataplane.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from io import BufferedReader

    from dataplane.debug.pcapng import Statistics

_EXAMPLES = """\
examples:
  loden capture                                 a line for each packet, until Ctrl-C
  loden capture -w all.pcapng --for 10s         ten seconds, for Wireshark
  loden capture --drops                         only what was not carried, and why
  loden capture --pod 10.244.3.7 tcp port 80    tcpdump's words, of the inner packet
  loden capture -w - | tshark -i -              into another program
"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "capture",
        help="packets of this node, inner and outer side by side, as lines or as pcapng",
        description="Capture packets on their way through this node's daemon.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-w", dest="file", metavar="FILE|-", help="write pcapng, mode 0600, instead of lines")
    parser.add_argument("-c", dest="count", type=int, default=0, metavar="N", help="end after N packets")
    parser.add_argument("-s", dest="snaplen", type=int, metavar="BYTES", help="keep so much of each packet (all)")
    parser.add_argument("--for", dest="seconds", default="", metavar="TIME", help="end after so long: 10s, 2m")
    parser.add_argument("--rotate-size", default="", metavar="SIZE", help="with -w: a new file after 10M, 64Mi")
    parser.add_argument("--rotate-time", default="", metavar="TIME", help="with -w: a new file after 60s, 1h")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="how many of these files stay (all)")
    parser.add_argument("--buffer", type=int, default=16, metavar="MIB", help="ring of each direction (16)")
    parser.add_argument(
        "--outer",
        default="",
        metavar="FROM",
        help="outer headers: `rebuilt` from what a UDP socket shows, or `wire`, as they are on the underlay "
        "(rebuilt; wire where the kernel carries the packets)",
    )
    parser.add_argument("--json", action="store_true", help="an object of JSON for each packet instead of a line")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary at the end")
    parser.add_argument("--check", action="store_true", help="only look whether the filter can be understood")
    add_filters(parser)
    asking.add_socket(parser)
    parser.set_defaults(run=run)


def add_filters(parser: argparse.ArgumentParser) -> None:
    """The options that name packets, and the expression."""
    parser.add_argument("--tx", action="store_true", help="only from the overlay to the underlay")
    parser.add_argument("--rx", action="store_true", help="only from the underlay to the overlay")
    parser.add_argument("--drops", action="store_true", help="only packets that were not carried")
    parser.add_argument("--peer", default="", metavar="NODE", help="the other node: its name, public IP or subnet")
    parser.add_argument("--subnet", default="", metavar="CIDR", help="inner address in this subnet")
    parser.add_argument("--pod", default="", metavar="ADDRESS", help="inner address of a pod")
    parser.add_argument("--proto", default="", metavar="NAME|N", help="inner protocol: tcp, udp, icmp, 47")
    parser.add_argument("--port", default="", metavar="N", help="inner TCP, UDP or SCTP port")
    parser.add_argument("expression", nargs="*", metavar="EXPRESSION", help="tcpdump's words: host, net, port, and ...")


def filter_text(arguments: argparse.Namespace) -> str:
    """All options that name packets as one expression. Raises ConfigError that names the option."""
    from dataplane.debug import expression

    terms = [word for word in ("tx", "rx") if getattr(arguments, word)]
    if len(terms) == 2:
        terms = []
    if arguments.drops:
        terms.append("drop")
    for option, word, check in (("subnet", "net", ip_network), ("pod", "host", ip_address)):
        if text := getattr(arguments, option):
            try:
                terms.append(f"{word} {check(text)}")
            except ValueError as error:
                raise ConfigError(f"--{option}: {error}") from None
    for option in ("peer", "proto", "port"):
        if text := getattr(arguments, option):
            terms.append(_alone(option, text))
    own = " ".join(arguments.expression)
    expression.compile_filter(expression.parse(own))
    if own:
        terms.append(f"({own})" if terms else own)
    text = " and ".join(terms)
    expression.compile_filter(expression.parse(text))
    return text


def _alone(option: str, text: str) -> str:
    """An option's value as a primitive of the expression. Raises ConfigError that names the option."""
    from dataplane.debug import expression

    term = text if option == "proto" and text in ("icmp", "icmp6") else f"{option} {text}"
    if len(text.split()) != 1:
        raise ConfigError(f"--{option} takes one word, not {text!r}; an expression behind the options takes more")
    try:
        expression.parse(term)
    except ConfigError as error:
        said = str(error).partition("\n")[0].removeprefix("filter: ")
        raise ConfigError(f"--{option} {text}: {said}") from None
    return term


def run(arguments: argparse.Namespace) -> int:
    """Capture as the words say. Raises LodenError."""
    atexit.register(_release, arguments.file)  # once an error is told: tshark reads no further than the pipe's end
    order: dict[str, Any] = {"filter": filter_text(arguments), "count": arguments.count, "ring_mib": arguments.buffer}
    if arguments.snaplen is not None:
        order["snaplen"] = arguments.snaplen
    if arguments.seconds:
        order["seconds"] = asking.seconds(arguments.seconds, "--for")
    if arguments.outer:  # an older daemon need not know it
        order["outer"] = arguments.outer
    if arguments.check:
        return 0
    rotating = arguments.rotate_size or arguments.rotate_time
    if (rotating or arguments.keep) and arguments.file in (None, "-"):
        raise ConfigError("--rotate-size, --rotate-time and --keep need a file: -w FILE")
    if arguments.keep < 0:
        raise ConfigError(f"--keep {arguments.keep}: a number of files, from 0 for all")
    if arguments.json and arguments.file:
        raise ConfigError("--json is another form of the lines: leave -w out")
    if arguments.file == "-" and sys.stdout.isatty():
        raise ConfigError("-w - writes pcapng, which is not for a terminal: use a pipe, or leave -w out for lines")
    from dataplane.debug import control

    with control.stream(asking.socket_path(arguments), "capture", **order) as connection:
        _end_in_order(connection)
        with connection.makefile("rb") as stream:
            statistics = _receive(stream, arguments)
    return _summary(statistics, quiet=arguments.quiet)


def _release(name: str | None) -> None:
    """Whoever waits at a named pipe for a capture that has come to nothing, as tshark does, waits no longer."""
    if name is not None and Path(name).is_fifo():
        with contextlib.suppress(OSError):
            os.close(os.open(name, os.O_WRONLY | os.O_NONBLOCK))


def _receive(stream: BufferedReader, arguments: argparse.Namespace) -> list[Statistics]:
    from dataplane.debug import recording

    if arguments.file is None:
        return recording.show(stream, lambda line: print(line, flush=True), as_json=arguments.json)
    if arguments.file == "-":
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as pipe:
            return recording.copy(stream, pipe, "standard output")
    path = Path(arguments.file)
    if not (arguments.rotate_size or arguments.rotate_time):
        with recording.open_file(path) as file:
            return recording.copy(stream, file, str(path))
    ring = recording.Ring(
        path,
        size=asking.size(arguments.rotate_size, "--rotate-size") if arguments.rotate_size else 0,
        seconds=asking.seconds(arguments.rotate_time, "--rotate-time") if arguments.rotate_time else 0,
        keep=arguments.keep,
    )
    with ring:
        return ring.take(stream)


def _end_in_order(connection: socket.socket) -> None:
    """The first interrupt asks the daemon to end, which then sends the rest; a second one ends at once."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the daemon was quicker
            return

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _summary(statistics: list[Statistics], *, quiet: bool) -> int:
    if not statistics:
        raise CaptureError("the daemon ended before the capture did; what came until then was kept")
    found = statistics[0]
    if not quiet:
        print(f"{found.delivered} packets, {found.dropped} missing: {found.comment}", file=sys.stderr)
    return 0
