"""Owns which class stands for what the flags and the net-conf name: the lease store, the backend.

Free of: order and life; `daemon` starts and stops what it gets from here. Invariant: a part that was not asked for is
not imported, so that its libraries cost a daemon at rest nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataplane import netconf
from dataplane.backend.base import Backend, Underlay
from dataplane.errors import ConfigError
from dataplane.lease.store import LeaseStore
from dataplane.memory import Memory
from dataplane.netconf import NetworkConfig
from dataplane.options import Options
from dataplane.path.capability import Capability

if TYPE_CHECKING:
    from dataplane.backend.userspace import Tuning
    from dataplane.kernel.netlink import Netlink


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


def make_backend(
    options: Options, network: NetworkConfig, facing: Underlay, netlink: Netlink, memory: Memory
) -> Backend:
    """The backend that the net-conf names. Raises ConfigError for one that this version does not carry."""
    backend = network.backend
    networks = [family for family in (network.network, network.ipv6_network) if family is not None]
    if isinstance(backend, netconf.UdpConfig):
        from dataplane.backend.udp import UdpBackend

        return UdpBackend(
            facing,
            networks,
            backend.port,
            netlink,
            _tuning(options, backend.switched_off),
            device=memory.device,
            on_device=memory.keep_device,
        )
    if isinstance(backend, netconf.VxlanConfig) and backend.dataplane == "userspace":
        from dataplane.backend.vxlan import VxlanBackend, VxlanWire

        return VxlanBackend(
            facing,
            networks,
            VxlanWire(backend.vni, backend.port, backend.mtu, options.vxlan_source_ports),
            netlink,
            _tuning(options, backend.switched_off),
            mac=memory.mac,
            on_mac=memory.keep_mac,
            on_device=memory.keep_device,
        )
    raise ConfigError(f"Backend.Type {backend.type!r} is not built yet; this version carries udp and vxlan")


def _tuning(options: Options, switched_off: frozenset[Capability]) -> Tuning:
    from dataplane.backend.userspace import Tuning
    from dataplane.path.capability import EVERYTHING
    from dataplane.path.datapath import SourceCheck

    return Tuning(
        SourceCheck[options.source_check.upper()],
        wanted=EVERYTHING - options.switched_off - switched_off,
        spin=options.spin / 1e6,
    )
