"""Owns what Wireshark asks a capture program (its extcap interface), and the dissectors that go with it.

Wireshark starts every extcap program when it starts itself, so this file imports next to nothing; a capture becomes
`loden capture` in place of this process. Free of packets. Invariant: every question is answered without a daemon.
"""

from __future__ import annotations

import glob
import os
import sys

VERSION = "1.0"
LAB_SOCKETS = "/run/loden/*/n*/subnet.env.sock"
DEFAULT = "loden"
RAW_IP = 101
OUTER = ("auto", "rebuilt", "wire")

ARGUMENTS = (
    ("--control-socket", "Control socket", "string", "of a daemon that is not at the default place", ()),
    ("--direction", "Direction", "selector", "one direction only", ("both", "tx", "rx")),
    ("--drops", "Drops only", "boolflag", "only packets that were not carried", ()),
    ("--peer", "Peer", "string", "the other node: its name, public IP or subnet", ()),
    ("--subnet", "Subnet", "string", "inner addresses in this subnet", ()),
    ("--pod", "Pod", "string", "inner address of a pod", ()),
    ("--proto", "Protocol", "string", "inner protocol: tcp, udp, icmp, 47", ()),
    ("--port", "Port", "string", "inner TCP, UDP or SCTP port", ()),
    ("--snaplen", "Bytes of each packet", "unsigned", "all, if left out", ()),
    ("--buffer", "Ring of each direction, MiB", "unsigned", "16, if left out", ()),
    ("--outer", "Outer headers", "selector", "as they are on the wire, or rebuilt from what a UDP socket shows", OUTER),
)
PASSED_ON = ("--peer", "--subnet", "--pod", "--proto", "--port", "--buffer")

SCRIPT = """\
#!{python} -IS
# Made by `loden extcap install`. -S: what Wireshark asks at its start needs no packages, and is answered at once.
import sys
sys.path.insert(0, {root!r})
from dataplane.extcap import main
sys.exit(main(sys.argv[1:]))
"""


def main(argv: list[str]) -> int:
    """Answer one call of Wireshark; a capture does not return."""
    given = parse(argv)
    if "--extcap-interfaces" in given:
        print_lines(interfaces())
    elif "--extcap-dlts" in given:
        print_lines([f"dlt {{number={RAW_IP}}}{{name=RAW}}{{display=Raw IP, inner and outer}}"])
    elif "--extcap-config" in given:
        print_lines(configuration())
    elif "--capture" in given or "--extcap-capture-filter" in given:
        return capture(given)
    else:
        sys.stderr.write("this program is started by Wireshark; see `loden extcap --help`\n")
        return 1
    return 0


def parse(argv: list[str]) -> dict[str, str]:
    """Options and their values; Wireshark writes both `--name value` and `--name=value`."""
    given: dict[str, str] = {}
    words = list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        given[name] = value
    return given


def print_lines(lines: list[str]) -> None:
    """All of the answer at once."""
    sys.stdout.write("\n".join(lines) + "\n")


def interfaces() -> list[str]:
    """This node's daemon, and those of labs on this machine."""
    lines = [f"extcap {{version={VERSION}}}{{display=Loden}}"]
    lines.append(f"interface {{value={DEFAULT}}}{{display=Loden overlay of this node}}")
    for path in sorted(glob.glob(LAB_SOCKETS)):  # noqa: PTH207 - pathlib costs half of the time that there is
        lab, node = path.split("/")[3:5]
        lines.append(f"interface {{value={DEFAULT}-{lab}-{node}}}{{display=Loden lab {lab}, node {node}}}")
    return lines


def configuration() -> list[str]:
    """The options of the capture dialogue."""
    lines = []
    for number, (call, display, kind, tip, values) in enumerate(ARGUMENTS):
        lines.append(f"arg {{number={number}}}{{call={call}}}{{display={display}}}{{type={kind}}}{{tooltip={tip}}}")
        for value in values:
            default = "true" if value == values[0] else "false"
            lines.append(f"value {{arg={number}}}{{value={value}}}{{display={value}}}{{default={default}}}")
    return lines


def capture(given: dict[str, str]) -> int:
    """Become `loden capture`; without a place to write to, say what is wrong with the filter. Wireshark takes a filter
    for good if nothing is printed, and shows the first line that is."""
    # without -S: the packages are needed now
    command = [sys.executable, "-P", "-m", "dataplane.cli", "capture", *words_of(given)]
    if "--capture" in given:
        os.execv(sys.executable, command)  # noqa: S606 - in place of ourselves
    to_output = [(os.POSIX_SPAWN_DUP2, 1, 2)]
    os.waitpid(os.posix_spawn(sys.executable, command, os.environ, file_actions=to_output), 0)
    return 0


def words_of(given: dict[str, str]) -> list[str]:
    """The command line of `loden capture` that means the same."""
    words = ["--quiet", *(["-w", given["--fifo"]] if "--capture" in given else ["--check"])]
    words += [f"--control-socket={given.get('--control-socket') or socket_of(given.get('--extcap-interface', ''))}"]
    words += [f"{name}={given[name]}" for name in PASSED_ON if given.get(name)]
    words += ["-s", given["--snaplen"]] if given.get("--snaplen") else []
    words += ["--drops"] if given.get("--drops", "false") != "false" else []
    direction, outer = given.get("--direction"), given.get("--outer")
    words += [f"--{direction}"] if direction in ("tx", "rx") else []
    words += [f"--outer={outer}"] if outer in OUTER[1:] else []
    text = given.get("--extcap-capture-filter", "")
    return [*words, "--", text] if text else words


def socket_of(interface: str) -> str:
    """The control socket of an interface; empty for this node's own daemon."""
    for path in glob.glob(LAB_SOCKETS):  # noqa: PTH207 - as above
        lab, node = path.split("/")[3:5]
        if interface == f"{DEFAULT}-{lab}-{node}":
            return path
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
