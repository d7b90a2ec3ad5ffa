"""Owns how pyroute2's messages and errors read as our records and ours.

Free of: sockets. Invariant: whatever pyroute2 raises about a request leaves `translated` as a KernelError that names
the operation, with the kernel's own reason.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from dataplane.errors import KernelError
from dataplane.kernel.facts import Address, Link, Route, Vxlan

AF_INET, AF_INET6 = 2, 10
IFF_UP = 0x1
IFA_F_SECONDARY = 0x01
IFA_F_DEPRECATED = 0x20
IFA_F_PERMANENT = 0x80


@contextlib.contextmanager
def translated(operation: str) -> Iterator[None]:
    """`operation` ends the sentence "cannot ..."."""
    try:
        yield
    except (NetlinkError, OSError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        reason = error.args[-1] if error.args else error
        if code == errno.EPERM:
            reason = f"{reason}; run as root or with CAP_NET_ADMIN"
        raise KernelError(f"cannot {operation}: {reason}") from error


def family_of(version: int) -> int:
    """The address family of IP version 4 or 6."""
    return AF_INET if version == 4 else AF_INET6


def link_of(message: Any) -> Link:
    """An RTM_NEWLINK."""
    info = message.get("linkinfo")
    kind = (info.get("kind") if info else None) or ""
    vxlan = _vxlan_of(info.get("data")) if kind == "vxlan" else None
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=kind,
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message.get("carrier")),
        address=message.get("address") or "",
        udp_port=vxlan.port if vxlan else 0,
        vxlan=vxlan,
    )


def _vxlan_of(data: Any) -> Vxlan | None:
    if not data:
        return None
    local = data.get("vxlan_local") or data.get("vxlan_local6")
    group = data.get("vxlan_group") or data.get("vxlan_group6")
    return Vxlan(
        vni=data.get("vxlan_id") or 0,
        lower=data.get("vxlan_link") or 0,
        local=ip_address(local) if local else None,
        port=data.get("vxlan_port") or 0,
        learning=bool(data.get("vxlan_learning")),
        # a flag: there, with no value, or not there
        gbp=any(name == "IFLA_VXLAN_GBP" for name, *_ in data["attrs"]),
        group=ip_address(group) if group else None,
    )


def address_of(message: Any) -> Address:
    """An RTM_NEWADDR."""
    # of a point-to-point link IFA_ADDRESS is the other end; IPv6 has IFA_LOCAL there only
    own = message.get("local") or message.get("address")
    flags = message.get("flags") or 0
    return Address(
        index=message["index"],
        interface=ip_interface(f"{own}/{message['prefixlen']}"),
        scope=message["scope"],
        permanent=bool(flags & IFA_F_PERMANENT),
        deprecated=bool(flags & IFA_F_DEPRECATED),
        secondary=bool(flags & IFA_F_SECONDARY),
    )


def route_of(message: Any) -> Route:
    """An RTM_NEWROUTE."""
    hops = message.get("multipath") or [message]
    gateway, source = hops[0].get("gateway"), message.get("prefsrc")
    nowhere = "0.0.0.0" if message["family"] == AF_INET else "::"
    destination: IPv4Network | IPv6Network = ip_network(f"{message.get('dst') or nowhere}/{message['dst_len']}")
    return Route(
        destination=destination,
        gateway=ip_address(gateway) if gateway else None,
        device_index=hops[0].get("oif") or 0,
        source=ip_address(source) if source else None,
        table=message.get("table") or 0,
        metric=message.get("priority") or 0,
        scope=message["scope"],
    )
