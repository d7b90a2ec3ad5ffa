"""Owns a userspace tunnel's device as the kernel has it: one TUN, its addresses, and the routes of networks into it.

Free of: packets, peers, and when to look at it; who calls lets one call end before the next. Invariant: what a kill has
left is taken over, what others take away or change is put right, and after `release` nothing of it stands.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence, Set
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

from dataplane.backend.peers import IPNetwork
from dataplane.kernel import rtnetlink, tun
from dataplane.kernel.facts import AddressEvent, KernelEvent, LinkEvent, Overrun, RouteEvent, holders
from dataplane.kernel.netlink import Netlink, quiet_ipv6, restrain_ipv6
from dataplane.path.capability import Capability

log = logging.getLogger(__name__)

TX_QUEUE_PACKETS = 3000
"""Packets that the TUN holds while the pump is not scheduled: 90 ms of 34,000 a second. The kernel's own 500 lose short
bursts; what waits may be superframes, so that this bounds memory too."""


class Device:
    """`open`, then `resize` and `put_right` as often as need be, `release`; and from the start again."""

    def __init__(
        self,
        template: str,
        networks: Sequence[IPNetwork],
        netlink: Netlink,
        *,
        adopt: str,
        on_device: Callable[[str], None],
    ) -> None:
        """`template`: its name, or one such as flannel%d; `networks`: what is routed into it. `adopt`, `on_device`: see
        Tunnel."""
        self._template = template
        self._networks = {network.version: network for network in networks}
        self._netlink = netlink
        self._on_device = on_device
        self._mtu = 0
        self.name = adopt
        """Also after `release`, for the next `open`; empty before there was one."""
        self.tun: tun.Tun | None = None
        self.routed: tuple[tuple[IPNetwork, IPv4Interface | IPv6Interface], ...] = ()
        """The networks that we have a subnet of, each with the device's address in it."""
        self.repairs = 0
        """How often it was found otherwise than it should be, and was made right."""

    async def open(self, subnets: Sequence[IPNetwork], mtu: int, wanted: Set[Capability], queues: int) -> tun.Tun:
        """Take it over or make it, for our subnets. Raises KernelError; then, too, `release` comes next."""
        self._mtu = mtu
        self.routed = tuple(
            (self._networks[subnet.version], ip_interface((subnet.network_address, subnet.max_prefixlen)))
            for subnet in subnets
        )
        await self._remove_leftovers()
        self.tun = tun.open_tun(self._template, adopt=self.name, wanted=wanted, queues=queues)
        self.name = self.tun.name
        self._on_device(self.name)
        (restrain_ipv6 if 6 in {network.version for network, _ in self.routed} else quiet_ipv6)(self.name)
        await self._furnish()
        self.tun = dataclasses.replace(self.tun, granted=tun.takes_superframes(self.tun))
        return self.tun

    async def resize(self, mtu: int) -> None:
        """Another MTU, in place. Raises KernelError."""
        self._mtu = mtu
        if self.tun is not None:
            await self._netlink.ensure_link_up(self.name, mtu=mtu)

    def is_touched_by(self, event: KernelEvent) -> bool:
        """Whether something of the device may be gone, so that `put_right` is to be called."""
        match event:
            case LinkEvent(name=name):
                return name == self.name
            case AddressEvent(gone=True, address=address):
                return any(address.interface == ours for _, ours in self.routed)
            case RouteEvent(gone=True, length=length, body=body):
                alike = [ours for ours, _ in self.routed if ours.prefixlen == length]
                return bool(alike) and rtnetlink.route_of(body).destination in alike
            case _:
                return isinstance(event, Overrun)

    async def put_right(self) -> None:
        """What others did to the device. One that is gone is for the path to tell. Raises KernelError."""
        if self.tun is None or await self._netlink.link(self.name) is None:
            return
        if await self._furnish():
            self.repairs += 1
            log.warning("Others had changed device %s, its addresses or routes: made right", self.name)

    def release(self) -> None:
        """Address and routes go with it. Safe to call twice."""
        if self.tun is not None:
            tun.release(self.tun)
            self.tun = None
            self._on_device("")

    async def _furnish(self) -> bool:
        """Addresses, MTU, queue and routes; True if something was otherwise. Raises KernelError."""
        changed = False
        for network, address in self.routed:
            changed |= await self._netlink.ensure_address(self.name, address, sole_within=network)
        changed |= await self._netlink.ensure_link_up(self.name, mtu=self._mtu, txqueuelen=TX_QUEUE_PACKETS)
        for network, _ in self.routed:
            changed |= await self._netlink.ensure_route(network, self.name)
        return changed

    async def _remove_leftovers(self) -> None:
        """A device of a killed daemon whose state is lost would keep the network's route for itself."""
        links = await self._netlink.links()
        ours = holders(await self._netlink.addresses(), self._networks.values())
        kept = {self.name, self._template}
        for name in sorted({link.name for link in links if link.index in ours} & {*tun.leftovers(links)} - kept):
            log.warning("Removing device %s: a killed daemon left it, and it holds an address of our network", name)
            await self._netlink.remove_link(name)
