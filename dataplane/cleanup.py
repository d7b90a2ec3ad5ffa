"""Owns what `flanneld --cleanup` takes away: everything that a former daemon left on this node.

Free of: what a daemon that runs does. Invariant: nothing that is not provably ours is touched, and a daemon that runs
at this place is not disturbed (its lock refuses us).
"""

from __future__ import annotations

import logging
from pathlib import Path

from dataplane.kernel import firewall, subnetfile
from dataplane.options import Options

log = logging.getLogger(__name__)


async def cleanup(options: Options) -> None:
    """Remove the firewall rules, the device (address and route go with it) and the state of a former daemon."""
    from dataplane.kernel import tun
    from dataplane.kernel.netlink import Netlink

    places = subnetfile.places(options.subnet_file, options.control_socket)
    with subnetfile.DaemonLock(places.lock):
        if await firewall.remove_forward():
            log.info("Removed the forward rules")
        device = subnetfile.read_state(places.state).device
        netlink = await Netlink.open()
        try:
            if device in tun.leftovers(await netlink.links()):
                await netlink.remove_link(device)
                log.info("Removed device %s", device)
        finally:
            await netlink.close()
        for place in (places.state, places.control_socket):
            Path(place).unlink(missing_ok=True)
    log.info("Nothing that a former daemon left remains")
