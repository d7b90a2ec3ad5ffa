"""Owns that this node's own changes are followed: another interface, address, public IP or MTU faces the underlay.

Free of: how packets move (the backend) and how a lease is changed (the keeper). Invariant: one move at a time, only to
what two looks have agreed on, and rarer while they go back and forth; a node that has no way out for a moment keeps
what it had.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from random import Random
from typing import TYPE_CHECKING, Protocol

from dataplane.backend.base import Underlay
from dataplane.errors import ConfigError, KernelError, LodenError
from dataplane.kernel import connections, events, iface
from dataplane.kernel.facts import KernelEvent, LinkEvent, NeighbourEvent, Route, RouteEvent
from dataplane.lease.model import LeaseAttrs
from dataplane.lease.retry import Backoff, LogGate
from dataplane.netconf import NetworkConfig
from dataplane.options import Options

if TYPE_CHECKING:
    from dataplane.kernel.netlink import Netlink

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
"""Quiet that is waited for after an event: a change of address comes as a dozen of them."""

MOST_SETTLE_SECONDS = 2.0
"""A node on which something changes all the time is looked at this often."""

CONFIRM_SECONDS = 0.5
"""Between the two looks that must agree. DHCP clients take an address away and put it back within this time."""

FIRST_PAUSE_SECONDS = 0.1
"""After a move; twice as long after each further one. A node that moves is cut off until it is followed, so the first
few cost it next to nothing."""

CALM_SECONDS = 120.0
"""So long after a move the next one is a trouble of its own, and not the last one's other half."""


class Surveyor:
    """Looks at the node and says what faces the underlay, by the flags."""

    def __init__(self, options: Options, network: NetworkConfig, netlink: Netlink) -> None:
        self._netlink = netlink
        self._wanted = iface.Wanted(
            names=options.iface,
            patterns=options.iface_regex,
            can_reach=ip_address(options.iface_can_reach) if options.iface_can_reach else None,
            public_ip=IPv4Address(options.public_ip) if options.public_ip else None,
            public_ipv6=IPv6Address(options.public_ipv6) if options.public_ipv6 else None,
            v4=network.enable_ipv4,
            v6=network.enable_ipv6,
        )

    async def first(self) -> Underlay:
        """The choice at start, told in flannel's words. Raises ConfigError where nothing fits."""
        return iface.choose(self._wanted, await self._around())

    async def again(self, current: Underlay) -> Underlay:
        """The choice now. Raises ConfigError where nothing fits."""
        around = await self._around()
        return iface.stay(current, iface.choose(self._wanted, around, level=logging.DEBUG), around)

    async def has(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether the node has that address."""
        return any(each.interface.ip == address for each in await self._netlink.addresses())

    @property
    def minds_routes(self) -> bool:
        """Whether a route that is no default route can change the choice."""
        return self._wanted.can_reach is not None

    async def _around(self) -> iface.Surroundings:
        # listing routes takes long where there are ten thousand: only where they count
        by_route = not self._wanted.has_flags
        return iface.Surroundings(
            links=await self._netlink.links(),
            addresses=await self._netlink.addresses(),
            default_routes=await self._netlink.default_routes(4) if by_route and self._wanted.v4 else (),
            default_routes_v6=await self._netlink.default_routes(6) if by_route and self._wanted.v6 else (),
            reach=await self._reach(),
        )

    async def _reach(self) -> Route | None:
        if self._wanted.can_reach is None:
            return None
        try:
            return await self._netlink.route_to(self._wanted.can_reach)
        except KernelError:
            return None  # no way to it now: the choice says so


class Looker(Protocol):
    """Surveyor, as far as it is needed to follow."""

    @property
    def minds_routes(self) -> bool: ...

    async def again(self, current: Underlay) -> Underlay: ...

    async def has(self, address: IPv4Address | IPv6Address) -> bool: ...


class Listener(Protocol):
    """What hears the kernel's news until it is closed."""

    def close(self) -> None: ...


class Mover(Protocol):
    """Who has to follow; see `backend.base.Backend.move` and `LeaseKeeper.change_attrs`."""

    async def move(self, facing: Underlay) -> LeaseAttrs: ...


class Following:
    """`write_file` once, then `run` until it is cancelled.

    `publish` is given what the lease shall say now; `rewrite` renews subnet.env, and raises KernelError.
    """

    def __init__(
        self,
        surveyor: Looker,
        facing: Underlay,
        backend: Mover,
        *,
        publish: Callable[[LeaseAttrs], Awaitable[None]],
        rewrite: Callable[[], None],
        rng: Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        listen: Callable[[Callable[[KernelEvent], None]], Listener] | None = None,
    ) -> None:
        self._sleep = sleep
        self._listen = listen or partial(events.KernelEvents.open, events.UNDERLAY)
        self._surveyor = surveyor
        self._facing = facing
        self._backend = backend
        self._publish = publish
        self._rewrite = rewrite
        self._news = asyncio.Event()
        self._pause = Backoff(FIRST_PAUSE_SECONDS, 60.0, rng)
        self._moved_at = float("-inf")
        self._retry = Backoff(1.0, 30.0, rng)
        self._gate = LogGate()
        self.moves = 0
        """How often this node has moved since the start."""
        self.file_stands = False
        """Whether subnet.env says what is so."""

    @property
    def facing(self) -> Underlay:
        """What faces the underlay now."""
        return self._facing

    async def run(self) -> None:
        listener = self._listen(self._on_event)
        try:
            # what changed between the choice and this listener made no event for us
            self._news.set()
            while True:
                await self._settled()
                if await self._step():
                    await self._rest()
        finally:
            listener.close()

    def _on_event(self, event: KernelEvent) -> None:
        """Look for anything that may change the choice, but not for each pod's device and each peer's route."""
        match event:
            case LinkEvent(index=index, name=name):
                concerns = index == self._facing.index or name == self._facing.name
            case RouteEvent(length=length):
                # as with `can_reach`, whose way may be any route; of a host's own routes there are few
                concerns = length == 0 or self._surveyor.minds_routes
            case NeighbourEvent():
                concerns = False
            case _:
                concerns = True
        if concerns:
            self._news.set()

    async def _settled(self) -> None:
        """After news, once there was quiet for a moment."""
        await self._news.wait()
        latest = time.monotonic() + MOST_SETTLE_SECONDS
        while self._news.is_set() and time.monotonic() < latest:
            self._news.clear()
            await self._sleep(SETTLE_SECONDS)
        self._news.clear()

    async def _step(self) -> bool:
        """Look, and move where that is called for; True after a move. A failure is tried again later."""
        try:
            chosen = await self._surveyor.again(self._facing)
            if chosen != self._facing:
                await self._sleep(CONFIRM_SECONDS)
                if await self._surveyor.again(self._facing) != chosen:
                    self._news.set()
                    return False
                await self._move(chosen)
                return True
            if not self.file_stands:
                self.write_file()
        except ConfigError as error:
            # as while a cable is out, or an address is being changed: its return is an event
            self._complain("No interface faces the underlay now, keeping the old one: %s", error)
        except LodenError as error:
            self._complain("Cannot follow the change of this node's underlay: %s", error)
            self._look_again_later()
        return False

    async def _move(self, chosen: Underlay) -> None:
        log.warning("The underlay of this node has changed: %s", _difference(self._facing, chosen))
        attrs = await self._backend.move(chosen)
        for address in (self._facing.address, self._facing.address_v6):
            if address is not None and not await self._surveyor.has(address):
                connections.hang_up(address)  # the store's client would wait seconds for its dead connection
        self._facing = chosen
        self.moves += 1
        await self._publish(attrs)
        self.write_file()

    def write_file(self) -> None:
        """Put subnet.env in place; where that fails, say so and try again. The old one stands until then."""
        try:
            self._rewrite()
        except KernelError as error:
            self.file_stands = False
            self._complain("Failed to write subnet file: %s", error)
            self._look_again_later()
        else:
            self.file_stands = True
            self._retry.reset()

    def _look_again_later(self) -> None:
        asyncio.get_running_loop().call_later(self._retry.next(), self._news.set)

    async def _rest(self) -> None:
        """Every other node hears of each move: one that goes back and forth is followed ever more slowly."""
        now = time.monotonic()
        if now - self._moved_at > CALM_SECONDS:
            self._pause.reset()
        self._moved_at = now
        await self._sleep(self._pause.next())

    def _complain(self, text: str, error: LodenError) -> None:
        if self._gate.passes(str(error), time.monotonic()):
            log.warning(text, error)


def _difference(old: Underlay, new: Underlay) -> str:
    names = {
        "name": "interface", "index": "its number", "address": "address", "public_ip": "public IP", "mtu": "MTU",
        "address_v6": "IPv6 address", "public_ipv6": "public IPv6",
    }  # fmt: skip
    changed = [(word, getattr(old, name), getattr(new, name)) for name, word in names.items()]
    return ", ".join(f"{word} {before} is {after} now" for word, before, after in changed if before != after)
