"""Owns `loden status`: what a node knows of itself, as a page, as JSON, or as a table that lives.

Free of: what the daemon tells (dataplane.debug.status). Invariant: an exit code of 0 means that the node is ready.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from dataplane.cli import asking

WATCH_SECONDS = 1.0
CLEAR = "\x1b[H\x1b[J"

_HINTS = {
    "NO_ROUTE": "no lease covers the destination: loden explain ADDRESS",
    "NOT_IP": "datagrams that hold no packet: loden capture drop NOT_IP",
    "LENGTH": "packets longer than their datagram: loden capture drop LENGTH",
    "UNKNOWN_PEER": "the sender holds no lease: see unknown sources",
    "SPOOFED_SOURCE": "the inner source is not the sending node's: loden capture drop SPOOFED_SOURCE",
    "SEND_FAILED": "the kernel refused datagrams: a firewall, or no way to the peer; loden explain ADDRESS",
    "TUN_WRITE": "the kernel refused packets at the device",
    "SUPERFRAME": "the kernel handed over what cannot be cut",
    "PATH_MTU": "longer than the path to the peer takes; its sender was told",
    "NO_VNI": "VXLAN datagrams without a VNI",
    "FOREIGN_VNI": "datagrams of another VXLAN network: two overlays share the port",
    "RESERVED_BITS": "datagrams of another protocol on VXLAN's port",
    "OWN_MAC": "frames with our own MAC as source: a loop",
    "OTHER_MAC": "frames for another MAC: a peer has an old VtepMAC of this node",
    "PEER_MAC": "frames whose MAC is not that of the sender's lease: it changed, and its lease did not",
    "VLAN": "frames with a VLAN tag",
    "ETHERTYPE": "frames that carry no IP of this device, such as ARP",
    "ECN": "congestion marks that the packets' ends do not understand",
    "InCsumErrors": "datagrams with a broken checksum came; at the sender: ethtool -K DEVICE tx off",
    "RcvbufErrors": "datagrams came faster than they were read; raise net.core.rmem_max",
    "SndbufErrors": "datagrams were given faster than the wire took them; raise net.core.wmem_max",
}


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "status",
        help="this node: lease, peers, rates, drops by reason",
        description="What this node's daemon knows.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="everything that the daemon tells")
    parser.add_argument("--watch", action="store_true", help="once a second, with rates, until Ctrl-C")
    asking.add_socket(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print. Raises LodenError."""
    from dataplane.debug import control

    path = asking.socket_path(arguments)
    document = control.request(path, "status")
    if arguments.watch:
        _watch(path, document, as_json=arguments.json)
    print(json.dumps(document, indent=2) if arguments.json else page(document))
    return 0 if document["ready"] else 1


def _watch(path: str, document: dict[str, Any], *, as_json: bool) -> None:
    from dataplane.debug import control

    clear = CLEAR if sys.stdout.isatty() else ""
    at = time.monotonic()
    while True:
        time.sleep(WATCH_SECONDS)
        later, now = control.request(path, "status"), time.monotonic()
        shown = json.dumps(later) if as_json else f"{clear}{page(later, document, now - at)}\n"
        print(shown, flush=True)
        document, at = later, now


def page(document: dict[str, Any], before: dict[str, Any] | None = None, seconds: float = 1.0) -> str:
    """What a person reads; with rates where an earlier document is given, `seconds` older."""
    lines = [*_node_lines(document), "", _peer_table(document, before, seconds)]
    if before is not None:
        lines += _pump_lines(document.get("pumps", {}), before.get("pumps", {}), seconds)
    lines += _trouble_lines(document, before, seconds)
    return "\n".join(lines)


def _node_lines(document: dict[str, Any]) -> list[str]:
    lease = document.get("lease")
    state = "ready" if document["ready"] else "not ready"
    rows = [
        ("daemon", f"{state}, pid {document['pid']}, Loden {document['version']}"),
        ("store", document["store"] or "none yet"),
        ("lease", _lease_text(lease) if lease else "none yet"),
        ("backend", _backend_text(document) if "backend" in document else "none yet"),
    ]
    if repairs := document.get("repairs"):
        rows.append(("repairs", f"{repairs}: what others took away or changed was put right"))
    if capabilities := document.get("capabilities"):
        on = [word for word, state in capabilities.items() if state == "on"]
        rows.append(("capabilities", ", ".join(on) or "none"))
        rows += [("", f"{word} {state}") for word, state in capabilities.items() if state != "on"]
    if (queues := document.get("queues")) and queues["asked"] > 1:
        rows.append(("queues", queues["reason"] or str(queues["used"])))
    if document.get("store_error"):
        rows.append(("trouble", f"the store cannot be reached: {document['store_error']}"))
    return [f"{name:<14}{text}" for name, text in rows]


def _lease_text(lease: dict[str, Any]) -> str:
    """Of a family that the node does not have, the subnet is null."""
    families = ((lease["subnet"], lease["public_ip"]), (lease["subnet_v6"], lease["public_ipv6"]))
    held = [f"{subnet} at {address or lease['public_ip']}" for subnet, address in families if subnet]
    notes = (", reserved" if lease["reserved"] else "", ", FENCED: another node holds it" if lease["fenced"] else "")
    return " and ".join(held) + "".join(notes)


def _backend_text(document: dict[str, Any]) -> str:
    if document["dataplane"] == "none":
        return f"{document['backend']}: a lease and a subnet file, and no packets"
    place = "the kernel" if document["dataplane"] == "kernel" else "userspace"
    devices = document["device"].split()
    through = f" through {' and '.join(devices)}" if devices else ""
    return f"{document['backend']} in {place}{through}, MTU {document['mtu']}"


def _peer_table(document: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> str:
    from dataplane.lab.measure import table

    peers = document.get("peers", [])
    if not peers:
        return "no peers"
    earlier = {peer["subnet"]: peer for peer in before.get("peers", [])} if before else {}
    if before is None:
        header = ("peer", "public IP", "heard", "TX packets", "TX bytes", "RX packets", "RX bytes")
    else:
        header = ("peer", "public IP", "heard", "TX packets/s", "TX Mbit/s", "RX packets/s", "RX Mbit/s")
    rows = []
    for peer in sorted(peers, key=lambda peer: -(peer["tx_bytes"] + peer["rx_bytes"])):
        counts = [peer[key] for key in ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes")]
        if before is not None:
            counts = _rates(peer, earlier.get(peer["subnet"], peer), seconds)
        place = f"{peer['public_ip']}{' direct' if peer['direct'] else ''}"
        ours = peer["counted"] and not peer["direct"]  # else they pass the kernel alone, which does not count by peer
        rows.append((peer["subnet"], place, *((_heard(peer["idle"]), *counts) if ours else ["-"] * 5)))
    return table(header, rows)


def _rates(peer: dict[str, Any], earlier: dict[str, Any], seconds: float) -> list[Any]:
    found: list[Any] = []
    for way in ("tx", "rx"):
        packets = (peer[f"{way}_packets"] - earlier[f"{way}_packets"]) / seconds
        bits = (peer[f"{way}_bytes"] - earlier[f"{way}_bytes"]) * 8 / seconds
        found += [round(max(packets, 0)), f"{max(bits, 0) / 1e6:.1f}"]
    return found


def _heard(idle: float | None) -> str:
    if idle is None:
        return "never"
    return "now" if idle < 2 else f"{idle:.0f} s ago" if idle < 120 else f"{idle / 60:.0f} min ago"


def _pump_lines(pumps: dict[str, Any], earlier: dict[str, Any], seconds: float) -> list[str]:
    """How many packets share one datagram run or message: what a userspace path lives by. Nothing of a direction in
    which nothing was carried meanwhile, or whose device was made anew."""
    lines = []
    for direction, unit in (("tx", "run"), ("rx", "message")):
        now, then = pumps.get(direction), earlier.get(direction)
        if now and then and now["packets"] > then["packets"]:
            packets, messages, wakeups = (now[name] - then[name] for name in ("packets", "messages", "wakeups"))
            rates = f"{packets / seconds:.0f} packets/s, {packets / max(messages, 1):.1f} a {unit}"
            lines.append(f"{direction.upper():<4}{rates}; {wakeups / seconds:.0f} wake-ups/s")
    return ["", *lines] if lines else []


def _trouble_lines(document: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> list[str]:
    """Whatever is not as it should be, each with what to do; nothing where all is well."""
    lines = []
    counts = _not_carried(document)
    earlier = counts if before is None else _not_carried(before)
    for name, count in counts.items():
        if count:
            rate = "" if before is None else f"{max(count - earlier.get(name, count), 0) / seconds:>10.0f}/s"
            lines.append(f"{name:<16}{count:>10}{rate}  {_HINTS.get(name, '')}".rstrip())
    if lines:
        lines.insert(0, "\nnot carried")
    for address, count in document.get("unknown_sources", {}).items():
        told = "no lease names it; if it is a node, its -public-ip is wrong"
        lines.append(f"\nunknown source {address}, {count} datagrams: {told}")
    for subnet, reason in document.get("ignored", {}).items():
        lines.append(f"\nlease {subnet} is not carried: {reason}")
    for key, reason in document.get("rejected", {}).items():
        lines.append(f"\nlease {key} is not obeyed: {reason}")
    return lines


def _not_carried(document: dict[str, Any]) -> dict[str, int]:
    return {**document.get("drops", {}), **document.get("udp_errors", {})}
