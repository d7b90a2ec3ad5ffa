"""What the pumps make of each packet, from memory to memory (rig.py)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network

import pytest
from scapy.layers.inet import IP

from dataplane.errors import DropReason
from dataplane.kernel import underlay
from dataplane.path import datapath, superframe, wire
from dataplane.path.capability import EVERYTHING, Capability
from dataplane.path.facts import Outer, PathEvent, PathEventKind, SourceCheck
from tests.namespaces import open_namespace
from tests.path.rig import HEADER, LOCAL, OURS, PEER, THEIRS, Rig, packet, running, tcp_superframe


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async for made in running(SourceCheck.NODE):
        yield made


async def test_a_packet_leaves_as_it_is_in_a_datagram(rig: Rig) -> None:
    sent = packet("10.5.1.2", "10.5.2.9")
    rig.send_from_pod(sent)
    datagram, source = rig.peer.recvfrom(70000)
    assert datagram == sent
    assert source == (str(LOCAL), rig.port)


async def test_a_datagram_arrives_as_it_is_at_the_pod(rig: Rig) -> None:
    sent = packet("10.5.2.9", "10.5.1.2")
    rig.send_from_peer(sent)
    assert rig.read_at_pod() == sent


@pytest.mark.parametrize("size", [20, 21, 1472, 9000, 65507])
async def test_every_size_passes_both_ways(rig: Rig, size: int) -> None:
    """65,507 bytes is the most that a datagram holds; what is longer than the TUN's MTU is delivered whole."""
    header = bytes(IP(src="10.5.2.9", dst="10.5.1.2", len=size, proto=253))
    sent = header + os.urandom(size - 20)
    rig.send_from_peer(sent)
    assert rig.read_at_pod() == sent
    back = bytes(IP(src="10.5.1.2", dst="10.5.2.9", len=size, proto=253)) + sent[20:]
    rig.send_from_pod(back)
    assert rig.peer.recv(70000) == back


async def test_bytes_behind_the_inner_packet_are_trimmed(rig: Rig) -> None:
    sent = packet("10.5.2.9", "10.5.1.2")
    rig.send_from_peer(sent + bytes(7))
    assert rig.read_at_pod() == sent


async def test_counters_are_exact(rig: Rig) -> None:
    out, back = packet("10.5.1.2", "10.5.2.9", b"x" * 100), packet("10.5.2.9", "10.5.1.2", b"y" * 50)
    for _ in range(7):
        rig.send_from_pod(out)
        rig.peer.recv(70000)
    for _ in range(5):
        rig.send_from_peer(back)
        rig.read_at_pod()
    await asyncio.sleep(0.1)
    statistics = rig.path.statistics()
    (route,) = statistics.routes
    assert (route.subnet, route.address) == (THEIRS, PEER)
    assert (route.tx_packets, route.tx_bytes) == (7, 7 * len(out))
    assert (route.rx_packets, route.rx_bytes) == (5, 5 * len(back))
    assert route.tx_last > 0
    assert route.rx_last > 0
    assert (statistics.tx["packets"], statistics.rx["packets"]) == (7, 5)
    assert not rig.drops()


def unreachable_answers(lost: list[bytes]) -> tuple[list[bytes], dict[DropReason, int], int]:
    """Send packets that no lease covers; run this inside a namespace, where the pod's address is our own."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    listener.setblocking(False)

    async def scenario() -> tuple[dict[DropReason, int], int]:
        async for rig in running(SourceCheck.NODE, underlay.open_icmp()):
            for each in lost:
                rig.send_from_pod(each)
            await rig.until(drops={DropReason.NO_ROUTE: len(lost)})
            return rig.drops(), rig.path.statistics().tx["icmp_errors"]
        raise AssertionError

    drops, errors = asyncio.run(scenario())
    answers = []
    with contextlib.suppress(BlockingIOError), listener:
        while True:
            answers.append(listener.recv(2000))
    return answers, drops, errors


def without_id(answer: bytes) -> bytes:
    """A raw socket's packet without the identification that the kernel gives it, and its checksum."""
    return answer[:4] + b"\0\0" + answer[6:10] + b"\0\0" + answer[12:]


@pytest.mark.netns
def test_no_route_is_answered_with_net_unreachable() -> None:
    lost = packet("10.5.1.2", "10.5.77.1")
    with open_namespace() as node:
        node.command("ip", "address", "add", "10.5.1.2/24", "dev", "lo")
        node.command("ip", "address", "add", f"{OURS.network_address}/32", "dev", "lo")
        answers, drops, errors = node.run(unreachable_answers, [lost])
    expected = wire.icmp_error(OURS.network_address, lost)
    assert expected is not None
    assert [without_id(answer) for answer in answers] == [without_id(expected)]
    assert (drops, errors) == ({DropReason.NO_ROUTE: 1}, 1)


@pytest.mark.netns
def test_icmp_errors_are_rate_limited() -> None:
    with open_namespace() as node:
        node.command("ip", "address", "add", "10.5.1.2/24", "dev", "lo")
        answers, _, errors = node.run(unreachable_answers, [packet("10.5.1.2", "10.5.77.1")] * 400)
    assert 1 <= errors < 400
    assert len(answers) == errors


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", DropReason.NOT_IP),
        (b"E", DropReason.NOT_IP),
        (b"hello, world: this is no packet", DropReason.NOT_IP),
        (packet("10.5.2.9", "10.5.1.2")[:-1], DropReason.LENGTH),
        (b"\x44" + packet("10.5.2.9", "10.5.1.2")[1:], DropReason.NOT_IP),
        (b"\x4f" + packet("10.5.2.9", "10.5.1.2", b"")[1:], DropReason.LENGTH),
        (b"\x60" + bytes(38), DropReason.NOT_IP),
        (b"\x60\0\0\0\0\x15" + bytes(54), DropReason.LENGTH),
        (b"\x60" + bytes(60), DropReason.SPOOFED_SOURCE),
        (packet("10.5.3.9", "10.5.1.2"), DropReason.SPOOFED_SOURCE),
        (packet("10.5.1.9", "10.5.1.2"), DropReason.SPOOFED_SOURCE),
    ],
)
async def test_a_bad_datagram_is_one_counted_drop_and_nothing_else(
    rig: Rig, datagram: bytes, reason: DropReason
) -> None:
    good = packet("10.5.2.9", "10.5.1.2")
    rig.send_from_peer(datagram)
    rig.send_from_peer(good)
    assert rig.read_at_pod() == good
    assert rig.drops() == {reason: 1}


async def test_a_stranger_is_dropped_counted_and_named(rig: Rig) -> None:
    stranger = rig.node(IPv4Address("127.0.0.3"))
    for _ in range(10):
        rig.send_from_peer(packet("10.5.2.9", "10.5.1.2"), stranger)
    await rig.until(drops={DropReason.UNKNOWN_PEER: 10})
    stranger.close()
    await asyncio.sleep(0.05)
    assert rig.events == [PathEvent(PathEventKind.UNKNOWN_SOURCE, IPv4Address("127.0.0.3"), 1)]


async def test_a_node_may_use_its_public_ip_unless_the_check_is_strict() -> None:
    from_host = packet(str(PEER), "10.5.1.2")
    async for rig in running(SourceCheck.NODE):
        rig.send_from_peer(from_host)
        assert rig.read_at_pod() == from_host
    async for rig in running(SourceCheck.STRICT):
        rig.send_from_peer(from_host)
        await rig.until(drops={DropReason.SPOOFED_SOURCE: 1})


async def test_without_a_check_anybody_may_send_anything() -> None:
    async for rig in running(SourceCheck.OFF):
        stranger = rig.node(IPv4Address("127.0.0.3"))
        rig.send_from_peer(packet("1.2.3.4", "10.5.1.2"), stranger)
        assert rig.read_at_pod() == packet("1.2.3.4", "10.5.1.2")
        stranger.close()


async def test_two_subnets_of_one_node_are_both_its_own(rig: Rig) -> None:
    rig.path.set_route(IPv4Network("10.5.3.0/24"), PEER)
    rig.path.publish()
    for source in ("10.5.2.9", "10.5.3.9"):
        rig.send_from_peer(packet(source, "10.5.1.2"))
        assert rig.read_at_pod() == packet(source, "10.5.1.2")


async def test_longest_prefix_wins_and_changes_follow(rig: Rig) -> None:
    other = rig.node(IPv4Address("127.0.0.3"))
    rig.path.set_route(IPv4Network("10.5.2.128/25"), IPv4Address("127.0.0.3"))
    rig.path.publish()
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.200"))
    assert other.recv(70000) == packet("10.5.1.2", "10.5.2.200")
    rig.path.remove_route(IPv4Network("10.5.2.128/25"))
    rig.path.publish()
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.200"))
    assert rig.peer.recv(70000) == packet("10.5.1.2", "10.5.2.200")
    other.close()


async def test_changes_are_published_by_themselves(rig: Rig) -> None:
    rig.path.remove_route(THEIRS)
    await asyncio.sleep(datapath.GATHER_SECONDS * 5)
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    await rig.until(drops={DropReason.NO_ROUTE: 1})


async def test_after_a_quiet_time_changes_are_published_at_once_and_the_next_ones_are_gathered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.sleep(datapath.GATHER_SECONDS * 2)
    monkeypatch.setattr(datapath, "GATHER_SECONDS", 3600.0)
    rig.path.remove_route(THEIRS)
    await asyncio.sleep(0.05)
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    await rig.until(drops={DropReason.NO_ROUTE: 1})
    rig.path.set_route(THEIRS, PEER)
    await asyncio.sleep(0.05)
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    await rig.until(drops={DropReason.NO_ROUTE: 2})
    rig.path.publish()
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    assert rig.peer.recv(70000) == packet("10.5.1.2", "10.5.2.9")


async def test_a_slot_is_used_again_with_its_counters_at_zero(rig: Rig) -> None:
    rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
    rig.peer.recv(70000)
    rig.path.remove_route(THEIRS)
    rig.path.publish()
    await asyncio.sleep(datapath.SWEEP_SECONDS * 1.5)
    rig.path.set_route(IPv4Network("10.5.4.0/24"), PEER)
    rig.path.publish()
    (route,) = rig.path.statistics().routes
    assert route.tx_packets == 0
    assert {route.slot for _, route in rig.path._routes} == {0}


async def test_a_datagram_that_the_kernel_refuses_costs_only_itself(rig: Rig) -> None:
    """255.255.255.255 needs SO_BROADCAST: the kernel answers EACCES for it, in the middle of a batch."""
    rig.path.set_route(IPv4Network("10.5.9.0/24"), IPv4Address("255.255.255.255"))
    rig.path.publish()
    for _ in range(3):
        rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
        rig.send_from_pod(packet("10.5.1.2", "10.5.9.9"))
    for _ in range(3):
        assert rig.peer.recv(70000) == packet("10.5.1.2", "10.5.2.9")
    await rig.until(drops={DropReason.SEND_FAILED: 3})
    await asyncio.sleep(0.05)
    assert {event.kind for event in rig.events} == {PathEventKind.SEND_FAILED}
    assert {event.address for event in rig.events} == {IPv4Address("255.255.255.255")}


async def test_packets_pass_while_a_thread_holds_the_gil(rig: Rig) -> None:
    """The pumps never take the GIL: what was sent while nobody could run Python has crossed when it is let go."""
    for _ in range(8):
        rig.send_from_pod(packet("10.5.1.2", "10.5.2.9"))
        rig.peer.recv(70000)
    for _ in range(100):
        if rig.path.statistics().tx["packets"] == 8:  # counted after the send that the peer has seen
            break
        await asyncio.sleep(0.01)
    libc = ctypes.PyDLL(None)  # PyDLL keeps the GIL during the call
    raw = socket.socket(fileno=os.dup(rig.pods.fileno()))
    message = HEADER + packet("10.5.1.2", "10.5.2.9")
    libc.send(raw.fileno(), message, len(message), 0)
    libc.usleep(200_000)
    assert rig.path.statistics().tx["packets"] == 9
    raw.close()


async def test_publishing_under_traffic_loses_nothing(rig: Rig) -> None:
    count = 3000
    received = list[bytes]()

    def collect() -> None:
        received.extend(rig.peer.recv(70000) for _ in range(count))

    collector = threading.Thread(target=collect)
    collector.start()
    for i in range(count):
        rig.send_from_pod(packet("10.5.1.2", "10.5.2.9", i.to_bytes(4)))
        if i % 3 == 0:
            rig.path.set_route(IPv4Network((0x0A640000 + (i << 8), 24)), PEER)
            rig.path.publish()
        if i % 50 == 0:
            await asyncio.sleep(0.005)
    collector.join(10)
    assert [int.from_bytes(datagram[28:32]) for datagram in received] == list(range(count))
    assert not rig.drops()


async def test_stop_is_quick_idempotent_and_leaves_no_thread() -> None:
    made = Rig(SourceCheck.NODE)
    made.path.start()
    before = time.monotonic()
    await made.path.stop()
    await made.path.stop()
    assert time.monotonic() - before < datapath.STOP_SECONDS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loden-tx", "loden-rx"))]
    await made.close()


# --- runs and superframes -------------------------------------------------------------------------------------


@pytest.fixture
async def fast() -> AsyncIterator[Rig]:
    made = Rig(capabilities=EVERYTHING)
    made.path.set_route(THEIRS, PEER)
    yield made
    await made.close()


def numbered(count: int, size: int = 100) -> list[bytes]:
    return [packet("10.5.1.2", "10.5.2.9", i.to_bytes(4) + bytes(size - 4)) for i in range(count)]


async def test_packets_that_wait_leave_in_one_run(fast: Rig) -> None:
    """The queue of the stand-in TUN holds more than ten packets before the pump starts."""
    sent = numbered(10)
    for each in sent:
        fast.send_from_pod(each)
    fast.path.start()
    assert [fast.peer.recv(70000) for _ in sent] == sent
    await asyncio.sleep(0.05)
    tx = fast.path.statistics().tx
    assert (tx["packets"], tx["messages"]) == (10, 1)


async def test_runs_keep_the_order_of_each_peer_and_one_size(fast: Rig) -> None:
    other = fast.node(IPv4Address("127.0.0.3"))
    fast.path.set_route(IPv4Network("10.5.3.0/24"), IPv4Address("127.0.0.3"))
    here = [packet("10.5.1.2", "10.5.2.9", bytes([i]) * size) for i, size in enumerate([50, 50, 20, 50, 60, 60, 1])]
    there = [packet("10.5.1.2", "10.5.3.9", bytes([i]) * size) for i, size in enumerate([50, 50, 50, 9, 9, 9, 9])]
    for one, two in zip(here, there, strict=True):
        fast.send_from_pod(one)
        fast.send_from_pod(two)
    fast.path.start()
    assert [fast.peer.recv(70000) for _ in here] == here
    assert [other.recv(70000) for _ in there] == there
    other.close()
    await asyncio.sleep(0.05)
    # here: 50 50 20 | 50 | 60 60 1; there: 50 50 50 9 | 9 9 9
    assert fast.path.statistics().tx["messages"] == 5


async def test_a_run_that_the_kernel_refuses_goes_out_once_and_in_order(fast: Rig) -> None:
    """Without checksums the kernel cuts nothing: EINVAL for every run (net/ipv4/udp.c, udp_send_skb)."""
    fast._udp.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK
    sent = numbered(10)
    for each in sent:
        fast.send_from_pod(each)
    fast.path.start()
    assert [fast.peer.recv(70000) for _ in sent] == sent
    for each in sent:
        fast.send_from_pod(each)
    assert [fast.peer.recv(70000) for _ in sent] == sent
    await asyncio.sleep(0.05)
    assert [(event.kind, event.value) for event in fast.events] == [
        (PathEventKind.CAPABILITY_LOST, Capability.UDP_SEGMENT)
    ]
    assert not fast.drops()
    assert fast.path.statistics().tx["packets"] == 20


@pytest.mark.parametrize(
    ("size", "segment"), [(1, 1400), (3000, 1000), (3001, 1000), (65000, 1432), (5000, 1), (60000, 88)]
)
async def test_a_superframe_is_cut_into_its_segments(fast: Rig, size: int, segment: int) -> None:
    """Also into more segments than one run, or all of them, hold."""
    header, whole = tcp_superframe(size, segment)
    fast.peer.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    fast.path.start()
    fast.pods.send(header.encode() + whole)
    expected = superframe.segments(header, whole)
    assert expected is not None
    assert [fast.peer.recv(70000) for _ in expected] == expected
    assert not fast.drops()


async def test_superframes_in_a_row_share_their_runs(fast: Rig) -> None:
    """45 segments, runs of 44: the last one of each superframe opens a run, which the following superframe fills."""
    header, whole = tcp_superframe(45 * 1432, 1432)
    fast.peer.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
    for _ in range(3):
        fast.pods.send(header.encode() + whole)
    fast.path.start()
    expected = superframe.segments(header, whole)
    assert expected is not None
    assert [fast.peer.recv(70000) for _ in range(3 * 45)] == expected * 3
    await asyncio.sleep(0.05)
    assert fast.path.statistics().tx["messages"] == 4


async def test_an_unfinished_checksum_is_finished(fast: Rig) -> None:
    whole = packet("10.5.1.2", "10.5.2.9", b"payload")
    partial = superframe.partial_checksum(whole, superframe.UDP, 15)
    unfinished = whole[:26] + partial.to_bytes(2) + whole[28:]
    fast.path.start()
    fast.pods.send(superframe.VnetHeader(1, 0, 0, 0, 20, 6).encode() + unfinished)
    assert fast.peer.recv(70000) == whole


async def test_a_superframe_that_lies_is_a_counted_drop(fast: Rig) -> None:
    header, whole = tcp_superframe(3000, 1000)
    good = packet("10.5.1.2", "10.5.2.9")
    fast.path.start()
    for lie in ({"gso_size": 0}, {"csum_start": 19}, {"csum_offset": 15}, {"gso_type": 4}, {"flags": 0}):
        values = {name: getattr(header, name) for name in header.__dataclass_fields__} | lie
        fast.pods.send(superframe.VnetHeader(**values).encode() + whole)
    fast.send_from_pod(good)
    assert fast.peer.recv(70000) == good
    await fast.until(drops={DropReason.SUPERFRAME: 5})


async def test_what_waits_is_merged_across_messages_and_can_be_cut_again(fast: Rig) -> None:
    segments = superframe.segments(*tcp_superframe(20 * 1000, 1000))
    assert segments is not None
    swapped = [each[:12] + each[16:20] + each[12:16] + each[20:] for each in segments]  # the sums stay the same
    for each in swapped:
        fast.send_from_peer(each)
    await asyncio.sleep(0.05)
    fast.path.start()
    got = fast.pods.recv(70000)
    header = superframe.VnetHeader.decode(got[:10])
    assert header.gso_type == superframe.GSO_TCPV4
    assert superframe.segments(header, got[10:]) == swapped
    await asyncio.sleep(0.05)  # counted after the write that we have seen
    assert fast.path.statistics().rx["packets"] == 20
    assert fast.path.statistics().rx["superframes"] == 1


async def test_a_spoofed_packet_among_good_ones_is_left_out_of_the_superframe(fast: Rig) -> None:
    segments = superframe.segments(*tcp_superframe(3 * 1000, 1000))
    assert segments is not None
    swapped = [each[:12] + each[16:20] + each[12:16] + each[20:] for each in segments]
    fast.send_from_peer(swapped[0])
    fast.send_from_peer(packet("10.5.99.9", "10.5.1.2"))
    for each in swapped[1:]:
        fast.send_from_peer(each)
    await asyncio.sleep(0.05)
    fast.path.start()
    got = fast.pods.recv(70000)
    assert superframe.segments(superframe.VnetHeader.decode(got[:10]), got[10:]) == swapped
    assert fast.drops() == {DropReason.SPOOFED_SOURCE: 1}


async def test_pumps_keep_the_priority_that_the_control_plane_gives_up() -> None:
    def priorities() -> tuple[int, set[int]]:
        datapath.give_way_to_pumps()
        return os.getpriority(os.PRIO_PROCESS, 0), asyncio.run(of_pumps())

    async def of_pumps() -> set[int]:
        # twice: as after a change of addresses, when the loop's priority is lower for long
        async for made in running(SourceCheck.NODE):
            await made.path.rewire(Outer(made._udp.fileno(), made.port), 1472)
            pumps = [thread for thread in threading.enumerate() if thread.name in ("loden-tx", "loden-rx")]
            return {os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) for thread in pumps}
        return set()

    before = os.getpriority(os.PRIO_PROCESS, 0)
    # in a thread of its own: a priority is a thread's, and only root could raise it again
    with ThreadPoolExecutor(1) as control:
        assert control.submit(priorities).result() == (max(before, datapath.CONTROL_NICE), {before})
