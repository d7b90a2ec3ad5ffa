"""Owns `loden explain`: the way from this node to an address, step by step, and the sentence that it comes to.

Free of: looking; the daemon does. Invariant: an exit code of 0 means that no fault was found.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dataplane.cli import asking

PATIENCE = 30.0
"""Seconds for the daemon's tools and probes."""

_STEP = "  {mark} {step:<12}{text}"


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "explain",
        help="what stands between this node and an address, and what is wrong with it",
        description="Look at everything between this node and an address, and send a few probes: echoes to the other "
        "node inside and outside the overlay, and where these are not answered an empty datagram to its port.",
        allow_abbrev=False,
    )
    parser.add_argument("address", metavar="ADDRESS", help="of a pod or of a node")
    parser.add_argument("--no-probe", dest="probe", action="store_false", help="send nothing")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")
    asking.add_socket(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print. Raises LodenError."""
    from dataplane.debug import control

    path = asking.socket_path(arguments)
    answer = control.request(path, "explain", PATIENCE, address=arguments.address, probe=arguments.probe)
    print(json.dumps(answer, indent=2) if arguments.json else text(answer))
    return 1 if answer["command"] else 0


def text(answer: dict[str, Any]) -> str:
    """What a person reads."""
    steps = [{**step, "mark": " " if step["ok"] else "!"} for step in answer["steps"]]
    lines = [answer["address"], *(_STEP.format(**step) for step in steps)]
    if probes := answer["probes"]:
        lines += [_STEP.format(mark=" ", step="probe", text=line) for line in _probe_lines(probes)]
    lines += ["", answer["verdict"]]
    if answer["command"]:
        lines.append(f"  try: {answer['command']}")
    return "\n".join(lines)


def _probe_lines(probes: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {_answer_text(probes[key])}"
        for name, key in (
            ("echo in the overlay", "inner_small"),
            ("the same at the MTU", "inner_mtu"),
            ("echo to the public IP", "public_ip"),
        )
    ]
    if probes["port"] != "not sent":
        lines.append(f"datagram to the port: {probes['port']}")
    for word, key in (("dropped meanwhile", "drops"), ("strangers", "unknown_sources"), ("UDP errors", "udp_errors")):
        if probes[key]:
            lines.append(f"{word}: {', '.join(f'{name} {count}' for name, count in probes[key].items())}")
    return lines


def _answer_text(answer: dict[str, Any]) -> str:
    came = f"{answer['received']} of {answer['sent']} answered"
    if answer["ms"] is not None:
        return f"{came}, {answer['ms']:.2f} ms"
    return f"{came}{', ' + answer['error'] if answer['error'] else ''}"
