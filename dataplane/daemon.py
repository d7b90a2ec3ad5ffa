"""Owns the composition of the daemon: what is started in which order, what a signal does, what is closed again.

The only place that opens stores and backends by name; it decides nothing else. Invariant: whatever start reached, stop
undoes in the opposite order, and every way out has one exit code: 0 for an ordered stop, -help and -version, 2 for
flags that cannot be, 1 for everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import signal
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataplane import __version__, klog, netconf, systemd
from dataplane import options as flags
from dataplane.backend.base import Backend, Underlay
from dataplane.debug import status
from dataplane.debug.control import ControlServer
from dataplane.errors import ConfigError, KernelError, LodenError
from dataplane.health import HealthServer
from dataplane.kernel import firewall, iface, subnetfile
from dataplane.lease.allocate import Claim
from dataplane.lease.keeper import LeaseKeeper, fetch_config
from dataplane.lease.model import Lease
from dataplane.lease.store import LeaseStore
from dataplane.netconf import NetworkConfig
from dataplane.options import Options

if TYPE_CHECKING:
    from dataplane.kernel.netlink import Netlink

log = logging.getLogger(__name__)

PROGRAM = "flanneld"


def main(argv: Sequence[str] | None = None) -> int:
    """The `flanneld` command. Returns the exit code."""
    try:
        options = flags.parse(sys.argv[1:] if argv is None else argv, os.environ)
        if options.help:
            sys.stderr.write(flags.usage(PROGRAM))
            return 0
        if options.version:
            sys.stderr.write(f"Loden {__version__}\n")
            return 0
        flags.check(options)
    except ConfigError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\nSee {PROGRAM} -help\n")
        return 2
    klog.configure(options.v, sys.stderr)
    for warning in options.warnings:
        log.warning("%s", warning)
    log.info("%s", flags.describe(options))
    import uvloop

    try:
        uvloop.run(cleanup(options) if options.cleanup else run(options))
    except LodenError as error:
        log.error("%s", error)  # the text says what to do; a traceback says nothing to an operator
        return 1
    return 0


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT. Raises LodenError where the start fails, with nothing left behind."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop_once, stop, number)
    daemon = asyncio.create_task(Daemon(options).run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({daemon, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not daemon.done():
        systemd.notify(os.environ, STOPPING="1")
        daemon.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await daemon
    log.info("Exiting cleanly...")


def _stop_once(stop: asyncio.Event, number: signal.Signals) -> None:
    """The first signal stops in order; a second one kills, as with flannel."""
    log.info("Received %s, stopping", signal.Signals(number).name)
    asyncio.get_running_loop().remove_signal_handler(number)
    signal.signal(number, signal.SIG_DFL)
    stop.set()


async def open_store(options: Options) -> LeaseStore:
    """The lease store that the flags name."""
    if options.lease_store:
        from dataplane.lease.sqlite import SqliteStore

        return await SqliteStore.open(options.lease_store)
    from dataplane.lease.etcd import EtcdStore

    return EtcdStore(
        options.etcd_endpoints,
        options.etcd_prefix,
        keyfile=options.etcd_keyfile,
        certfile=options.etcd_certfile,
        cafile=options.etcd_cafile,
        username=options.etcd_username,
        password=options.etcd_password,
    )


async def cleanup(options: Options) -> None:
    """Remove what a former daemon left: its firewall rules, its device (address and route go with it), its state."""
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


class Daemon:
    """One node's daemon, from start to stop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._places = subnetfile.places(options.subnet_file, options.control_socket)
        self._state = subnetfile.DaemonState()
        self._store: LeaseStore | None = None
        self._keeper: LeaseKeeper | None = None
        self._backend: Backend | None = None
        self._rng = random.Random()
        self._started = False

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(subnetfile.DaemonLock(self._places.lock))
            self._state = subnetfile.read_state(self._places.state)
            await self._listen(stack)
            self._store = await open_store(self._options)
            stack.push_async_callback(self._store.close)
            log.info("Created subnet manager: %s", self._store.name)
            network = await fetch_config(self._store, self._read_network, rng=self._rng)
            keeper, backend = await self._join(stack, self._store, network)
            lease = await keeper.acquire()
            await backend.attach(lease)
            await self._serve(keeper, backend, network, lease)

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        """Health and control answer from the first moment, also while the store is out of reach."""
        if self._options.healthz_port:
            health = await HealthServer.start(self._options.healthz_ip, self._options.healthz_port, self._ready)
            stack.push_async_callback(health.close)
        control = await ControlServer.start(Path(self._places.control_socket), {"status": self._status})
        stack.push_async_callback(control.close)

    async def _join(
        self, stack: contextlib.AsyncExitStack, store: LeaseStore, network: NetworkConfig
    ) -> tuple[LeaseKeeper, Backend]:
        """What stands between a network config and a lease: underlay, backend, keeper."""
        from dataplane.kernel.netlink import Netlink

        netlink = await Netlink.open()
        stack.push_async_callback(netlink.close)
        facing = await self._choose_underlay(netlink)
        backend = self._backend = self._make_backend(network, facing, netlink)
        stack.push_async_callback(backend.close)
        keeper = self._keeper = LeaseKeeper(
            store,
            network,
            await backend.prepare(),
            claim=self._claim(),
            previous=subnetfile.read_previous(self._places.subnet_file),
            renew_margin=self._options.subnet_lease_renew_margin * 60.0,
            on_events=backend.apply,
            on_own=self._remember_lease,
            rng=self._rng,
        )
        return keeper, backend

    async def _serve(self, keeper: LeaseKeeper, backend: Backend, network: NetworkConfig, lease: Lease) -> None:
        if self._options.iptables_forward_rules and network.network is not None:
            try:
                await firewall.ensure_forward(network.network, nftables=network.enable_nftables)
            except KernelError as error:
                log.error("Failed to install forward rules: %s", error)  # as flannel: only logged
        subnetfile.write_subnet_file(
            self._places.subnet_file, network, lease.key, mtu=backend.mtu, ip_masq=self._options.ip_masq
        )
        log.info("Wrote subnet file to %s", self._places.subnet_file)
        self._started = True
        systemd.notify(os.environ, READY="1")
        log.info("Running backend.")
        await keeper.run()

    def _read_network(self, text: bytes) -> NetworkConfig:
        """Parse the net-conf; refuse what is not built yet as early as what is wrong."""
        network = netconf.parse(text, origin=f"{self._store.name if self._store else 'store'} net-conf")
        for warning in network.warnings:
            log.warning("%s", warning)
        log.info("Found network config - Backend type: %s", network.backend.type)
        return network

    async def _choose_underlay(self, netlink: Netlink) -> Underlay:
        return iface.choose(
            await netlink.links(),
            await netlink.addresses(),
            await netlink.default_routes(),
            names=self._options.iface,
            public_ip=IPv4Address(self._options.public_ip) if self._options.public_ip else None,
        )

    def _make_backend(self, network: NetworkConfig, facing: Underlay, netlink: Netlink) -> Backend:
        if network.enable_ipv6:
            raise ConfigError("EnableIPv6 in the net-conf: IPv6 is not built yet; set it to false")
        if network.network is None:
            raise ConfigError("none defined stack: the net-conf enables neither IPv4 nor IPv6")
        if not isinstance(network.backend, netconf.UdpConfig):
            raise ConfigError(f"Backend.Type {network.backend.type!r} is not built yet; this version carries udp")
        from dataplane.backend.udp import UdpBackend
        from dataplane.path.capability import EVERYTHING
        from dataplane.path.datapath import SourceCheck

        return UdpBackend(
            facing,
            network.network,
            network.backend.port,
            netlink,
            source_check=SourceCheck[self._options.source_check.upper()],
            wanted=EVERYTHING - self._options.switched_off - network.backend.switched_off,
            spin=self._options.spin / 1e6,
            device=self._state.device,
            on_device=self._remember_device,
        )

    def _claim(self) -> Claim | None:
        state = self._state
        if not state.key:
            return None
        return Claim(state.key, state.create_revision, IPv4Address(state.public_ip))

    def _remember_device(self, name: str) -> None:
        self._remember(device=name)

    def _remember_lease(self, lease: Lease) -> None:
        self._remember(key=str(lease.key), create_revision=lease.create_revision, public_ip=str(lease.attrs.public_ip))

    def _remember(self, **changes: Any) -> None:
        state = dataclasses.replace(self._state, **changes)
        if state == self._state:
            return
        try:
            subnetfile.write_state(self._places.state, state)
        except KernelError as error:
            log.error("Cannot keep the state for the next start: %s", error)
        self._state = state

    def _ready(self) -> bool:
        """Packets can be carried, the peers are known, and our lease is ours."""
        keeper = self._keeper
        return self._started and keeper is not None and keeper.synced and keeper.healthy

    def _status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        document: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "ready": self._ready(),
            "store": self._store.name if self._store else "",
        }
        if self._keeper is not None:
            document |= status.lease_document(self._keeper)
        if self._backend is not None:
            document |= status.backend_document(self._backend.status())
        return document
