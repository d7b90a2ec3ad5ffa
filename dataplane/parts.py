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

if TYPE_CHECKING:
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
        source_check=SourceCheck[options.source_check.upper()],
        wanted=EVERYTHING - options.switched_off - network.backend.switched_off,
        spin=options.spin / 1e6,
        device=memory.device,
        on_device=memory.keep_device,
    )
