"""Owns a flannel node made by hand: `ip link add ... type vxlan`, `ip neigh`, `bridge fdb`, `ip route`, and a lease
that etcdctl puts, as flannel does it (facts 3 and 7). No code of Loden runs on it.

Free of: what is tried with it. Invariant: it knows of its peers what their leases in etcd say, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

from dataplane.lab import Lab, Node, netns, plan
from tests.netns.observing import SUBNETS, put_lease

SUBNET, SUBNET_V6 = IPv4Network("10.244.200.0/24"), IPv6Network("fd00:10:244:c8::/64")
DEVICES = {4: "flannel.1", 6: "flannel-v6.1"}
OVERHEAD = {4: 50, 6: 70}


class FlannelNode:
    """The machine is `node`; it has pods once `raise_up` has run."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node: Node = lab.add_node(start=False)
        self.versions = lab.settings.versions
        self.subnets: dict[int, IPv4Network | IPv6Network] = {4: SUBNET, 6: SUBNET_V6}
        self.outer: dict[int, IPv4Address | IPv6Address] = {a.version: a.ip for a in self.node.addresses}
        self.macs = {4: "02:00:00:00:c8:04", 6: "02:00:00:00:c8:06"}
        self.mtu = lab.settings.underlay_mtu - max(OVERHEAD[version] for version in self.versions)

    def raise_up(self) -> None:
        """Devices, pods, lease, and entries for every peer."""
        self._write_subnet_file()
        for version in self.versions:
            self._make_device(version)
        self.node.connect_pods()
        self.put_lease()
        self.learn()

    def put_lease(self) -> None:
        put_lease(self.lab, self._key(), json.dumps(self._value()))

    def learn(self) -> None:
        """Make the entries of each peer right."""
        for version in self.versions:
            for subnet, outer, mac in self._peers(version):
                self._ip(
                    f"route replace {subnet} via {subnet.network_address} dev {DEVICES[version]} onlink",
                    f"neigh replace {subnet.network_address} lladdr {mac} dev {DEVICES[version]} nud permanent",
                )
                bridge = ["bridge", "fdb", "replace", mac, "dev", DEVICES[version], "dst", str(outer)]
                self.lab.run(self.node.name, bridge)

    def change_mac(self, last: int) -> None:
        """Another MAC on the device, and then in the lease."""
        self.macs[4] = f"02:00:00:00:c9:{last:02x}"
        self._ip(f"link set {DEVICES[4]} address {self.macs[4]}")
        self.learn()  # the kernel forgets every neighbour of a device whose MAC changes
        self.put_lease()

    def change_public_ip(self, address: IPv4Address) -> None:
        """Another underlay address: the device is made anew with it, as flannel does it, then the lease says so."""
        former, self.outer[4] = self.outer[4], address
        self.lab.run(self.node.name, ["sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1"])
        self._ip(f"addr add {address}/{plan.UNDERLAY.prefixlen} dev eth0", f"link del {DEVICES[4]}")
        self._make_device(4)
        self.learn()
        self.put_lease()
        self._ip(f"addr del {former}/{plan.UNDERLAY.prefixlen} dev eth0")

    def _make_device(self, version: int) -> None:
        device, address = DEVICES[version], self.subnets[version].network_address
        local = self.outer[version]
        kind = f"vxlan id 1 local {local} dev eth0 dstport 8472 nolearning"
        mtu = self.lab.settings.underlay_mtu - OVERHEAD[version]
        self._ip(
            f"link add {device} address {self.macs[version]} mtu {mtu} type {kind}",
            f"addr add {address}/{address.max_prefixlen} dev {device}",
            f"link set {device} up",
        )

    def _write_subnet_file(self) -> None:
        names = {4: "FLANNEL_SUBNET", 6: "FLANNEL_IPV6_SUBNET"}
        lines = [f"{names[v]}={self.subnets[v][1]}/{self.subnets[v].prefixlen}" for v in self.versions]
        self.node.subnet_file.write_text("".join(f"{line}\n" for line in [*lines, f"FLANNEL_MTU={self.mtu}"]))

    def _key(self) -> str:
        subnets = [str(self.subnets[version]).replace("/", "-") for version in self.versions]
        return "&".join(subnets if 4 in self.versions else ["0.0.0.0-0", *subnets])

    def _value(self) -> dict[str, Any]:
        data = {version: {"VNI": 1, "VtepMAC": self.macs[version]} for version in self.versions}
        value = {
            "PublicIP": str(self.outer.get(4, "0.0.0.0")),
            "PublicIPv6": str(self.outer[6]) if 6 in self.versions else None,
            "BackendType": "vxlan",
            "BackendData": data.get(4),
            "BackendV6Data": data.get(6),
        }
        return {name: part for name, part in value.items() if part is not None or not name.startswith("Backend")}

    def _peers(self, version: int) -> Iterator[tuple[IPv4Network | IPv6Network, str, str]]:
        """Subnet, outer address and MAC of each other lease in etcd."""
        lines = self.lab.etcdctl("get", "--prefix", SUBNETS).stdout.splitlines()
        for key, text in zip(lines[::2], lines[1::2], strict=True):
            name = key.removeprefix(SUBNETS)
            if name != self._key():
                value = json.loads(text)
                subnets = [ip_network("/".join(part.rsplit("-", 1))) for part in name.split("&")]
                outer = value["PublicIP"] if version == 4 else value["PublicIPv6"]
                data = value["BackendData"] if version == 4 else value["BackendV6Data"]
                yield next(s for s in subnets if s.version == version), outer, data["VtepMAC"]

    def _ip(self, *commands: str) -> None:
        netns.configure(self.lab.namespace(self.node.name), commands)
