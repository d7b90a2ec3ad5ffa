"""Owns the scapy layers of what our nodes send: udp mode's datagrams hold a bare IP packet of either version.

Needs `pip install loden[debug]`; the daemon never imports this. VXLAN on 8472 scapy knows by itself. Invariant: after
`register`, `IP(outer_bytes)` shows the inner packet as the payload of UDP, and `IP()/UDP()/IP()` builds one.
"""

from __future__ import annotations

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv46
from scapy.packet import bind_bottom_up, bind_top_down, split_bottom_up, split_top_down

from dataplane.path.wire import UDP_PORT


def register(port: int = UDP_PORT) -> None:
    """Let scapy know udp mode on this port, for reading and for building."""
    bind_bottom_up(UDP, IPv46, dport=port)
    bind_bottom_up(UDP, IPv46, sport=port)
    for inner in (IP, IPv6):
        bind_top_down(UDP, inner, sport=port, dport=port)


def unregister(port: int = UDP_PORT) -> None:
    """Let scapy forget it."""
    split_bottom_up(UDP, IPv46, dport=port)
    split_bottom_up(UDP, IPv46, sport=port)
    for inner in (IP, IPv6):
        split_top_down(UDP, inner, sport=port, dport=port)
