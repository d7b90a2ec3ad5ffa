"""TUN devices against the real kernel: made, adopted after a kill, released, refused."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import select
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from dataplane.errors import KernelError
from dataplane.kernel.facts import Link
from dataplane.kernel.netlink import Netlink
from dataplane.kernel.tun import VNET_HDR_BYTES, Tun, leftovers, open_tun, release
from tests.kernel.holding import hold
from tests.namespaces import Namespace, open_namespace

HOLD = """
import sys, time
from dataplane.kernel.tun import open_tun
tun = open_tun(adopt=sys.argv[1])
print(tun.name, tun.adopted, flush=True)
time.sleep(600)
"""


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with open_namespace() as namespace:
        yield namespace


def details(ns: Namespace, name: str) -> dict[str, Any]:
    """What the kernel says of a TUN device, by iproute2."""
    (link,) = json.loads(ns.command("ip", "-d", "-j", "link", "show", name).stdout)
    data: dict[str, Any] = link["linkinfo"]["info_data"]
    return data | {"ifindex": link["ifindex"]}


def names(ns: Namespace) -> set[str]:
    return {link["ifname"] for link in json.loads(ns.command("ip", "-j", "link").stdout)} - {"lo"}


@pytest.mark.netns
def test_a_new_device_is_the_first_free_one_and_has_our_flags(ns: Namespace) -> None:
    ns.command("ip", "link", "add", "flannel0", "type", "veth", "peer", "name", "v1")
    first, second = ns.run(open_tun), ns.run(open_tun)
    try:
        assert (first.name, first.adopted) == ("flannel1", False)
        assert (second.name, second.adopted) == ("flannel2", False)
        seen = details(ns, "flannel1")
        assert (seen["type"], seen["pi"], seen["vnet_hdr"], seen["persist"]) == ("tun", False, True, True)
        assert not os.get_blocking(first.fd)
        assert not os.get_inheritable(first.fd)
    finally:
        release(first)
        release(second)
    assert names(ns) == {"flannel0", "v1"}


@pytest.mark.netns
def test_packets_carry_a_virtio_header_of_ten_bytes(ns: Namespace) -> None:
    tun = ns.run(open_tun)
    try:
        ns.command("sysctl", "-qw", f"net.ipv6.conf.{tun.name}.disable_ipv6=1")
        ns.command("ip", "addr", "add", "10.5.1.0/32", "dev", tun.name)
        ns.command("ip", "link", "set", tun.name, "up")
        ns.command("ip", "route", "add", "10.5.0.0/16", "dev", tun.name)
        with pytest.raises(BlockingIOError):
            os.read(tun.fd, 2048)
        ns.command("ping", "-c1", "-W1", "-s", "32", "10.5.2.1", check=False)
        assert select.select([tun.fd], [], [], 10)[0]
        packet = os.read(tun.fd, 2048)
        assert len(packet) == VNET_HDR_BYTES + 20 + 8 + 32
        assert packet[:VNET_HDR_BYTES] == bytes(VNET_HDR_BYTES)
        assert packet[VNET_HDR_BYTES] == 0x45
        assert packet[VNET_HDR_BYTES + 16 : VNET_HDR_BYTES + 20] == bytes([10, 5, 2, 1])
    finally:
        release(tun)


@pytest.mark.netns
def test_a_kill_leaves_device_address_and_route_and_the_next_start_adopts_them(ns: Namespace) -> None:
    process, printed = hold(ns, HOLD)
    assert printed == "flannel0 False"
    ns.command("ip", "addr", "add", "10.5.1.0/32", "dev", "flannel0")
    ns.command("ip", "link", "set", "flannel0", "up", "mtu", "1472")
    ns.command("ip", "route", "add", "10.5.0.0/16", "dev", "flannel0")
    before = details(ns, "flannel0")["ifindex"]
    process.kill()
    process.wait(timeout=30)
    assert "10.5.0.0/16 dev flannel0" in ns.command("ip", "route").stdout

    for _ in range(2):  # also after a second kill
        process, printed = hold(ns, HOLD, "flannel0")
        assert printed == "flannel0 True"
        assert details(ns, "flannel0")["ifindex"] == before
        assert "linkdown" not in ns.command("ip", "route").stdout
        process.kill()
        process.wait(timeout=30)

    tun = ns.run(open_tun, adopt="flannel0")
    assert (tun.name, tun.adopted) == ("flannel0", True)
    assert "10.5.1.0/32" in ns.command("ip", "addr").stdout
    release(tun)
    release(tun)
    assert names(ns) == set()
    assert ns.command("ip", "route").stdout == ""


@pytest.mark.netns
@pytest.mark.parametrize("flags", [(), ("pi",), ("vnet_hdr",), ("pi", "vnet_hdr")])
def test_an_adopted_device_gets_our_flags(ns: Namespace, flags: tuple[str, ...]) -> None:
    ns.command("ip", "tuntap", "add", "dev", "flannel0", "mode", "tun", *flags)
    index = details(ns, "flannel0")["ifindex"]
    tun = ns.run(open_tun, adopt="flannel0")
    try:
        assert tun.adopted
        seen = details(ns, "flannel0")
        assert (seen["pi"], seen["vnet_hdr"], seen["ifindex"]) == (False, True, index)
    finally:
        release(tun)
    assert names(ns) == set()


@pytest.mark.netns
def test_a_device_of_several_queues_is_made_anew_under_its_name(ns: Namespace) -> None:
    ns.command("ip", "tuntap", "add", "dev", "flannel7", "mode", "tun", "multi_queue")
    index = details(ns, "flannel7")["ifindex"]
    tun = ns.run(open_tun, adopt="flannel7")
    try:
        assert (tun.name, tun.adopted) == ("flannel7", False)
        seen = details(ns, "flannel7")
        assert seen["ifindex"] != index
        assert not seen["multi_queue"]
    finally:
        release(tun)


@pytest.mark.netns
def test_a_queue_that_another_process_holds_is_left_to_it(ns: Namespace) -> None:
    ns.command("ip", "tuntap", "add", "dev", "flannel7", "mode", "tun", "multi_queue")
    code = """
import fcntl, os, struct, time
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"flannel7", 0x1101))
print("ready", flush=True)
time.sleep(600)
"""
    process = ns.spawn_python(code)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(KernelError, match=rf"cannot adopt device flannel7: process python\S* \(pid {process.pid}\)"):
        ns.run(open_tun, adopt="flannel7")
    seen = details(ns, "flannel7")
    assert (seen["numqueues"], seen["persist"]) == (1, True)


@pytest.mark.netns
@pytest.mark.parametrize("kind", ["tap", "veth", "nothing"])
def test_what_is_no_tun_device_is_left_alone(ns: Namespace, kind: str) -> None:
    if kind == "tap":
        ns.command("ip", "tuntap", "add", "dev", "flannel0", "mode", "tap")
    if kind == "veth":
        ns.command("ip", "link", "add", "flannel0", "type", "veth", "peer", "name", "v1")
    before = names(ns)
    tun = ns.run(open_tun, adopt="flannel0")
    try:
        assert (tun.name, tun.adopted) == ("flannel0" if kind == "nothing" else "flannel1", False)
    finally:
        release(tun)
    assert names(ns) == before


@pytest.mark.netns
def test_a_device_that_another_process_holds_is_refused_with_its_name(ns: Namespace) -> None:
    process, _ = hold(ns, HOLD)
    with open_namespace() as elsewhere:
        hold(elsewhere, HOLD)  # holds a flannel0 too, but not ours
        with pytest.raises(
            KernelError, match=rf"cannot adopt device flannel0: process python\S* \(pid {process.pid}\) holds it"
        ):
            ns.run(open_tun, adopt="flannel0")
    assert names(ns) == {"flannel0"}
    assert details(ns, "flannel0")["persist"]


@pytest.mark.netns
def test_a_fixed_name_is_never_taken_over_unasked(ns: Namespace) -> None:
    ns.command("ip", "tuntap", "add", "dev", "flannel.1", "mode", "tun")
    with pytest.raises(KernelError, match=r"cannot make TUN device flannel\.1: "):
        ns.run(open_tun, "flannel.1")
    tun = ns.run(open_tun, "flannel.1", adopt="flannel.1")
    assert tun.adopted
    release(tun)


@pytest.mark.netns
def test_release_of_a_device_that_was_removed_closes_the_descriptor(ns: Namespace) -> None:
    tun = ns.run(open_tun)
    ns.command("ip", "link", "del", tun.name)
    release(tun)
    with pytest.raises(OSError) as caught:
        os.fstat(tun.fd)
    assert caught.value.errno == errno.EBADF


def test_release_leaves_a_reused_descriptor_alone() -> None:
    reader, writer = os.pipe()
    release(Tun(reader, "flannel0", adopted=False))
    assert os.write(writer, b"x") == len(os.read(reader, 8))
    os.close(reader)
    os.close(writer)
    release(Tun(reader, "flannel0", adopted=False))


@pytest.mark.netns
def test_without_the_driver_or_the_privilege_the_error_says_what_to_do(ns: Namespace) -> None:
    _, stderr = ns.spawn_python(HOLD, "", hidden=("/dev/net",)).communicate(timeout=60)
    assert "cannot make TUN device flannel%d: /dev/net/tun: No such file or directory" in stderr
    assert "`modprobe tun`" in stderr
    _, stderr = ns.spawn_python(HOLD, "", dropped=("net_admin",)).communicate(timeout=60)
    assert "cannot make TUN device flannel%d: Operation not permitted; run as root or with CAP_NET_ADMIN" in stderr
    assert names(ns) == set()


@pytest.mark.netns
def test_the_kernel_keeps_header_and_offloads_of_the_last_holder_until_we_attach(ns: Namespace) -> None:
    """A device of a holder that had offloads on and longer headers comes to us with neither."""
    code = """
import fcntl, os, struct
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"flannel0", 0x5001))
fcntl.ioctl(fd, 0x400454D8, struct.pack("i", 12))
fcntl.ioctl(fd, 0x400454D0, 0x1 | 0x2)
fcntl.ioctl(fd, 0x400454CB, 1)
"""
    _, stderr = ns.spawn_python(code).communicate(timeout=60)
    assert stderr == ""
    assert "tx-tcp-segmentation: on" in ns.command("ethtool", "-k", "flannel0").stdout
    tun = ns.run(open_tun, adopt="flannel0")
    try:
        size = struct.unpack("i", fcntl.ioctl(tun.fd, 0x800454D7, bytes(4)))[0]  # TUNGETVNETHDRSZ
        assert size == VNET_HDR_BYTES
        assert "tx-tcp-segmentation: off" in ns.command("ethtool", "-k", "flannel0").stdout
    finally:
        release(tun)


def a_link(name: str, kind: str = "tun", carrier: bool = False, address: str = "") -> Link:
    return Link(2, name, kind, 1500, True, carrier, address)


def test_leftovers_are_unheld_tun_devices_of_flannels_name() -> None:
    links = [
        a_link("flannel0"),
        a_link("flannel1", carrier=True),
        a_link("flannel2", kind="veth"),
        a_link("flannel3", address="02:00:00:00:00:01"),
        a_link("flannel.4"),
        a_link("flannel-v6.4"),
        a_link("flannel.5", kind="vxlan"),
        a_link("flannel-v7.4"),
        a_link("flannel"),
        a_link("xflannel5"),
        a_link("flannel16"),
    ]
    assert leftovers(links) == ["flannel0", "flannel.4", "flannel-v6.4", "flannel16"]


@pytest.mark.netns
def test_leftovers_as_the_kernel_tells_them(ns: Namespace) -> None:
    async def look() -> set[str]:
        netlink = await Netlink.open()
        try:
            return set(leftovers(await netlink.links()))
        finally:
            await netlink.close()

    process, _ = hold(ns, HOLD)  # a device that is down and held is nobody's leftover
    ns.command("ip", "tuntap", "add", "dev", "flannel8", "mode", "tun")
    ns.command("ip", "tuntap", "add", "dev", "flannel9", "mode", "tap")
    assert ns.run(asyncio.run, look()) == {"flannel8"}
    ns.command("ip", "link", "set", "flannel0", "up")
    assert ns.run(asyncio.run, look()) == {"flannel8"}
    process.kill()
    process.wait(timeout=30)
    assert ns.run(asyncio.run, look()) == {"flannel0", "flannel8"}
