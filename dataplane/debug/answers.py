"""Owns what a daemon answers at its control socket: gathers status, explain and capture around the daemon's parts.

Free of: the socket, and how a daemon starts. Invariant: every verb answers from the daemon's first moment, also before
there is a store, a lease or a backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from dataplane import __version__
from dataplane.backend.base import Backend, Tappable, Underlay
from dataplane.debug import explain, metrics, status
from dataplane.debug.capture import Captures, Order, Place
from dataplane.debug.control import Stream, Verb
from dataplane.debug.peers import Peer, Peers
from dataplane.debug.scene import Scene, Tunnel, Way
from dataplane.debug.verdict import Node
from dataplane.debug.wiretap import Wiretap
from dataplane.errors import CaptureError, LodenError
from dataplane.kernel import view
from dataplane.lease.keeper import LeaseKeeper
from dataplane.lease.model import Lease
from dataplane.netconf import BackendConfig, HostGwConfig, NetworkConfig, UdpConfig, VxlanConfig

READ_SECONDS = 5.0
HOSTS = Path("/etc/hosts")
NOTHING_YET = "this node has no network yet: `loden status` and the daemon's log say what it waits for"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a daemon consists of once it has a network."""

    keeper: LeaseKeeper
    backend: Backend
    facing: Callable[[], Underlay]
    network: NetworkConfig
    captures: Captures


class Answers:
    """`store` is its name, once there is one."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.store = ""
        self._ready = ready
        self._parts: Parts | None = None

    def know(
        self, keeper: LeaseKeeper, backend: Backend, facing: Callable[[], Underlay], network: NetworkConfig
    ) -> None:
        """Answer of these parts from now on; `facing` says what faces the underlay at the time."""
        tappable: object = backend
        captures = Captures(
            tappable if isinstance(tappable, Tappable) else None,
            lambda *how: Wiretap(self._scene, *how),
            self._place,
            self._peers,
        )
        self._parts = Parts(keeper, backend, facing, network, captures)

    def forget(self) -> None:
        """The parts are closed."""
        self._parts = None

    @property
    def verbs(self) -> Mapping[str, Verb]:
        return {"status": self.status, "explain": self.explain}

    @property
    def streams(self) -> Mapping[str, Stream]:
        return {"capture": self.capture}

    async def status(self, _arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The status document; docs/operations.md lists its members. Of peers, who may be ten thousand, the loop reads
        the counters, and a thread writes them down."""
        document: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "ready": self._ready(),
            "store": self.store,
            "udp_errors": view.udp_errors(),
        }
        if self._parts is not None:
            document |= status.lease_document(self._parts.keeper)
            document["captures"] = self._parts.captures.running
            document |= await asyncio.to_thread(status.backend_document, self._parts.backend.status())
        return document

    async def metrics(self) -> str:
        """The page for Prometheus."""
        return await asyncio.to_thread(metrics.page, await self.status())

    async def explain(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The way from this node to `address`, and a verdict; `probe` false sends nothing. Raises LodenError."""
        self._node()
        try:
            address = ip_address(str(arguments.get("address")))
        except ValueError as error:
            raise LodenError(f"{error}; use an IP address") from None
        probing = bool(arguments.get("probe", True))
        loop = asyncio.get_running_loop()

        async def on_the_loop() -> Node:
            return self._node()

        def read() -> Node:
            # on the loop's thread, where leases and tables are changed
            return asyncio.run_coroutine_threadsafe(on_the_loop(), loop).result(READ_SECONDS)

        account = await asyncio.to_thread(explain.explain, address, read, probing=probing)
        return account.document()

    async def capture(
        self, arguments: dict[str, Any], client: socket.socket, begin: Callable[[], None], stop: asyncio.Event
    ) -> None:
        """Send a capture of this node to `client` until it ends. Raises CaptureError."""
        order = Order.of(arguments)
        if self._parts is None:
            raise CaptureError(NOTHING_YET)
        status = self._parts.backend.status()
        if status.dataplane == "none":
            raise CaptureError(f"backend {status.type} carries no packets between nodes: there is nothing to capture")
        await self._parts.captures.run(order, client, begin, stop)

    def _node(self) -> Node:
        parts = self._parts
        if parts is None:
            raise LodenError(NOTHING_YET)
        keeper, network = parts.keeper, parts.network
        return Node(
            keeper.own,
            keeper.fenced,
            self.store,
            keeper.store_error,
            tuple(each for each in (network.network, network.ipv6_network) if each is not None),
            dict(keeper.peers),
            dict(keeper.rejected),
            parts.facing(),
            getattr(network.backend, "port", 0),
            parts.backend.status(),
        )

    def _place(self) -> Place:
        """Raises CaptureError."""
        if self._parts is None:
            raise CaptureError(NOTHING_YET)
        backend, own = self._parts.backend.status(), status.lease_document(self._parts.keeper)["lease"] or {}
        node, subnet = own.get("public_ip", "?"), own.get("subnet", "none yet")
        return Place(node, subnet, backend.type, backend.device or "?")

    def _scene(self) -> Scene:
        """Where this node's packets pass now. Raises CaptureError."""
        if self._parts is None:
            raise CaptureError(NOTHING_YET)
        backend, config = self._parts.backend.status(), self._parts.network.backend
        own = self._parts.keeper.own
        routed = isinstance(config, HostGwConfig)
        return Scene(
            devices=tuple(backend.device.split()),
            underlay=self._parts.facing().name,
            tunnel=_tunnel(config),
            networks=self._parts.network.networks,
            subnets=own.key.subnets if own else (),
            ways=tuple(Way(p.subnet, p.public_ip, p.direct or routed) for p in backend.peers),
        )

    def _peers(self) -> Peers:
        keeper = self._parts.keeper if self._parts else None
        if keeper is None:
            return Peers(())
        hosts = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            hosts = HOSTS.read_text()
        peers = [Peer(lease.key.subnets, _addresses(lease)) for lease in keeper.peers.values()]
        return Peers(peers, hosts, _addresses(keeper.own) if keeper.own else ())


def _addresses(lease: Lease) -> tuple[IPv4Address | IPv6Address, ...]:
    """At which the node of a lease is reached; one without IPv4 has 0.0.0.0 there."""
    both = (lease.attrs.public_ip, lease.attrs.public_ipv6)
    return tuple(address for address in both if address is not None and int(address))


def _tunnel(config: BackendConfig) -> Tunnel | None:
    match config:
        case UdpConfig(port=port):
            return Tunnel(port, None)
        case VxlanConfig(port=port, vni=vni):
            return Tunnel(port, vni)
        case _:
            return None
