"""Owns the network config: what an operator writes for a whole network, and its rules.

Free of: IO, how faults are shown (json_text), and the question where the text came from (`origin` is an argument).
Invariant: any bytes give a NetworkConfig or a ConfigError that shows the place, never another exception.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, ClassVar, Generic, TypeVar

from dataplane.json_text import JsonObject, JsonText, did_you_mean, nearest
from dataplane.path.capability import Capability
from dataplane.path.wire import LEAST_MTU, VXLAN_OVERHEAD

UDP_PORT = 8285
"""Where flannel's udp backend listens unless Backend.Port says otherwise."""

VXLAN_PORT = 8472
"""The same for vxlan: Linux's own default, not IANA's 4789."""

DATAPLANES = ("kernel", "userspace", "auto")
"""Who may carry vxlan: a kernel device, this daemon, or this daemon where the kernel has no such device."""

BACKEND_TYPES = ("alloc", "extension", "host-gw", "ipip", "ipsec", "tencent-vpc", "udp", "vxlan", "wireguard")
"""Every type that flannel knows (pkg/backend/manager.go)."""

_FIELDS = (
    *("EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend"),
    *("Network", "SubnetLen", "SubnetMin", "SubnetMax"),
    *("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"),
)
_SWITCHES = {
    "UDPSegment": Capability.UDP_SEGMENT,
    "UDPGRO": Capability.UDP_GRO,
    "TunTSO": Capability.TUN_TSO,
    "TunUSO": Capability.TUN_USO,
}
_BACKEND_FIELDS = {
    "udp": ("Type", "Port", "DirectRouting", *_SWITCHES),
    "vxlan": ("Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting", "Dataplane", *_SWITCHES),
    "host-gw": ("Type",),
    "alloc": ("Type",),
}

_Net = TypeVar("_Net", bound=IPv4Network | IPv6Network)
_Addr = TypeVar("_Addr", bound=IPv4Address | IPv6Address)


@dataclass(frozen=True, slots=True)
class UdpConfig:
    """Options of the udp backend. `switched_off`: capabilities that no node of this network uses (our own members
    `UDPSegment`, `UDPGRO`, `TunTSO`, `TunUSO`; flannel ignores them)."""

    type: ClassVar[str] = "udp"
    port: int = UDP_PORT
    switched_off: frozenset[Capability] = frozenset()
    direct_routing: bool = False


@dataclass(frozen=True, slots=True)
class VxlanConfig:
    """Options of the vxlan backend. `mtu`: that of outer packets, 0 for the underlay's. `dataplane`: who carries the
    packets where a node's flags say nothing (our own member; empty: not said). `switched_off`: see UdpConfig."""

    type: ClassVar[str] = "vxlan"
    vni: int = 1
    port: int = VXLAN_PORT
    mtu: int = 0
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    dataplane: str = ""
    switched_off: frozenset[Capability] = frozenset()


@dataclass(frozen=True, slots=True)
class HostGwConfig:
    """The host-gw backend has no options."""

    type: ClassVar[str] = "host-gw"


@dataclass(frozen=True, slots=True)
class AllocConfig:
    """The alloc backend has no options."""

    type: ClassVar[str] = "alloc"


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """A backend of flannel's that Loden does not carry: its type in lower case, and the members of Backend."""

    type: str
    options: Mapping[str, Any]


BackendConfig = UdpConfig | VxlanConfig | HostGwConfig | AllocConfig | ForeignConfig


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One network. `subnet_min` and `subnet_max` are the first and last subnet that may be leased, both inclusive.

    Of a family that is off, the addresses are None and the length is 0. `warnings`: what flannel would ignore in
    silence, a sentence each.
    """

    enable_ipv4: bool
    enable_ipv6: bool
    enable_nftables: bool
    network: IPv4Network | None
    subnet_len: int
    subnet_min: IPv4Address | None
    subnet_max: IPv4Address | None
    ipv6_network: IPv6Network | None
    ipv6_subnet_len: int
    ipv6_subnet_min: IPv6Address | None
    ipv6_subnet_max: IPv6Address | None
    backend: BackendConfig
    warnings: tuple[str, ...] = ()

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Of the families that are on."""
        return tuple(family for family in (self.network, self.ipv6_network) if family is not None)

    def is_subnet(self, subnet: IPv4Network | IPv6Network) -> bool:
        """Whether it is what some node of this network could lease, by its place and length."""
        if isinstance(subnet, IPv4Network):
            return self.network is not None and subnet.prefixlen == self.subnet_len and subnet.subnet_of(self.network)
        v6 = self.ipv6_network
        return v6 is not None and subnet.prefixlen == self.ipv6_subnet_len and subnet.subnet_of(v6)


def parse(text: bytes, *, origin: str) -> NetworkConfig:
    """Read and check a network config; `origin` is the file or key that errors name. Raises ConfigError.

    Follows Go's decoder (names in any case, unknown ones ignored, null is unset) and flannel's rules with its
    texts, and demands Min <= Max besides (facts 2; pkg/subnet/config.go).
    """
    document = JsonObject(JsonText.of(text, origin), 0, _FIELDS)
    enable_ipv4 = document.boolean("EnableIPv4", default=True)
    enable_ipv6 = document.boolean("EnableIPv6", default=False)
    enable_nftables = document.boolean("EnableNFTables", default=False)
    backend, warnings = _backend(document, enable_ipv6)
    v4 = _range(document, _V4, enable_ipv4)
    v6 = _range(document, _V6, enable_ipv6)
    if not enable_ipv4 and not enable_ipv6:
        raise document.fault("EnableIPv4", "none defined stack: EnableIPv4 and EnableIPv6 are both false")
    return NetworkConfig(
        enable_ipv4, enable_ipv6, enable_nftables, *v4, *v6, backend=backend, warnings=(*document.warnings, *warnings)
    )


def _backend(document: JsonObject, ipv6: bool) -> tuple[BackendConfig, list[str]]:
    place = document.object("Backend")
    if place is None:
        return UdpConfig(), []
    # the type says which other members are known
    of_type = JsonObject(document.source, place, ("Type",))
    word = of_type.string("Type") or ""
    kind = word.lower()
    options = JsonObject(document.source, place, _BACKEND_FIELDS.get(kind, _BACKEND_FIELDS["udp"]))
    if kind not in BACKEND_TYPES:
        hint = did_you_mean(nearest(kind, BACKEND_TYPES)) or f" (known: {', '.join(BACKEND_TYPES)})"
        raise options.fault("Type", f"unknown backend type: {word}{hint}")
    if kind == "udp":
        return _udp(options), options.warnings
    if kind == "vxlan":
        return _vxlan(options, ipv6), options.warnings
    if kind in ("host-gw", "alloc"):
        return (HostGwConfig() if kind == "host-gw" else AllocConfig()), options.warnings
    return ForeignConfig(kind, options.everything()), []


def _udp(options: JsonObject) -> UdpConfig:
    port = options.whole_number("Port", default=UDP_PORT)
    if not 1 <= port <= 65535:
        raise options.fault("Port", f"Backend.Port {port} is no UDP port: use 1 to 65535")
    return UdpConfig(port, _switched_off(options), options.boolean("DirectRouting", default=False))


def _vxlan(options: JsonObject, ipv6: bool) -> VxlanConfig:
    vni = options.whole_number("VNI", default=1)
    if not 1 <= vni < 1 << 24:
        raise options.fault("VNI", f"Backend.VNI {vni} is no VXLAN network identifier: use 1 to 16777215")
    port = options.whole_number("Port", default=0)
    if port > 65535:
        raise options.fault("Port", f"Backend.Port {port} is no UDP port: use 1 to 65535, or 0 for {VXLAN_PORT}")
    mtu = options.whole_number("MTU", default=0)
    least = LEAST_MTU[6] + VXLAN_OVERHEAD[6] if ipv6 else 576
    if mtu and not least <= mtu <= 65535:
        with_ipv6 = " with EnableIPv6" if ipv6 else ""
        text = f"use {least} to 65535{with_ipv6}, or 0 for the underlay's"
        raise options.fault("MTU", f"Backend.MTU {mtu} is no MTU of outer packets: {text}")
    dataplane = (options.string("Dataplane") or "").lower()
    if dataplane not in ("", *DATAPLANES):
        hint = did_you_mean(nearest(dataplane, DATAPLANES))
        raise options.fault("Dataplane", f"Backend.Dataplane must be one of {', '.join(DATAPLANES)}{hint}")
    return VxlanConfig(
        vni=vni,
        port=port or VXLAN_PORT,
        mtu=mtu,
        gbp=options.boolean("GBP", default=False),
        learning=options.boolean("Learning", default=False),
        direct_routing=options.boolean("DirectRouting", default=False),
        dataplane=dataplane,
        switched_off=_switched_off(options),
    )


def _switched_off(options: JsonObject) -> frozenset[Capability]:
    return frozenset(what for name, what in _SWITCHES.items() if not options.boolean(name, default=True))


@dataclass(frozen=True, slots=True)
class _Family(Generic[_Net, _Addr]):
    """What differs between the rules for IPv4 and IPv6. `usual_len`: flannel's subnet where the network is large."""

    prefix: str
    subject: str
    bits: int
    usual_len: int
    network: Callable[[tuple[str, int]], _Net]
    address: Callable[[str | int], _Addr]
    example: str

    def parse_network(self, text: str) -> _Net | None:
        """As Go's net.ParseCIDR, where Python would also take a bare address, a netmask or a zone."""
        match = re.fullmatch(r"([^/%]+)/(\d{1,3})", text, re.ASCII)
        return None if match is None else self.network((match[1], int(match[2])))


_V4 = _Family("", "network", 32, 24, lambda pair: IPv4Network(pair, strict=False), IPv4Address, "10.244.0.0/16")
_V6 = _Family("IPv6", "IPv6Network", 128, 64, lambda pair: IPv6Network(pair, strict=False), IPv6Address, "fd00::/48")


def _range(
    document: JsonObject, family: _Family[_Net, _Addr], enabled: bool
) -> tuple[_Net | None, int, _Addr | None, _Addr | None]:
    """One family's network, subnet length, first and last subnet, by CheckNetworkConfig in its order."""
    names = [family.prefix + name for name in ("Network", "SubnetLen", "SubnetMin", "SubnetMax")]
    network = document.parsed(names[0], family.parse_network, f"invalid CIDR address, use one such as {family.example}")
    length = document.whole_number(names[1], default=0)
    first, last = (document.parsed(name, _unscoped(family.address), "invalid IP address") for name in names[2:])
    if not enabled:
        return None, 0, None, None
    # flannel takes an all-zero value for one that was not given
    if network is None or (int(network.network_address) == 0 and network.prefixlen == 0):
        raise document.fault(names[0], f"please define a correct {names[0]} parameter in the flannel config")
    length = _subnet_len(document, family, names, network, length)
    size = 1 << (family.bits - length)
    if not first or int(first) == 0:
        # the first subnet holds the network's own address, so flannel never leases it unasked
        first = family.address(int(network.network_address) + size)
    if not last or int(last) == 0:
        last = family.address(int(network.broadcast_address) + 1 - size)
    for name, bound in zip(names[2:], (first, last), strict=True):
        if bound not in network:
            raise document.fault(name, f"{name} is not in the range of the {names[0]}")
    for name, bound in zip(names[2:], (first, last), strict=True):
        if int(bound) % size:
            raise document.fault(name, f"{name} is not on a SubnetLen boundary: {bound}")
    if int(first) > int(last):
        raise document.fault(names[2], f"{names[2]} {first} lies above {names[3]} {last}: no subnet is left")
    return network, length, first, last


def _subnet_len(
    document: JsonObject, family: _Family[_Net, _Addr], names: list[str], network: _Net, given: int
) -> int:
    if given > family.bits - 2:
        raise document.fault(names[1], f"SubnetLen must be less than /{family.bits - 1}")
    if given:
        if given < network.prefixlen + 2:
            raise document.fault(names[1], "network must be able to accommodate at least four subnets")
        return given
    if network.prefixlen > family.bits - 4:
        text = f"{family.subject} is too small. Minimum useful network prefix is /{family.bits - 4}"
        raise document.fault(names[0], text)
    return max(family.usual_len, network.prefixlen + 2)


def _unscoped(address: Callable[[str | int], _Addr]) -> Callable[[str], _Addr | None]:
    return lambda text: None if "%" in text else address(text)
