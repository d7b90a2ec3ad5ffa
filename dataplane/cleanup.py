"""Owns what `flanneld --cleanup` takes away: everything that a former daemon left on this node.

Free of: what a daemon that runs does. Invariant: nothing that is not provably ours is touched, and a daemon that runs
at this place is not disturbed (its lock refuses us).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane.errors import KernelError
from dataplane.kernel import firewall, subnetfile
from dataplane.kernel.facts import holders
from dataplane.options import Options

if TYPE_CHECKING:
    from dataplane.kernel.netlink import Netlink

log = logging.getLogger(__name__)

_VXLAN_NAME = re.compile(r"flannel(-v6)?\.\d+")


async def cleanup(options: Options) -> None:
    """Remove the firewall rules, the blackhole routes, the devices (addresses, routes and entries go with them), the
    routes to other nodes' subnets and the state of a former daemon. Raises KernelError for what could not be removed,
    once everything else is."""
    from dataplane.kernel.netlink import Netlink

    places = subnetfile.places(options.subnet_file, options.control_socket)
    with subnetfile.DaemonLock(places.lock):
        troubles = await _remove_rules()
        carried = subnetfile.read_networks(places.subnet_file)
        netlink = await Netlink.open()
        try:
            for _, subnet in carried:
                if await netlink.remove_blackhole(subnet):
                    log.info("Removed the blackhole route of %s", subnet)
            await _remove_devices(netlink, subnetfile.read_state(places.state).device.split())
            await _remove_vxlan(netlink, [network for network, _ in carried])
            for network, subnet in carried:
                await _remove_routes(network, subnet.prefixlen)
        finally:
            await netlink.close()
        for place in (places.state, places.control_socket):
            Path(place).unlink(missing_ok=True)
    if troubles:
        raise KernelError("; ".join(troubles))
    log.info("Nothing that a former daemon left remains")


async def _remove_rules() -> list[str]:
    """Both engines, both families. Returns what could not be removed: a kernel without IPv6 shall not hide the rest."""
    troubles = []
    for version in firewall.families():
        for nftables in (False, True):
            word = f"IPv{version} rules from {'nftables' if nftables else 'iptables'}"
            try:
                if await firewall.remove(version, nftables=nftables):
                    log.info("Removed the %s", word)
            except KernelError as error:
                troubles.append(str(error))
    return troubles


async def _remove_devices(netlink: Netlink, devices: Sequence[str]) -> None:
    from dataplane.kernel import tun

    for device in set(devices) & set(tun.leftovers(await netlink.links())):
        await netlink.remove_link(device)
        log.info("Removed device %s", device)


async def _remove_vxlan(netlink: Netlink, networks: Sequence[IPv4Network | IPv6Network]) -> None:
    """The kernel's devices, with their entries: named as flannel names them, and with an address of this network."""
    ours = holders(await netlink.addresses(), networks)
    for link in await netlink.links():
        if link.vxlan is not None and link.index in ours and _VXLAN_NAME.fullmatch(link.name):
            await netlink.remove_link(link.name)
            log.info("Removed device %s", link.name)


async def _remove_routes(network: IPv4Network | IPv6Network, length: int) -> None:
    """Those of host-gw and DirectRouting: through a gateway, to a whole subnet of this network."""
    from dataplane.kernel import rtnetlink
    from dataplane.kernel.tables import Tables

    tables = await Tables.open()
    try:
        listing = await tables.listing(rtnetlink.routes_of(network.version, 0), {})
        shown = [entry for body in listing.others if (entry := rtnetlink.entry_of(rtnetlink.Table.ROUTE, body))]
        within = int(network.network_address), int(network.broadcast_address)
        ours = [
            entry
            for entry in shown
            if (destination := rtnetlink.destination_of(entry)).prefixlen == length
            and within[0] <= int(destination.network_address) <= within[1]
        ]
        if ours:
            await tables.delete(ours)
            log.info("Removed %d routes to subnets of %s", len(ours), network)
    finally:
        await tables.close()
