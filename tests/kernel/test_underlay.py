"""UDP sockets of the underlay against the real kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.kernel.netlink import Netlink
from dataplane.kernel.underlay import BUFFER_BYTES, UdpSocket, open_udp, widen
from dataplane.path.capability import Capability
from tests.namespaces import Namespace, open_namespace

pytestmark = pytest.mark.netns

ADDRESS = IPv4Address("198.18.0.1")
IP_RECVERR = 11
IP_MTU_DISCOVER = 10
IP_PKTINFO = 8

HOLD = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
holder = socket.socket(family, socket.SOCK_DGRAM)
holder.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
time.sleep(600)
"""

OPEN = """
from dataplane.kernel.underlay import open_udp
from ipaddress import IPv4Address
from pathlib import Path
import sys
udp = open_udp(IPv4Address("198.18.0.1"), int(sys.argv[1]))
print(udp.receive_buffer, udp.send_buffer, *udp.notes, sep="\\n")
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        namespace.command("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        namespace.command("ip", "link", "set", "v0", "up")
        namespace.command("ip", "link", "set", "v1", "up")
        namespace.command("ip", "addr", "add", "198.18.0.1/24", "dev", "v0")
        namespace.command("ip", "addr", "add", "198.18.0.2/24", "dev", "v0")
        yield namespace


def links_of(ns: Namespace) -> tuple[Link, ...]:
    async def look() -> tuple[Link, ...]:
        netlink = await Netlink.open()
        try:
            return await netlink.links()
        finally:
            await netlink.close()

    return ns.run(asyncio.run, look())


def option(udp: UdpSocket, level: int, name: int) -> int:
    return udp.socket.getsockopt(level, name)


def test_the_socket_is_set_up_for_the_pumps(ns: Namespace) -> None:
    udp = ns.run(open_udp, ADDRESS, 8285)
    try:
        assert udp.socket.getsockname() == ("198.18.0.1", 8285)
        assert not os.get_blocking(udp.fd)
        assert not os.get_inheritable(udp.fd)
        assert option(udp, socket.IPPROTO_IP, IP_MTU_DISCOVER) == 1
        assert option(udp, socket.IPPROTO_IP, socket.IP_RECVTOS) == 1
        assert option(udp, socket.IPPROTO_IP, IP_PKTINFO) == 0
        assert option(udp, socket.IPPROTO_IP, IP_RECVERR) == 0
        assert option(udp, socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
        assert option(udp, socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        assert udp.receive_buffer == option(udp, socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * BUFFER_BYTES
        assert udp.send_buffer == option(udp, socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * BUFFER_BYTES
        assert udp.notes == ()
    finally:
        udp.close()
        udp.close()
    assert udp.fd == -1


def test_each_datagram_comes_with_its_tos(ns: Namespace) -> None:
    udp = ns.run(open_udp, ADDRESS, 8285)
    sender = ns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB9)
        sender.sendto(b"x", ("198.18.0.1", 8285))
        udp.socket.settimeout(10)
        data, control, _, _ = udp.socket.recvmsg(64, 64)
        assert data == b"x"
        assert control == [(socket.IPPROTO_IP, socket.IP_TOS, b"\xb9")]
    udp.close()


def test_a_dead_peer_does_not_fail_the_next_send(ns: Namespace) -> None:
    udp = ns.run(open_udp, ADDRESS, 8285)
    for _ in range(20):  # nobody listens on 198.18.0.2:8285; the ICMP comes at once on one node
        assert udp.socket.sendto(b"x", ("198.18.0.2", 8285)) == 1
    udp.close()


def test_without_the_privilege_the_buffer_is_what_the_sysctl_allows_and_that_is_told(ns: Namespace) -> None:
    process = ns.spawn_python(OPEN, "8285", dropped=("net_admin",))
    stdout, _ = process.communicate(timeout=60)
    received, sent, *notes = stdout.splitlines()
    for granted, note, word, knob in zip(
        (received, sent), notes, ("receive", "send"), ("rmem_max", "wmem_max"), strict=True
    ):
        limit = int(ns.command("sysctl", "-n", f"net.core.{knob}").stdout)
        assert int(granted) == 2 * limit < 2 * BUFFER_BYTES
        assert note == (
            f"the {word} buffer of UDP 198.18.0.1:8285 is {granted} bytes, not {2 * BUFFER_BYTES}: "
            f"raise sysctl net.core.{knob}"
        )


@pytest.mark.parametrize("bound", ["198.18.0.1", "0.0.0.0", "::", "::ffff:198.18.0.1"])
def test_a_port_that_a_process_holds(ns: Namespace, bound: str) -> None:
    holders = []
    for address in ("198.18.0.2", bound) if bound == "198.18.0.1" else (bound,):
        holders.append(ns.spawn_python(HOLD, address, "8285"))
        stdout = holders[-1].stdout
        assert stdout is not None
        assert stdout.readline() == "ready\n"
    with pytest.raises(
        KernelError,
        match=rf"cannot bind UDP 198\.18\.0\.1:8285: process python\S* \(pid {holders[-1].pid}\) holds it",
    ) as caught:
        ns.run(open_udp, ADDRESS, 8285)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRINUSE
    for holder in holders:
        holder.kill()
        holder.wait(timeout=30)
    ns.run(open_udp, ADDRESS, 8285).close()


def test_a_port_that_a_kernel_vxlan_device_holds(ns: Namespace) -> None:
    ns.command("ip", "link", "add", "down", "type", "vxlan", "id", "3", "dstport", "8472", "dev", "v0")
    for vni, port in ((1, "8472"), (2, "4789")):
        name = f"flannel.{vni}"
        ns.command("ip", "link", "add", name, "type", "vxlan", "id", str(vni), "dstport", port, "dev", "v0")
        ns.command("ip", "link", "set", name, "up")
    with pytest.raises(
        KernelError, match=r"cannot bind UDP 198\.18\.0\.1:8472: the kernel vxlan device flannel\.1 holds it"
    ):
        ns.run(open_udp, ADDRESS, 8472, links=links_of(ns))
    with pytest.raises(KernelError, match=r"such as vxlan\), holds it"):
        ns.run(open_udp, ADDRESS, 8472)
    ns.command("ip", "link", "set", "flannel.1", "down")
    ns.run(open_udp, ADDRESS, 8472).close()


def test_our_own_socket_stops_a_second_one(ns: Namespace) -> None:
    udp = ns.run(open_udp, ADDRESS, 8285)
    with pytest.raises(KernelError, match=rf"\(pid {os.getpid()}\) holds it"):
        ns.run(open_udp, ADDRESS, 8285)
    other = ns.run(open_udp, IPv4Address("198.18.0.2"), 8285)
    udp.close()
    other.close()


def test_an_address_that_the_node_does_not_have(ns: Namespace) -> None:
    with pytest.raises(
        KernelError, match=r"cannot bind UDP 198\.18\.9\.9:8285: 198\.18\.9\.9 is not an address of v0"
    ):
        ns.run(open_udp, IPv4Address("198.18.9.9"), 8285, interface="v0")
    with pytest.raises(KernelError, match="is not an address of any interface of this node"):
        ns.run(open_udp, IPv4Address("198.18.9.9"), 8285)


def test_a_port_below_1024_without_the_privilege(ns: Namespace) -> None:
    process = ns.spawn_python(OPEN, "285", dropped=("net_admin", "net_bind_service"))
    _, stderr = process.communicate(timeout=60)
    assert "cannot bind UDP 198.18.0.1:285: Permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE" in stderr


# --- several sockets that share a port ------------------------------------------------------------------------


def test_widened_sockets_share_the_port_and_keep_each_outer_source_to_one(ns: Namespace) -> None:
    first = ns.run(open_udp, ADDRESS, 8285, wanted=[Capability.UDP_GRO])
    with contextlib.ExitStack() as stack:
        stack.callback(first.close)
        with ns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as early:
            early.sendto(b"early", (str(ADDRESS), 8285))
        further = ns.run(widen, first, 3)
        for each in further:
            stack.callback(each.close)
            assert each.socket.getsockname() == first.socket.getsockname()
            assert not os.get_blocking(each.fd)
            assert not os.get_inheritable(each.fd)
            assert (each.granted, option(each, socket.IPPROTO_UDP, 104)) == (first.granted, 1)
            assert option(each, socket.SOL_SOCKET, socket.SO_RCVBUF) == first.receive_buffer
        used = set[int]()
        for _ in range(40):
            with ns.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for number in range(5):
                    sender.sendto(bytes((number,)), (str(ADDRESS), 8285))
            got = [datagrams_at(each) for each in (first, *further)]
            assert sorted(got) == [[], [], [], [bytes((number,)) for number in range(5)]], "what came early is gone"
            used.add(max(range(4), key=lambda at: len(got[at])))
        assert used == {0, 1, 2, 3}, "40 outer sources use every socket"
        with pytest.raises(KernelError, match=rf"\(pid {os.getpid()}\) holds it"):
            ns.run(open_udp, ADDRESS, 8285)


def datagrams_at(udp: UdpSocket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(udp.socket.recv(100))
    return found


def test_a_port_that_cannot_be_shared_leaves_no_socket_behind(ns: Namespace) -> None:
    first = ns.run(open_udp, ADDRESS, 8285)
    ns.command("ip", "addr", "del", "198.18.0.1/24", "dev", "v0")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KernelError, match=r"cannot share UDP 198\.18\.0\.1:8285 among 3 sockets: "):
        ns.run(widen, first, 2)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    first.close()
