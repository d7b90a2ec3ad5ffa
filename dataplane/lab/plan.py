"""Owns the shape of a lab: names, addresses, and the `ip` commands that build each part of it.

Free of: IO. Everything here is worked out from a name and a number, so that two runs give the same lab and `down`
can recognise what `up` made. Invariant: every device is made inside one of the lab's own namespaces; the
namespace that the command is called from gets none, not even for a moment.

Underlay: 198.18.0.0/15 (RFC 2544, benchmarks only). The switch has 198.18.0.1, node n1 has 198.18.1.1, n2 198.18.1.2;
with IPv6 it is fd00:198:18::/64, where the switch is ::1, n1 ::1:1, n2 ::1:2.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from dataplane.errors import ConfigError, LodenError

UNDERLAY = IPv4Network("198.18.0.0/15")
SWITCH_ADDRESS = IPv4Interface("198.18.0.1/15")
SWITCH_ADDRESS_V6 = IPv6Interface("fd00:198:18::1/64")
NETWORK_V6 = IPv6Network("fd00:10:244::/48")
"""Of the pods of a lab with IPv6."""
_FIRST_NODE = IPv4Address("198.18.1.0")
_FIRST_NODE_V6 = IPv6Address("fd00:198:18::1:0")
MAX_NODES = 250
MAX_PODS = 50

STORES = ("sqlite", "etcd")
BACKENDS = ("udp", "vxlan", "host-gw", "alloc")
DATAPLANES = ("kernel", "userspace", "auto")
FAMILIES = ("4", "6", "46")

_LAB_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,18}[a-z0-9])?")

QUIET_IPV6 = ("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
"""No router solicitations and no duplicate address detection among the packets that are counted."""

NODE_SYSCTLS = (*QUIET_IPV6, "net.ipv4.ip_forward=1")

SPEAKING_IPV6 = tuple(
    f"net.ipv6.conf.{where}.{key}"
    for where in ("all", "default")
    for key in ("disable_ipv6=0", "accept_dad=0", "accept_ra=0", "router_solicitations=0")
)
"""IPv6 from the first moment, without questions to anybody."""

ROUTING_IPV6 = ("net.ipv6.conf.all.forwarding=1",)

SWITCH_SYSCTLS = (
    # A switch has no firewall: where br_netfilter is loaded it would send every frame through iptables.
    "net.bridge.bridge-nf-call-iptables=0",
    "net.bridge.bridge-nf-call-arptables=0",
    "net.bridge.bridge-nf-call-ip6tables=0",
)


class LabError(LodenError):
    """A step of a lab failed. Says which step, on which node, what its log says, and what to do."""


def check_lab_name(name: str) -> str:
    """The name, if it can stand in a namespace, a directory and a socket path. Raises ConfigError."""
    if _LAB_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} cannot name a lab: use 1 to 20 lower-case letters, digits and inner hyphens, as in --name=lab2"
        )
    return name


def namespace(lab: str, member: str) -> str:
    """The name of the network namespace of `switch`, a node (`n1`) or a pod (`n1-p1`)."""
    return f"loden-{lab}-{member}"


def member_of(lab: str, namespace_name: str) -> str | None:
    """Which member of the lab a namespace is; None where it belongs to another lab or to no lab."""
    match = re.fullmatch(rf"loden-{re.escape(lab)}-(switch|n\d+|n\d+-p\d+)", namespace_name)
    return None if match is None else match[1]


def lab_of(namespace_name: str) -> str | None:
    """Which lab a namespace belongs to, if any."""
    match = re.fullmatch(r"loden-([a-z0-9-]+?)-(?:switch|n\d+|n\d+-p\d+)", namespace_name)
    return None if match is None else match[1]


def node_address(number: int) -> IPv4Interface:
    """Underlay address of node `number`, counted from 1."""
    return IPv4Interface((_FIRST_NODE + number, UNDERLAY.prefixlen))


def node_address_v6(number: int) -> IPv6Interface:
    """IPv6 underlay address of node `number`, counted from 1."""
    return IPv6Interface((_FIRST_NODE_V6 + number, SWITCH_ADDRESS_V6.network.prefixlen))


def switch_links(mtu: int) -> list[str]:
    """For the switch's namespace: the bridge that is the wire between the nodes."""
    return [
        "link set lo up",
        f"link add br0 mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"addr add {SWITCH_ADDRESS} dev br0",
        "link set br0 up",
    ]


def switch_port(lab: str, node: str, mtu: int) -> list[str]:
    """For the switch's namespace: the cable to a node; its far end is `eth0` of the node from the start."""
    return [
        f"link add {node} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {namespace(lab, node)}",
        f"link set {node} master br0",
        f"link set {node} up",
    ]


def switch_links_v6() -> list[str]:
    """For the switch's namespace, once its bridge is there."""
    return [f"addr add {SWITCH_ADDRESS_V6} dev br0"]


def etcd_url(address: IPv4Address | IPv6Address, port: int = 2379) -> str:
    """Where an etcd at that address is asked, or its members meet."""
    return f"http://{address}:{port}" if address.version == 4 else f"http://[{address}]:{port}"


def etcd(address: IPv4Address | IPv6Address, directory: str) -> list[str]:
    """The command line of an etcd of one member, in a namespace that has `address`; it takes transactions of 1,000."""
    url, peer_url = etcd_url(address), etcd_url(address, 2380)
    return [
        *("etcd", "--name=lab", f"--data-dir={directory}", "--logger=zap", "--log-level=warn"),
        *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}", "--max-txn-ops=1000"),
        *(f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}"),
        f"--initial-cluster=lab={peer_url}",
    ]


def etcdctl(address: IPv4Address | IPv6Address, *arguments: str) -> list[str]:
    """Debian's etcdctl, against that etcd."""
    return ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={etcd_url(address)}", *arguments]


def node_links(*addresses: IPv4Interface | IPv6Interface) -> list[str]:
    """For a node's namespace, once its cable is there."""
    return ["link set lo up", *(f"addr add {address} dev eth0" for address in addresses), "link set eth0 up"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the lab's nodes have in common; kept in lab.json so that later commands know it."""

    store: str = "sqlite"
    backend: str = "udp"
    network: str = "10.244.0.0/16"
    underlay_mtu: int = 1500
    pods: int = 1
    dataplane: str = ""
    """Of vxlan, one for all nodes or one for each, with commas between; empty: what the daemon does by itself."""
    direct_routing: bool = False
    families: str = "4"
    """IP versions of underlay and pods: `4`, `6` or `46`."""

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise ConfigError(f"--store={self.store}: a lab's leases are kept in {' or '.join(STORES)}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"--backend={self.backend} is not built yet; what there is: {', '.join(BACKENDS)}")
        try:
            network = IPv4Network(self.network)
        except ValueError as error:
            raise ConfigError(f"--network={self.network}: {error}") from None
        if network.overlaps(UNDERLAY) or network.prefixlen > 22:
            raise ConfigError(f"--network={network}: take a /22 or larger that does not overlap {UNDERLAY}")
        if not 576 <= self.underlay_mtu <= 65_535:
            raise ConfigError(f"--underlay-mtu={self.underlay_mtu}: an Ethernet device takes 576 to 65535")
        for word in self.dataplane.split(",") if self.dataplane else ():
            if word not in DATAPLANES:
                raise ConfigError(f"--dataplane={self.dataplane}: {word!r} is none of {', '.join(DATAPLANES)}")
        if self.dataplane and self.backend != "vxlan":
            raise ConfigError(f"--dataplane={self.dataplane}: only --backend=vxlan has a choice")
        if self.direct_routing and self.backend not in ("udp", "vxlan"):
            raise ConfigError(f"--direct-routing: {self.backend} knows no encapsulation that it could leave out")
        if self.families not in FAMILIES:
            raise ConfigError(f"--families={self.families}: a lab speaks {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}")
        if self.families == "6" and self.backend == "udp":
            raise ConfigError("--families=6: backend udp needs IPv4 between the nodes; take --backend=vxlan or host-gw")
        if not 0 <= self.pods <= MAX_PODS:
            raise ConfigError(f"--pods={self.pods}: a node has 0 to {MAX_PODS} pods here")

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(map(int, self.families))

    def check_count(self, nodes: int) -> None:
        """Raise ConfigError where these settings name more nodes than there are."""
        if (named := len(self.dataplane.split(","))) > nodes:
            raise ConfigError(f"--dataplane={self.dataplane} names {named} nodes, and the lab has {nodes}")

    def net_conf(self) -> str:
        """The config that nodes find. Of a /16 or larger its last quarter is left to leases that are put by hand."""
        backend: dict[str, object] = {"Type": self.backend}
        if self.direct_routing:
            backend["DirectRouting"] = True
        conf: dict[str, object] = {"Backend": backend}
        if 4 in self.versions:
            conf |= {"Network": self.network, "SubnetLen": 24}
            if (network := IPv4Network(self.network)).prefixlen <= 16:
                last = int(network.network_address) + network.num_addresses * 3 // 4 - 256
                conf["SubnetMax"] = str(IPv4Address(last))
        else:
            conf |= {"EnableIPv4": False}
        if 6 in self.versions:
            conf |= {"EnableIPv6": True, "IPv6Network": str(NETWORK_V6), "IPv6SubnetLen": 64}
        return json.dumps(conf)

    def dataplane_of(self, number: int) -> str:
        """What node `number`, counted from 1, is told; the last of a list stands for all further nodes."""
        words = self.dataplane.split(",")
        return words[min(number, len(words)) - 1]


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What a CNI plugin takes from subnet.env: the bridge's address in the node's subnets, and the MTU."""

    bridge: IPv4Interface | None
    mtu: int
    bridge_v6: IPv6Interface | None = None

    @classmethod
    def parse(cls, text: str, origin: str) -> PodNetwork:
        """Read a subnet.env. Raises ConfigError naming `origin`."""
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        v4, v6 = values.get("FLANNEL_SUBNET"), values.get("FLANNEL_IPV6_SUBNET")
        try:
            if v4 is None and v6 is None:
                raise KeyError("FLANNEL_SUBNET")
            mtu = int(values["FLANNEL_MTU"])
            return cls(None if v4 is None else IPv4Interface(v4), mtu, None if v6 is None else IPv6Interface(v6))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{origin} has no usable FLANNEL_SUBNET and FLANNEL_MTU: {error}") from None

    @property
    def bridges(self) -> tuple[IPv4Interface | IPv6Interface, ...]:
        return tuple(bridge for bridge in (self.bridge, self.bridge_v6) if bridge is not None)

    def pod_address(self, number: int, version: int = 0) -> IPv4Address | IPv6Address:
        """Address of pod `number`, counted from 1: the bridge has .1, the first pod .2. Of the first IP version that
        there is, or of the one asked for. Raises LabError where the node has no subnet of that version."""
        for bridge in self.bridges:
            if version in (0, bridge.version):
                return bridge.ip + number
        raise LabError(f"the node has no subnet of IPv{version}")


def pod_bridge(network: PodNetwork) -> list[str]:
    """For a node's namespace: `cni0`, as the bridge plugin makes it."""
    return [
        f"link add cni0 mtu {network.mtu} type bridge",
        *(f"addr add {bridge} dev cni0" for bridge in network.bridges),
        "link set cni0 up",
    ]


def pod_port(lab: str, node: str, number: int, network: PodNetwork) -> list[str]:
    """For a node's namespace: the veth pair to one of its pods."""
    pod = namespace(lab, f"{node}-p{number}")
    return [
        f"link add p{number} mtu {network.mtu} type veth peer name eth0 mtu {network.mtu} netns {pod}",
        f"link set p{number} master cni0",
        f"link set p{number} up",
    ]


def pod_links(number: int, network: PodNetwork) -> list[str]:
    """For a pod's namespace, once its veth is there."""
    return [
        "link set lo up",
        *(f"addr add {bridge.ip + number}/{bridge.network.prefixlen} dev eth0" for bridge in network.bridges),
        "link set eth0 up",
        *(f"route add default via {bridge.ip}" for bridge in network.bridges),
    ]
