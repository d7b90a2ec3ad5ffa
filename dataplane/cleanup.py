"""Owns what `flanneld --cleanup` takes away: everything that a former daemon left on this node.

Free of: what a daemon that runs does. Invariant: nothing that is not provably ours is touched, and a daemon that runs
at this place is not disturbed (its lock refuses us).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataplane.errors import KernelError
from dataplane.kernel import firewall, subnetfile
from dataplane.options import Options

if TYPE_CHECKING:
    from dataplane.kernel.netlink import Netlink

log = logging.getLogger(__name__)


async def cleanup(options: Options) -> None:
    """Remove the firewall rules, the blackhole routes, the device (address and route go with it) and the state of a
    former daemon. Raises KernelError for what could not be removed, once everything else is."""
    from dataplane.kernel.netlink import Netlink

    places = subnetfile.places(options.subnet_file, options.control_socket)
    with subnetfile.DaemonLock(places.lock):
        troubles = await _remove_rules()
        netlink = await Netlink.open()
        try:
            for _, subnet in subnetfile.read_networks(places.subnet_file):
                if await netlink.remove_blackhole(subnet):
                    log.info("Removed the blackhole route of %s", subnet)
            await _remove_devices(netlink, subnetfile.read_state(places.state).device.split())
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
