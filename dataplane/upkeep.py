"""Owns what is kept on this node beside the overlay itself: the firewall rules, and the blackhole route.

Free of: how either is set (kernel.firewall, kernel.netlink). Invariant: whatever others take away comes back within one
period of -iptables-resync, and a trouble is told once, not once a period.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Protocol

from dataplane.errors import KernelError
from dataplane.kernel import firewall
from dataplane.kernel.rules import Rules
from dataplane.lease.model import LeaseKey
from dataplane.lease.retry import LogGate
from dataplane.netconf import NetworkConfig
from dataplane.options import Options

log = logging.getLogger(__name__)

BRIDGE_SETTINGS = Path("/proc/sys/net/bridge")


class Blackholes(Protocol):
    """Who can set a blackhole route: kernel.netlink."""

    async def ensure_blackhole(self, destination: IPv4Network | IPv6Network) -> bool: ...


class Upkeep:
    """`start` once, then `run` until it is cancelled."""

    def __init__(
        self,
        options: Options,
        network: NetworkConfig,
        key: LeaseKey,
        former: Sequence[tuple[IPv4Network, IPv4Network] | tuple[IPv6Network, IPv6Network]],
        netlink: Blackholes,
    ) -> None:
        """`key`: our subnets. `former`: (network, subnet) of earlier daemons at this place, whose rules go."""
        self._period = float(options.iptables_resync)
        self._needs_masquerade = options.ip_masq
        self._wants_rules = options.ip_masq or options.iptables_forward_rules
        self._blackhole = options.ip_blackhole_route
        self._nftables = network.enable_nftables
        self._rules = [
            Rules(
                everybody, subnet, options.ip_masq, options.iptables_forward_rules,
                fully_random=not options.ip_masq_fully_random_disable,
            )
            for everybody, subnet in ((network.network, key.subnet), (network.ipv6_network, key.subnet_v6))
            if everybody is not None and subnet is not None
        ]  # fmt: skip
        self._former = [Rules(everybody, subnet, masquerade=True, forward=True) for everybody, subnet in former]
        self._netlink = netlink
        self._gate = LogGate()
        self._counted: bool | None = None
        self._generation: int | None = None

    async def start(self) -> None:
        """Set everything. Raises KernelError where masquerading was asked for and cannot be had, as flannel does."""
        if not self._nftables:
            self._check_bridge()
        try:
            await self._set_rules()
        except KernelError as error:
            if self._needs_masquerade:
                raise
            if self._wants_rules or not isinstance(error, firewall.ToolMissingError):
                log.error("Failed to install forward rules: %s", error)
        await self._remove_unused()
        if self._blackhole:
            await self._guarded(self._set_blackholes)

    async def run(self) -> None:
        """Look every period whether all of it still stands."""
        while True:
            await asyncio.sleep(self._period)
            if self._wants_rules:
                await self._guarded(self._look)
            if self._blackhole:
                await self._guarded(self._set_blackholes)

    async def _set_rules(self) -> bool:
        if self._counted is None:
            # iptables' legacy back end has tables that this count does not see
            self._counted = self._nftables or await firewall.counts_iptables()
        generation, changed = firewall.generation(), False
        for rules in self._rules:
            former = [each for each in self._former if each.version == rules.version]
            changed |= await firewall.ensure(rules, former, nftables=self._nftables)
        # as of before the look: what somebody changes during it is seen by the next one
        self._generation = generation
        return changed

    async def _look(self) -> None:
        if self._counted and self._generation is not None and self._generation == firewall.generation():
            return
        if await self._set_rules():
            word = "nftables" if self._nftables else "iptables"
            log.warning("Some %s rules are missing; deleting and recreating rules", word)

    async def _remove_unused(self) -> None:
        """What the other engine, or a family that is off now, may hold of an earlier daemon. Never ends a start."""
        log.info("Cleaning-up unused traffic manager rules")
        ours = {rules.version for rules in self._rules}
        for version in firewall.families():
            for nftables in (False, True):
                if version in ours and nftables == self._nftables:
                    continue
                try:
                    if await firewall.remove(version, nftables=nftables):
                        word = "nftables" if nftables else "iptables"
                        log.info("Removed the IPv%d rules that an earlier daemon left in %s", version, word)
                except KernelError as error:
                    log.debug("Cannot look for unused rules: %s", error)

    async def _set_blackholes(self) -> None:
        for rules in self._rules:
            if await self._netlink.ensure_blackhole(rules.subnet):
                log.info("Set the blackhole route of %s", rules.subnet)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except KernelError as error:
            if self._gate.passes(str(error), time.monotonic()):
                log.error("Failed to keep rules and routes as they should be: %s", error)

    def _check_bridge(self) -> None:
        """Flannel ends here for every backend; only pods on one bridge whose traffic shall meet iptables need it."""
        names = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}
        for setting in (BRIDGE_SETTINGS / names[rules.version] for rules in self._rules):
            if not setting.exists():
                log.warning(
                    "Failed to check br_netfilter: %s does not exist. Packets between pods of one bridge pass by "
                    "iptables; where Services or policies need them there: modprobe br_netfilter",
                    setting,
                )
