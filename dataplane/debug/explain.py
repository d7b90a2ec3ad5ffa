"""Owns looking at the way from this node to an address: what `loden explain` shows, step by step, and the probes.

Free of judgement (dataplane.debug.verdict). Runs in a thread of its own: it waits for tools and for answers. Invariant:
it changes nothing, and a tool that is missing only leaves its step out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import IPv4Network, ip_address

from dataplane.debug.verdict import (
    SMALL,
    Account,
    Address,
    Node,
    Probes,
    has_device,
    judge,
    public_of,
    status_of,
    subnet_of,
)
from dataplane.kernel import probe, view
from dataplane.kernel.probe import Echo
from dataplane.kernel.view import Device, Way
from dataplane.lease.model import Lease
from dataplane.path.wire import UDP_OVERHEAD, VXLAN_OVERHEAD


def explain(address: Address, read: Callable[[], Node], *, probing: bool) -> Account:
    """Look at the whole way to an address, from a thread of its own. `read` gives the daemon's facts as of now."""
    account, node = Account(address), read()
    lease = _find_lease(account, node)
    if lease is not None:
        public = public_of(lease, address)
        # of a node's own address, what is asked is the way to its subnet
        address = address if any(address in each for each in lease.key.subnets) else subnet_of(lease, address)[0]
        _look_at_node(account, node)
        _look_at_way(account, node, lease, public)
        _look_at_device(account, node, address, public)
        _look_at_underlay(account, node, public)
        if node.status.type == "vxlan":
            _look_at_vxlan(account, node, lease, address)
        _look_at_rules(account, node, public)
        _look_at_counters(account, node, lease)
        if probing and node.own is not None:
            account.probes = _probe(account, node, read, lease, address, public)
    judge(account, node, lease)
    return account


# --- who holds it ---------------------------------------------------------------------------------------------


def _find_lease(account: Account, node: Node) -> Lease | None:
    """The peer's lease that covers the address; None where there is nothing beyond this node to look at."""
    address = account.address
    for key, lease in node.peers.items():
        if address in (lease.attrs.public_ip, lease.attrs.public_ipv6):
            account.say("address", f"{address} is the public IP of the node that leases {key}")
            return _told(account, node, lease)
        if any(address in subnet for subnet in lease.key.subnets):
            account.say("address", f"{address} belongs to subnet {subnet_of(lease, address)}")
            return _told(account, node, lease)
    if node.own is not None and any(address in subnet for subnet in node.own.key.subnets):
        account.say("address", f"{address} belongs to our own subnet {subnet_of(node.own, address)}")
        way = view.way_to(address)
        account.say("route", _way_text(way), _own_fault(way, node), f"ip route get {address}")
        return None
    if not any(address in network for network in node.networks):
        networks = " or ".join(map(str, node.networks))
        account.say(
            "address",
            f"{address} lies outside the overlay",
            f"{address} is not an address of the overlay {networks}: packets to it leave by the node's own routes",
            f"ip route get {address}",
        )
        return None
    account.say("address", f"{address} lies in the overlay {next(n for n in node.networks if address in n)}")
    account.say("lease", "no lease covers it", *_missing(account, node))
    return None


def _missing(account: Account, node: Node) -> tuple[str, str]:
    """Why no lease covers an address of the overlay."""
    address = account.address
    for key, reason in node.rejected.items():
        network, _, length = key.partition("&")[0].rpartition("-")
        try:
            if address in IPv4Network(f"{network}/{length}"):
                return f"the lease {key} that covers {address} is not obeyed: {reason}", _listing(node)
        except ValueError:
            continue
    trouble = f"; the store cannot be reached ({node.store_error}), so it may be new" if node.store_error else ""
    return (
        f"no lease covers {address}: no node has leased that subnet, or its lease has expired{trouble}",
        _listing(node),
    )


def _listing(node: Node) -> str:
    if not node.store.startswith("etcd"):
        return "loden status   # lists all leases that this node knows"
    return "ETCDCTL_API=3 etcdctl get --prefix --keys-only /coreos.com/network/subnets/"


def _told(account: Account, node: Node, lease: Lease) -> Lease | None:
    """Say who holds a lease; None where our backend does not carry it."""
    kind = lease.attrs.backend_type or "udp"
    text = f"{lease.key} is held by {public_of(lease, account.address)}, backend {kind}"
    for subnet in lease.key.subnets:
        if reason := node.status.ignored.get(subnet):
            carried = any(peer.subnet == subnet for peer in node.status.peers)
            fault = f"lease {lease.key} is not obeyed as it is" if carried else f"packets for {subnet} are not carried"
            account.say("lease", text, f"{fault}: {reason}", "loden status")
            return None
    account.say("lease", text)
    return lease


def _own_fault(way: Way, node: Node) -> str | None:
    if way.error:
        return f"this node has no way to its own pod: {way.error}; is the pod's bridge there?"
    if way.device in node.status.device.split():
        return f"the route to our own subnet leads into {way.device}: the pods' bridge has lost its address"
    return None


# --- what lies on the way -------------------------------------------------------------------------------------


def _look_at_node(account: Account, node: Node) -> None:
    if node.own is None:
        account.say("own lease", "none yet", "this node has no lease of its own yet", "loden status")
        return
    text = f"{node.own.key} at {public_of(node.own, account.address)}"
    if node.fenced:
        fault = f"another node has taken our lease {node.own.key}: answers to our pods go there"
        account.say("own lease", text, fault, _listing(node))
    else:
        account.say("own lease", text)


def _look_at_way(account: Account, node: Node, lease: Lease, public: Address) -> None:
    """Who carries the packets, and in what."""
    peer, status = status_of(node, lease, account.address), node.status
    account.direct = not has_device(node) or (peer is not None and peer.direct)
    if account.direct:
        account.say("way", "direct: as they are, by the underlay's own routes")
    else:
        who = "kernel: the kernel" if status.dataplane == "kernel" else "encap: this daemon"
        account.say("way", f"{who} sends them inside {status.type} to {public} port {node.port}")


def _look_at_device(account: Account, node: Node, address: Address, public: Address) -> None:
    name, mtu = device_of(node, address), _most(node, address)
    if not account.direct:
        device = view.device(name)
        account.say("device", _device_text(name, device), *_device_fault(device, name, mtu))
    way = view.way_to(address)
    fault = command = None
    if way.error:
        fault, command = f"there is no route to {address}: {way.error}", _route_command(address)
    elif account.direct and node.status.type != "alloc" and way.gateway != str(public):
        fault = f"the route to {address} leads {_hop_text(way)}, not to the node {public}"
        command = _route_command(address)
    elif not account.direct and way.device != name:
        fault = f"the route to {address} leads to {way.device}, not into {name}"
        command = _route_command(address)
    account.say("route", _way_text(way), fault, command or "")


def device_of(node: Node, address: Address) -> str:
    """Of VXLAN with both IP versions, each has a device of its own; empty where there is none."""
    names = node.status.device.split()
    return next((name for name in names if ("-v6" in name) is (address.version == 6)), names[0] if names else "")


def _most(node: Node, address: Address) -> int:
    """The MTU that fits the overlay of an address; where VXLAN carries both IP versions the status has the least."""
    both = node.status.type == "vxlan" and len({network.version for network in node.networks}) == 2
    return node.status.mtu + (VXLAN_OVERHEAD[6] - VXLAN_OVERHEAD[4] if both and address.version == 4 else 0)


def _device_text(name: str, device: Device | None) -> str:
    if device is None:
        return f"{name} does not exist" if name else "none now"
    return f"{name}, MTU {device.mtu}, {'up' if device.up else 'down'}"


def _device_fault(device: Device | None, name: str, mtu: int) -> tuple[str | None, str]:
    if device is None:
        return f"device {name or 'of the overlay'} is gone", "journalctl -u flanneld   # the daemon makes it again"
    if not device.up:
        return f"device {name} is down", f"ip link set {name} up"
    if device.mtu > mtu:
        return f"device {name} has MTU {device.mtu}, more than the {mtu} that fit", f"ip link set {name} mtu {mtu}"
    return None, ""


def _route_command(address: Address) -> str:
    """The daemon puts its own routes back at once: what is wrong then stands before them."""
    return f"ip route get {address}; ip rule   # remove what stands before the daemon's own route"


def _look_at_underlay(account: Account, node: Node, public: Address) -> None:
    way = view.way_to(public)
    if way.error:
        account.say(
            "underlay",
            f"no way to {public}",
            f"this node has no route to the peer's public IP {public}: {way.error}",
            f"ip route get {public}",
        )
        return
    device = view.device(way.device)
    account.say("underlay", f"{public}: {_way_text(way)}", *_underlay_fault(node, way, device, public))
    own = node.facing.address if public.version == 4 else node.facing.address_v6
    if own is not None and int(own) and str(own) not in view.own_addresses():
        fault = f"our address {own}, which the socket uses, is no longer an address of this node"
        account.say("own address", "gone", fault, "systemctl restart flanneld")
    next_hop = ip_address(way.gateway) if way.gateway else public
    entry = view.neighbour(next_hop, way.device)
    text = "not asked for yet" if entry is None else f"{entry[0] or 'no MAC'} {entry[1]}"
    account.say("neighbour", f"{next_hop} on {way.device}: {text}")


def _underlay_fault(node: Node, way: Way, device: Device | None, public: Address) -> tuple[str | None, str]:
    frames = VXLAN_OVERHEAD[public.version]
    overhead, mtu = {"udp": UDP_OVERHEAD, "vxlan": frames}.get(node.status.type, 0), _most(node, public)
    if device is None:
        return f"device {way.device} is gone", "ip link"
    if not device.up or not device.carrier:
        state = "without carrier" if device.up else "down"
        return f"underlay device {way.device} is {state}", f"ip link set {way.device} up"
    if device.mtu < mtu + overhead:
        text = f"{mtu} bytes and {overhead} of header do not fit {way.device}'s {device.mtu}"
        wanted = mtu + overhead
        return f"MTU too large: {text}", f"ip link set {way.device} mtu {wanted}   # or restart flanneld to follow it"
    return None, ""


def _look_at_vxlan(account: Account, node: Node, lease: Lease, address: Address) -> None:
    """Neighbour and FDB entry of a kernel VTEP, beside what the lease says."""
    data = lease.attrs.backend_data if address.version == 4 else lease.attrs.backend_v6_data
    try:
        mac = str(json.loads(data or b"{}").get("VtepMAC", "")).lower()
    except (ValueError, AttributeError):
        mac = ""
    device, public = device_of(node, address), public_of(lease, address)
    gateway = subnet_of(lease, address).network_address
    entry = view.neighbour(gateway, device)
    if entry is None and view.forwarding(device, mac) is None:
        return  # our own path keeps neither in the kernel
    known = entry[0].lower() if entry else ""
    fault = None if known == mac else f"neighbour {gateway} has MAC {known or 'none'}, its lease says {mac}"
    fix = f"ip neigh replace {gateway} lladdr {mac} dev {device} nud permanent"
    account.say("neighbour", f"{gateway} on {device}: {known or 'no entry'}", fault, fix if fault else "")
    where = view.forwarding(device, mac)
    fault = None if where == str(public) else f"the FDB of {device} sends {mac} to {where or 'nobody'}, not to {public}"
    fix = f"bridge fdb replace {mac} dev {device} dst {public} self permanent"
    account.say("FDB", f"{mac} on {device}: {where or 'no entry'}", fault, fix if fault else "")


def _look_at_rules(account: Account, node: Node, public: Address) -> None:
    if view.forwards(public.version) is False:
        fault = "this node forwards no packets between pods and overlay"
        place = "ipv4.ip_forward" if public.version == 4 else "ipv6.conf.all.forwarding"
        account.say("forwarding", "off", fault, f"sysctl -w net.{place}=1")
    account.rules = view.blocking_rules(node.port, public)
    if account.rules:
        account.say("rules", "; ".join(account.rules))


def _look_at_counters(account: Account, node: Node, lease: Lease) -> None:
    peer = status_of(node, lease, account.address)
    if peer is None:
        return
    heard = "never heard" if peer.idle is None else f"heard {peer.idle:.0f} s ago"
    text = f"TX {peer.tx_packets} packets, RX {peer.rx_packets} packets, {heard}"
    if not peer.counted or account.direct:
        text = "none: they pass the kernel alone, which does not count by peer"
    account.say("counters", text)


# --- probes ---------------------------------------------------------------------------------------------------


def _probe(
    account: Account, node: Node, read: Callable[[], Node], lease: Lease, address: Address, public: Address
) -> Probes:
    own, there = _inner_ends(node, lease, address)
    before, errors = read(), view.udp_errors()
    small, large, outer = probe.echo([Echo(there, SMALL, own), Echo(there, node.status.mtu, own), Echo(public, SMALL)])
    poke = "not sent" if small.received or account.direct else probe.poke(public, node.port)
    after, risen = read(), view.udp_errors()
    one, two = (status_of(state, lease, address) for state in (before, after))
    return Probes(
        small,
        large,
        outer,
        poke,
        heard=two.rx_packets - one.rx_packets if one and two else 0,
        drops={reason: n for reason, count in after.status.drops.items() if (n := count - before.status.drops[reason])},
        strangers={
            a: n for a, c in after.status.unknown_sources.items() if (n := c - before.status.unknown_sources.get(a, 0))
        },
        udp_errors={name: n for name, count in risen.items() if (n := count - errors.get(name, 0))},
    )


def _inner_ends(node: Node, lease: Lease, address: Address) -> tuple[Address | None, Address]:
    """Addresses of both nodes inside the overlay, ours None where the kernel shall choose: the .0 of each subnet is on
    the overlay's device. Without a device it is the .1 of the pods' bridge, which stands once there was a pod."""
    there, own = subnet_of(lease, address), subnet_of(node.own, address) if node.own else None
    if has_device(node):
        return own.network_address if own else None, there.network_address
    bridge = own[1] if own and str(own[1]) in view.own_addresses() else None
    return bridge, there[1]


def _hop_text(way: Way) -> str:
    return f"to {way.gateway} on {way.device}" if way.gateway else f"into {way.device}"


def _way_text(way: Way) -> str:
    if way.error:
        return way.error
    return f"dev {way.device}{f' via {way.gateway}' if way.gateway else ''}{f' src {way.source}' if way.source else ''}"
