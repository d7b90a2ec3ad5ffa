"""Owns the page that Prometheus reads: the status document as metrics, in the text format 0.0.4.

Free of IO and of counting: the counters are the path's own, looked at when somebody asks, and begin anew with the
device. Invariant: a name stands once with its HELP and TYPE, and labels are escaped whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Sample = tuple[str, float]
"""Labels as they are written (a peer has the same ones in many metrics), and the value."""

_PEER = (
    ("tx_packets", "loden_peer_tx_packets_total", "Inner packets sent to a peer."),
    ("tx_bytes", "loden_peer_tx_bytes_total", "Bytes of inner packets sent to a peer."),
    ("rx_packets", "loden_peer_rx_packets_total", "Inner packets received from a peer."),
    ("rx_bytes", "loden_peer_rx_bytes_total", "Bytes of inner packets received from a peer."),
)

_PUMP = (
    ("packets", "loden_pump_packets_total", "Inner packets carried."),
    ("superframes", "loden_pump_superframes_total", "Superframes taken from the device, or written to it."),
    ("messages", "loden_pump_messages_total", "Runs of datagrams sent, or messages received."),
    ("calls", "loden_pump_calls_total", "System calls that sent or received them."),
    ("wakeups", "loden_pump_wakeups_total", "How often a pump was woken."),
    ("wrong_checksums", "loden_pump_wrong_checksums_total", "Packets delivered with a wrong inner checksum."),
    ("icmp_errors", "loden_pump_icmp_errors_total", "ICMP errors told to pods."),
)


def page(document: Mapping[str, Any]) -> str:
    """All metrics of a status document; those of parts that there are not yet are left out."""
    lines = [
        *_metric("loden_info", "gauge", "1, with the daemon's version and backend.", [_info(document)]),
        *_metric("loden_ready", "gauge", "1 if /readyz says ready.", [("", document["ready"])]),
        *_store(document),
        *_lease(document),
        *_peers(document.get("peers", ())),
        *_counts("loden_drops_total", "Packets that were not carried, by reason.", "reason", document.get("drops")),
        *_counts(
            "loden_unknown_source_datagrams_total",
            "Datagrams from outer sources that hold no lease.",
            "source",
            document.get("unknown_sources"),
        ),
        *_counts(
            "loden_udp_errors_total",
            "Datagrams that the kernel did not deliver, in this network namespace, by its own names.",
            "error",
            document.get("udp_errors"),
        ),
        *_capabilities(document),
        *_pumps(document.get("pumps", {})),
    ]
    if "mtu" in document:
        lines += _metric("loden_mtu_bytes", "gauge", "What a pod may send in one packet.", [("", document["mtu"])])
    return "\n".join(lines) + "\n"


def _info(document: Mapping[str, Any]) -> Sample:
    labels = {"version": document["version"], "backend": document.get("backend", ""), "store": document["store"]}
    return _labels(labels), 1


def _store(document: Mapping[str, Any]) -> list[str]:
    if "store_error" not in document:
        return []
    reached = document["store_error"] in (None, "")
    return _metric("loden_store_reached", "gauge", "1 if the lease store answered last time.", [("", reached)])


def _lease(document: Mapping[str, Any]) -> list[str]:
    lease = document.get("lease")
    lines = _metric("loden_lease_held", "gauge", "1 if this node has a lease that is its own.", [("", _held(lease))])
    if lease:
        labels = {"subnet": lease["subnet"], "public_ip": lease["public_ip"]}
        lines += _metric("loden_lease_info", "gauge", "1, with our lease.", [(_labels(labels), 1)])
    for name, text in (("rejected", "not obeyed"), ("ignored", "not carried by this backend")):
        if name in document:
            count = len(document[name])
            lines += _metric(f"loden_leases_{name}", "gauge", f"Leases of others that are {text}.", [("", count)])
    return lines


def _held(lease: Mapping[str, Any] | None) -> bool:
    return bool(lease) and not (lease or {})["fenced"]


def _peers(peers: Iterable[Mapping[str, Any]]) -> list[str]:
    labelled = [(_labels({key: peer[key] for key in ("subnet", "public_ip")}), peer) for peer in peers]
    lines = _metric("loden_peers", "gauge", "Nodes whose leases are carried.", [("", len(labelled))])
    for key, name, text in _PEER:
        lines += _metric(name, "counter", text, [(labels, peer[key]) for labels, peer in labelled])
    heard = [(labels, peer["idle"]) for labels, peer in labelled if peer["idle"] is not None]
    return lines + _metric("loden_peer_idle_seconds", "gauge", "Since a peer was heard last; absent: never.", heard)


def _counts(name: str, text: str, label: str, counts: Mapping[str, int] | None) -> list[str]:
    return _metric(name, "counter", text, [(_labels({label: key}), count) for key, count in (counts or {}).items()])


def _capabilities(document: Mapping[str, Any]) -> list[str]:
    states = document.get("capabilities", {})
    samples = [(_labels({"capability": word}), state == "on") for word, state in states.items()]
    return _metric("loden_capability", "gauge", "1 if what the kernel may do for the path is on.", samples)


def _pumps(pumps: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = []
    for key, name, text in _PUMP:
        found = [(direction, counts[key]) for direction, counts in pumps.items() if key in counts]
        lines += _metric(name, "counter", text, [(_labels({"direction": way}), count) for way, count in found])
    return lines


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"{name}{labels} {_number(value)}" for labels, value in samples]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"
