"""Owns which class stands for what the flags and the net-conf name: the lease store, the backend.

Free of: order and life; `daemon` starts and stops what it gets from here. Invariant: a part that was not asked for is
not imported, so that its libraries cost a daemon at rest nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dataplane import netconf
from dataplane.backend.base import Backend, Tappable, Underlay
from dataplane.errors import ConfigError
from dataplane.lease.store import LeaseStore
from dataplane.memory import Memory
from dataplane.netconf import NetworkConfig
from dataplane.options import Options
from dataplane.path.capability import Capability

if TYPE_CHECKING:
    from dataplane.backend.direct import UserspaceBackend
    from dataplane.backend.userspace import OnPeers, Tuning
    from dataplane.kernel.netlink import Netlink

INSTEAD = {
    "extension": "it runs commands from the net-conf and other nodes' leases; use vxlan, or udp where VXLAN is blocked",
    "ipip": "use vxlan with DirectRouting, or host-gw where all nodes share a wire",
    "ipsec": "for an encrypted network keep flannel's own flanneld on every node; else use vxlan",
    "tencent-vpc": "use vxlan, or host-gw where the VPC lets nodes route for each other",
    "wireguard": "for an encrypted network keep flannel's own flanneld on every node; else use vxlan or udp",
}
"""What to use in place of flannel's other backends."""


def refusal(kind: str) -> str:
    """Why the start ends with one of flannel's other backends."""
    return f"Backend.Type {kind!r} is not carried by Loden: {INSTEAD[kind]}"


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


async def make_backend(
    options: Options, network: NetworkConfig, facing: Underlay, netlink: Netlink, memory: Memory
) -> Backend:
    """The backend that the net-conf names. Raises ConfigError for one that this node or this version cannot carry."""
    match network.backend:
        case netconf.UdpConfig() as config:
            udp = partial(_udp, options, network, config, facing, netlink, memory)
            return _with_direct_routes(network, udp) if config.direct_routing else udp(None)
        case netconf.VxlanConfig() as config:
            if await vxlan_dataplane(options, config, netlink) == "userspace":
                vxlan = partial(_vxlan, options, network, config, facing, netlink, memory)
                return _with_direct_routes(network, vxlan) if config.direct_routing else vxlan(None)
            from dataplane.backend.kernel_vxlan import KernelVxlanBackend

            return KernelVxlanBackend(facing, network, config, netlink)
        case netconf.HostGwConfig():
            from dataplane.backend.host_gw import HostGwBackend

            return HostGwBackend(facing, network)
        case netconf.AllocConfig():
            from dataplane.backend.alloc import AllocBackend

            return AllocBackend(facing, network)
        case netconf.ForeignConfig(type=kind):
            raise ConfigError(refusal(kind))


async def vxlan_dataplane(options: Options, config: netconf.VxlanConfig, netlink: Netlink) -> str:
    """Who carries vxlan, `kernel` or `userspace`: what the flag says, else the net-conf, else the kernel, as with
    flannel. Raises ConfigError where that must be the kernel and it cannot."""
    asked = options.vxlan_dataplane or config.dataplane or "kernel"
    if asked == "userspace" or await netlink.has_vxlan():
        return "userspace" if asked == "userspace" else "kernel"
    if asked == "auto":
        return "userspace"
    raise ConfigError("this kernel has no vxlan devices (no module `vxlan`): use -vxlan-dataplane=userspace, or auto")


def _udp(
    options: Options,
    network: NetworkConfig,
    config: netconf.UdpConfig,
    facing: Underlay,
    netlink: Netlink,
    memory: Memory,
    on_peers: OnPeers | None,
) -> UserspaceBackend:
    from dataplane.backend.udp import UdpBackend

    return UdpBackend(
        facing,
        network.networks,
        config.port,
        netlink,
        _tuning(options, config.switched_off),
        device=memory.device,
        on_device=memory.keep_device,
        on_peers=on_peers,
    )


def _vxlan(
    options: Options,
    network: NetworkConfig,
    config: netconf.VxlanConfig,
    facing: Underlay,
    netlink: Netlink,
    memory: Memory,
    on_peers: OnPeers | None,
) -> UserspaceBackend:
    from dataplane.backend.vxlan import VxlanBackend, VxlanWire

    return VxlanBackend(
        facing,
        network.networks,
        VxlanWire(config.vni, config.port, config.mtu, options.vxlan_source_ports),
        netlink,
        _tuning(options, config.switched_off),
        macs=memory.macs,
        on_macs=memory.keep_macs,
        on_device=memory.keep_device,
        on_peers=on_peers,
    )


def _with_direct_routes(network: NetworkConfig, make: Callable[[OnPeers | None], UserspaceBackend]) -> Backend:
    from dataplane.backend.direct import DirectlyRouted, DirectRoutes

    routes = DirectRoutes(network)
    return DirectlyRouted(make(routes.follow), routes)


def give_way(backend: Backend) -> bool:
    """Lower this process's priority where the backend has pumps, before it starts them; they keep what it had. Returns
    whether it has."""
    found: object = backend
    has_pumps = isinstance(found, Tappable)
    if has_pumps:
        from dataplane.path.datapath import give_way_to_pumps

        give_way_to_pumps()
    return has_pumps


def _tuning(options: Options, switched_off: frozenset[Capability]) -> Tuning:
    from dataplane.backend.userspace import Tuning
    from dataplane.path.capability import EVERYTHING
    from dataplane.path.facts import SourceCheck

    return Tuning(
        SourceCheck[options.source_check.upper()],
        wanted=EVERYTHING - options.switched_off - switched_off,
        spin=options.spin / 1e6,
        moderation=options.moderation / 1e6,
        queues=options.queues,
    )
