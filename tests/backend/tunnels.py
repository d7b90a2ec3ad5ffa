"""Owns small overlays of namespaces for the tests of userspace backends: nodes whose backend runs in this process,
nodes with a hand-made kernel VTEP, and a pod behind each.

Free of: leases in a store. Invariant: everything stands in namespaces of its own, which the caller closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from dataplane.backend.base import Backend, BackendStatus, Underlay
from dataplane.backend.peers import encode_vtep
from dataplane.kernel.netlink import Netlink
from dataplane.lease.model import Lease, LeaseAttrs, LeaseEvent, LeaseEventKind, LeaseKey
from tests.namespaces import Namespace, open_namespaces

NETWORKS: dict[int, IPv4Network | IPv6Network] = {4: IPv4Network("10.5.0.0/16"), 6: IPv6Network("fd00:5::/48")}
POD_MTU = 1430
MakeBackend = Callable[[Underlay, Netlink, Any], Backend]


@dataclass
class Node:
    """Number N has underlay address 198.18.0.N and fd00:198:18::N, subnets 10.5.N.0/24 and fd00:5:0:N::/64, and one
    pod."""

    number: int
    machine: Namespace
    pod: Namespace
    attrs: LeaseAttrs | None = None
    _loop: asyncio.AbstractEventLoop | None = field(default=None, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    backend: Any = None

    @property
    def address(self) -> IPv4Address:
        return IPv4Address("198.18.0.0") + self.number

    @property
    def address_v6(self) -> IPv6Address:
        return IPv6Address("fd00:198:18::") + self.number

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(IPv4Network(f"10.5.{self.number}.0/24"), IPv6Network(f"fd00:5:0:{self.number}::/64"))

    def pod_address(self, version: int) -> str:
        return f"10.5.{self.number}.2" if version == 4 else f"fd00:5:0:{self.number}::2"

    @property
    def lease(self) -> Lease:
        assert self.attrs is not None
        return Lease(self.key, self.attrs, self.number, self.number)

    @property
    def facing(self) -> Underlay:
        index = int(self.machine.command("cat", "/sys/class/net/eth0/ifindex").stdout)
        mtu = int(self.machine.command("cat", "/sys/class/net/eth0/mtu").stdout)
        return Underlay("eth0", index, self.address, self.address, mtu, self.address_v6, self.address_v6)

    # --- wiring -----------------------------------------------------------------------------------------------

    def plug_in(self, switch: Namespace) -> None:
        n = self.number
        switch.command("ip", "link", "add", f"n{n}", "type", "veth", "peer", "name", "eth0", "netns", self.machine.name)
        switch.command("ip", "link", "set", f"n{n}", "master", "br0", "up")
        for knob in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            self.machine.command("sysctl", "-qw", f"{knob}=1")
        self.machine.command("ip", "link", "set", "eth0", "up")
        self.machine.command("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.machine.command("ip", "address", "add", f"{self.address_v6}/64", "dev", "eth0", "nodad")

    def add_pod(self, mtu: int) -> None:
        n = self.number
        self.machine.command("ip", "link", "add", "cni0", "mtu", str(mtu), "type", "bridge")
        self.machine.command("ip", "address", "add", f"10.5.{n}.1/24", "dev", "cni0")
        self.machine.command("ip", "address", "add", f"fd00:5:0:{n}::1/64", "dev", "cni0", "nodad")
        self.machine.command("ip", "link", "set", "cni0", "up")
        made = ("type", "veth", "peer", "name", "eth0", "mtu", str(mtu), "netns", self.pod.name)
        self.machine.command("ip", "link", "add", "p1", "mtu", str(mtu), *made)
        self.machine.command("ip", "link", "set", "p1", "master", "cni0", "up")
        self.pod.command("ip", "address", "add", f"10.5.{n}.2/24", "dev", "eth0")
        self.pod.command("ip", "address", "add", f"fd00:5:0:{n}::2/64", "dev", "eth0", "nodad")
        self.pod.command("ip", "link", "set", "eth0", "up")
        self.pod.command("ip", "route", "add", "default", "via", f"10.5.{n}.1")
        self.pod.command("ip", "-6", "route", "add", "default", "via", f"fd00:5:0:{n}::1")

    # --- a backend of ours ------------------------------------------------------------------------------------

    def start(self, make: MakeBackend) -> None:
        """Prepare and attach a backend, on a loop of its own inside the machine."""
        ready = threading.Event()

        def live() -> None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._loop.call_soon(ready.set)
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=self.machine.run, args=(live,), daemon=True)
        self._thread.start()
        assert ready.wait(30)

        async def begin() -> None:
            self.netlink = await Netlink.open()
            self.backend = make(self.facing, self.netlink, self)
            self.attrs = await self.backend.prepare()
            await self.backend.attach(self.lease)

        self.ask(begin())

    def ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """Await something on the node's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(60)

    def learn(self, *others: Node, kind: LeaseEventKind = LeaseEventKind.ADDED) -> None:
        self.ask(self.backend.apply([LeaseEvent(kind, other.lease) for other in others]))

    def status(self) -> BackendStatus:
        async def look() -> BackendStatus:
            found: BackendStatus = self.backend.status()
            return found

        found: BackendStatus = self.ask(look())
        return found

    def drops(self) -> dict[str, int]:
        return {reason.name: count for reason, count in self.status().drops.items() if count}

    def stop(self) -> None:
        """Ordered, as the daemon does it. Safe to call twice."""
        if self._loop is None or self._thread is None:
            return

        async def end() -> None:
            if self.backend is not None:
                await self.backend.close()
            await self.netlink.close()

        try:
            self.ask(end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._loop = self._thread = None

    # --- a kernel VTEP made by hand ---------------------------------------------------------------------------

    def make_kernel_vtep(self, vni: int = 1) -> None:
        """As flannel makes it (facts 7.1), and the lease that it would put."""
        macs = {4: bytes((2, 4, 0, 0, 0, self.number)), 6: bytes((2, 6, 0, 0, 0, self.number))}
        for version, name, local in ((4, f"flannel.{vni}", self.address), (6, f"flannel-v6.{vni}", self.address_v6)):
            kind = ("type", "vxlan", "id", str(vni), "dstport", "8472", "local", str(local))
            mac = macs[version].hex(":")
            self.machine.command("ip", "link", "add", name, "address", mac, *kind, "dev", "eth0", "nolearning")
            own = f"{self.key.subnets[version // 2 - 2].network_address}/{32 if version == 4 else 128}"
            self.machine.command("ip", "address", "add", own, "dev", name, *(("nodad",) if version == 6 else ()))
            self.machine.command("ip", "link", "set", name, "up")
        self.attrs = LeaseAttrs(
            self.address, self.address_v6, "vxlan", encode_vtep(vni, macs[4]), encode_vtep(vni, macs[6])
        )

    def program(self, other: Node, vni: int = 1) -> None:
        """Neighbour, FDB and route for another node (facts 7.2)."""
        assert other.attrs is not None
        entries = (
            (f"flannel.{vni}", other.attrs.backend_data, other.key.subnets[0], other.address),
            (f"flannel-v6.{vni}", other.attrs.backend_v6_data, other.key.subnets[1], other.address_v6),
        )
        for device, data, subnet, address in entries:
            mac = data.decode().partition('"VtepMAC":"')[2][:17]
            first = str(subnet.network_address)
            self.machine.command("ip", "neigh", "replace", first, "lladdr", mac, "dev", device, "nud", "permanent")
            self.machine.command(
                "bridge", "fdb", "replace", mac, "dev", device, "dst", str(address), "self", "permanent"
            )
            family = "-4" if subnet.version == 4 else "-6"
            self.machine.command("ip", family, "route", "replace", str(subnet), "via", first, "dev", device, "onlink")


SERVE = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
tcp = socket.socket(family, socket.SOCK_STREAM)
tcp.bind((sys.argv[1], 5000)); tcp.listen(8)
udp = socket.socket(family, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)
udp.bind((sys.argv[1], 5001))
print("ready", flush=True)
import threading
def answer():
    while True:
        data, peer = udp.recvfrom(70000)
        udp.sendto(hashlib.sha256(data).digest() + len(data).to_bytes(4, "big"), peer)
threading.Thread(target=answer, daemon=True).start()
while True:
    connection, _ = tcp.accept()
    total = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    hash, got = hashlib.sha256(), 0
    while got < total:
        data = connection.recv(1 << 20)
        if not data:
            break
        got += len(data); hash.update(data)
    connection.sendall(hash.digest())
    connection.sendall(bytes(range(256)) * (total // 256))
    connection.close()
"""


class Service:
    """In a pod: TCP on 5000 hashes what comes, answers the hash, then sends as much back; UDP on 5001 answers each
    datagram's hash and length."""

    def __init__(self, node: Node, version: int) -> None:
        self._process = node.pod.spawn(sys.executable, "-c", SERVE, node.pod_address(version))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", self._process.communicate()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def tcp_roundtrip(source: Node, target: Node, version: int, size: int) -> None:
    """Both directions of one connection, byte for byte."""

    def talk() -> None:
        address = (target.pod_address(version), 5000)
        sent = random.Random(size).randbytes(1 << 16) * (size >> 16)
        with socket.create_connection(address, timeout=30) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, 13, b"cubic")
            connection.sendall(len(sent).to_bytes(8) + sent)
            assert connection.recv(32, socket.MSG_WAITALL) == hashlib.sha256(sent).digest()
            wanted = bytes(range(256)) * (len(sent) // 256)
            got = bytearray()
            while len(got) < len(wanted):
                data = connection.recv(1 << 20)
                assert data, "the connection ended early"
                got += data
            assert got == wanted

    source.pod.run(talk)


UDP_SEGMENT = 103


def udp_exchange(source: Node, target: Node, version: int, sizes: Sequence[int], *, segment: int = 0) -> None:
    """Each datagram of these sizes arrives whole and once. `segment`: sent as one superframe of that segment size."""

    def talk() -> None:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            udp.settimeout(15)
            udp.connect((target.pod_address(version), 5001))
            payloads = [os.urandom(size) for size in sizes]
            if segment:
                udp.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
                whole = b"".join(payloads)
                udp.send(whole)
                payloads = [whole[at : at + segment] for at in range(0, len(whole), segment)]
            expected = sorted(hashlib.sha256(p).digest() + len(p).to_bytes(4) for p in payloads)
            if not segment:
                for payload in payloads:
                    udp.send(payload)
            assert sorted(udp.recv(100) for _ in payloads) == expected

    source.pod.run(talk)


def ping(source: Node, target: Node, version: int, *options: str) -> subprocess.CompletedProcess[str]:
    argv = ("ping", f"-{version}", "-n", "-c", "2", "-i", "0.1", "-W", "2", *options, target.pod_address(version))
    return source.pod.command(*argv, check=False)


def wait_until(what: str, check: Callable[[], bool], seconds: float = 20.0) -> None:
    """Ask again until the answer is true; fails after a bound."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def overlay(count: int = 2) -> Iterator[tuple[list[Node], Namespace]]:
    """Nodes on one switch, each with a pod, without a backend yet."""
    with open_namespaces(2 * count + 1) as (switch, *places):
        switch.command("ip", "link", "add", "br0", "type", "bridge")
        switch.command("ip", "link", "set", "br0", "up")
        nodes = [Node(n + 1, places[2 * n], places[2 * n + 1]) for n in range(count)]
        try:
            for node in nodes:
                node.plug_in(switch)
                node.add_pod(POD_MTU)
            yield nodes, switch
        finally:
            for node in nodes:
                node.stop()


def carries_everything(one: Node, two: Node, version: int) -> None:
    with contextlib.ExitStack() as stack:
        for node in (one, two):
            stack.callback(Service(node, version).close)
        head = 28 if version == 4 else 48
        sizes = [1, 2, 18, 64, 500, POD_MTU - head - 1, POD_MTU - head]
        for source, target in ((one, two), (two, one)):
            assert ping(source, target, version).returncode == 0
            udp_exchange(source, target, version, sizes * 3)
            udp_exchange(source, target, version, [4000, 9000])  # fragments
            udp_exchange(source, target, version, [200] * 20, segment=200)
            udp_exchange(source, target, version, [1000] * 19 + [10], segment=1000)
            udp_exchange(source, target, version, [100, 50], segment=100)
            for size in (1 << 16, 20 << 20):
                tcp_roundtrip(source, target, version, size)
