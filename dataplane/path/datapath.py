"""Owns the engine: starts its pumps, gives them tables, reads their counters and events, stops them.

Free of leases and of how a device or socket came to be. The only importer of the compiled engine. Runs on an event
loop, which never touches a packet. A device of several queues has an engine for each, with a socket, counters and rings
of its own: the engines share the table, which never changes, and nothing that a pump writes. Invariant: nothing that a
pump may still use is freed, changed, or used for something else.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from ipaddress import ip_address
from typing import Any, cast

from dataplane._engine import MOST_SENDERS, Engine
from dataplane._fib import Fib
from dataplane._segment import finished, segments
from dataplane._tap import Tap, TapSet
from dataplane.errors import DropReason, KernelError
from dataplane.path.capability import Capability
from dataplane.path.facts import (
    Address,
    IcmpSender,
    Network,
    Outer,
    PathEvent,
    PathEventKind,
    PathStatistics,
    PumpCounters,
    RouteCounters,
    SourceCheck,
    Vxlan,
    narrow,
    totals,
)
from dataplane.path.routes import MAX_ROUTES, Routes

GATHER_SECONDS = 0.01
"""Between two tables, in which changes are gathered; the first after a quiet time is published with its neighbours in
the same turn of the loop."""

SWEEP_SECONDS = 1.0
"""How often replaced tables are looked at, beside each publish."""

STOP_SECONDS = 5.0

GRACE_SECONDS = 1.0
"""How long `arm` waits for the pumps to leave the former taps, looking every LOOK_SECONDS."""

LOOK_SECONDS = 0.002

CONTROL_NICE = 10
"""Of the threads that give way to pumps: where both want a processor, they have a tenth of it (sched(7))."""

VXLAN_HEAD = 8 + 14
"""VXLAN and Ethernet header, before the inner packet."""

# linux/in.h, linux/in6.h: not in Python's socket module before 3.14
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT, _IP_RECVTTL = 10, 0, 12

__all__ = ["Datapath", "Tap", "finished", "give_way_to_pumps", "segments"]

PATHS = 2
"""Paths that a tap may be armed in at once, each with as many queues as the engine's taps have rings for."""


class Datapath:
    """The packet path of a TUN, its UDP and raw sockets, which stay the caller's to close, after `stop`.

    A datagram's payload is a packet as it is, unless `vxlan` says otherwise.
    """

    def __init__(
        self,
        tun: int,
        outer: Outer,
        icmp: Collection[IcmpSender] = (),
        *,
        mtu: int,
        source_check: SourceCheck,
        vxlan: Vxlan | None = None,
        capabilities: Collection[Capability] = (),
        run_datagrams: int = 1,
        spin: float = 0.0,
        moderation: float = 0.0,
        further: Sequence[int] = (),
        on_event: Callable[[PathEvent], None],
    ) -> None:
        """`icmp`: at most one for each IP version; of one that is missing, pods get no errors.

        These do not go through the TUN: the kernel would drop them as martians, since their source is its own address.
        `mtu`: the TUN's. `capabilities`: which of them the descriptors were granted; `run_datagrams`: how many the
        kernel cuts out of one send. `spin`: seconds for which a pump that has just carried something looks again
        before it sleeps; `moderation`: for which one that carries at a high rate lets packets gather whenever it has
        emptied its queue. `further`: more queues of the TUN, each with a receiver of its own in `outer`; whoever gives
        packets to queues and datagrams to receivers keeps those of a flow together.
        """
        errors: dict[str, Any] = {}
        for sender in icmp:
            version = sender.source.version
            errors |= {f"icmp_v{version}": sender.fd, f"icmp_source_v{version}": sender.source.packed}
        frames: dict[str, Any] = {"vni": vxlan.vni, "mac": vxlan.mac, "version": vxlan.version} if vxlan else {}
        self._outer, self._vxlan = _checked(outer), vxlan
        self._engines = [
            Engine(
                queue,
                receiver,
                outer.senders_of(number),
                port=outer.port,
                source_check=source_check,
                slots=MAX_ROUTES,
                run_datagrams=run_datagrams if Capability.UDP_SEGMENT in capabilities else 1,
                merge_tcp=Capability.TUN_TSO in capabilities,
                merge_udp=Capability.TUN_USO in capabilities,
                spin_ns=round(spin * 1e9),
                moderation_ns=round(moderation * 1e9),
                mtu=mtu,
                **errors,
                **frames,
            )
            for number, (queue, receiver) in enumerate(zip((tun, *further), outer.receivers, strict=True))
        ]
        self._on_event = on_event
        self._fib = Fib()
        self._routes = Routes()
        self._generation = 0
        self._threads: list[threading.Thread] = []
        self._publish_timer: asyncio.TimerHandle | None = None
        self._next_publish = 0.0
        self._sweep_timer: asyncio.TimerHandle | None = None

    @property
    def engine(self) -> Engine:
        """For dataplane.path.rehearsal, which goes the ways of a path that was not started."""
        return self._engines[0]

    def start(self) -> None:
        """Start the pumps and listen to their events, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self.publish()  # what waits in the queues already is for routes that were set already
        for queue, engine in enumerate(self._engines):
            self._loop.add_reader(engine.event_fd, self._read_events, queue)
        self._start_pumps()

    def set_route(self, subnet: Network, address: Address, mac: bytes = b"") -> None:
        """Packets for `subnet` go to the peer at `address`, in frames to `mac`. Raises KernelError where there is no
        room for a route, or the subnet lies where the path keeps IPv4."""
        self._routes.set(subnet, address, mac)
        self._gather()

    def set_path_mtu(self, address: Address, mtu: int) -> None:
        """Inner packets to the peer at `address` may have `mtu` bytes; 0 for as many as ours may have."""
        self._routes.set_path_mtu(address, mtu)
        self._gather()

    def remove_route(self, subnet: Network) -> None:
        """Packets for `subnet` have nowhere to go; a subnet that has no route is no error."""
        self._routes.remove(subnet)
        self._gather()

    def publish(self) -> None:
        """Give the pumps every gathered change now instead of within GATHER_SECONDS."""
        if self._publish_timer is not None:
            self._publish_timer.cancel()
            self._publish_timer = None
        changes = self._routes.pending
        if not changes:
            return
        if self._threads:
            self._next_publish = self._loop.time() + GATHER_SECONDS
        self._fib = self._fib.updated(changes)
        # all engines began with the same generation, and have had every new one together
        self._generation = max(engine.publish(self._fib) for engine in self._engines)
        self._routes.published(self._generation)
        self._sweep()

    async def arm(self, taps: Sequence[Tap], path: int = 0) -> None:
        """Show what the pumps carry to `taps` and to nobody else; returns once no pump uses a former one any more, or
        after GRACE_SECONDS. `path` numbers this path where the same taps are armed in two. Raises ValueError for more
        taps than the engine takes, and KernelError where there is no memory for their rings; then nothing changes."""
        try:
            # all sets first: one that fails must not leave some engines a generation ahead of the others
            sets = [self._tap_set(taps, path, queue) if taps else None for queue in range(len(self._engines))]
        except MemoryError:
            raise KernelError("no memory for a capture's rings, two for each queue; use a smaller --buffer") from None
        generation = max(engine.arm(each) for engine, each in zip(self._engines, sets, strict=True))
        end = self._loop.time() + GRACE_SECONDS
        # a pump tells nobody that it left a generation: it must be looked at
        while self._oldest_generation() < generation and self._loop.time() < end:  # noqa: ASYNC110 - as said
            await asyncio.sleep(LOOK_SECONDS)

    def _tap_set(self, taps: Sequence[Tap], path: int, queue: int) -> TapSet:
        """The taps, with what the sockets say of the datagrams that they send; these also tell TOS and TTL of what they
        receive from now on."""
        with _borrowed(self._outer.receivers[queue]) as receiver:
            _tell_outer_header(receiver)
            port = receiver.getsockname()[1]
        names = []
        for fd in self._outer.senders_of(queue):
            with _borrowed(fd) as sender:
                names.append(sender.getsockname())
                six = sender.family == socket.AF_INET6
                level, hops = (
                    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) if six else (socket.IPPROTO_IP, socket.IP_TTL)
                )
                ttl = sender.getsockopt(level, hops)
                whole = not six and sender.getsockopt(level, _IP_MTU_DISCOVER) != _IP_PMTUDISC_DONT
        frames: dict[str, int] = {"vni": self._vxlan.vni, "skip": VXLAN_HEAD} if self._vxlan else {}
        return TapSet(
            taps,
            local=ip_address(names[0][0]).packed,
            port=port,
            peers_port=self._outer.port,
            ports=tuple(name[1] for name in names),
            ttl=ttl,
            dont_fragment=whole,
            path=queue * PATHS + path,
            **frames,
        )

    def statistics(self) -> PathStatistics:
        """Every counter as of now."""
        count = self._engines[0].peer_counters if len(self._engines) == 1 else self._count_together
        counters = [engine.counters() for engine in self._engines]
        tx, rx = _together([each["tx"] for each in counters]), _together([each["rx"] for each in counters])
        return PathStatistics(
            tx=tx,
            rx=rx,
            drops={reason: tx["drops"][reason] + rx["drops"][reason] for reason in DropReason},
            routes=tuple(
                RouteCounters(subnet, route.address, *count(route.slot))
                for subnet, route in self._routes
            ),
        )

    def set_segment_mtu(self, mtu: int) -> None:
        """What pods take: kernel VTEPs hand over TCP superframes that do not say how they are to be cut. A SUPERFRAME
        event asks for this every few seconds while such come; without, it is the MTU of the TUN."""
        for engine in self._engines:
            engine.set_segment_mtu(mtu)

    async def rewire(self, outer: Outer, mtu: int) -> None:
        """Go on with as many other sockets and another MTU; routes and counters stay. Between the pumps' end and their
        new start packets wait in the TUN's queue and in the sockets."""
        running = bool(self._threads)
        await self._stop_pumps()
        self._outer = _checked(outer)
        for number, (engine, receiver) in enumerate(zip(self._engines, outer.receivers, strict=True)):
            engine.rewire(receiver, outer.senders_of(number), outer.port, mtu)
        if running:
            self._start_pumps()

    async def stop(self) -> None:
        """Stop and join the pumps; afterwards nothing uses the descriptors. Safe to call twice."""
        for timer in (self._publish_timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        self._publish_timer = self._sweep_timer = None
        if self._threads:
            for engine in self._engines:
                self._loop.remove_reader(engine.event_fd)
        await self._stop_pumps()

    def _start_pumps(self) -> None:
        for queue, engine in enumerate(self._engines):
            for name, body in (("loden-tx", engine.transmit), ("loden-rx", engine.receive)):
                name += str(queue) if queue else ""
                thread = threading.Thread(target=_without_signals, args=(body,), name=name, daemon=True)
                _starter().submit(thread.start).result()
                self._threads.append(thread)

    async def _stop_pumps(self) -> None:
        if not self._threads:
            return
        for engine in self._engines:
            engine.stop()
        threads, self._threads = self._threads, []
        for thread in threads:
            await asyncio.to_thread(thread.join, STOP_SECONDS)
            if thread.is_alive():
                raise KernelError(f"the pump {thread.name} did not stop within {STOP_SECONDS:.0f} s")

    def _gather(self) -> None:
        """Let what was changed be published soon, with what is changed until then."""
        if self._publish_timer is None and self._threads:
            self._publish_timer = self._loop.call_at(self._next_publish, self.publish)

    def _sweep(self) -> None:
        """Free the tables and slots that no pump uses any more; look again in a second where some are left."""
        oldest = self._oldest_generation()
        for slot in self._routes.free(oldest):
            for engine in self._engines:
                engine.clear_slot(slot)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        busy = oldest < self._generation
        self._sweep_timer = self._loop.call_later(SWEEP_SECONDS, self._sweep) if busy else None

    def _oldest_generation(self) -> int:
        # a list: each engine frees what it has left when it is asked
        return min([engine.oldest_generation() for engine in self._engines])

    def _count_together(self, slot: int) -> tuple[int, int, int, int, int, int]:
        """Of all engines; the last time is that of the latest."""
        columns = zip(*(engine.peer_counters(slot) for engine in self._engines), strict=True)
        tx_packets, tx_bytes, tx_last, rx_packets, rx_bytes, rx_last = columns
        return sum(tx_packets), sum(tx_bytes), max(tx_last), sum(rx_packets), sum(rx_bytes), max(rx_last)

    def _read_events(self, queue: int) -> None:
        for kind, address, value in self._engines[queue].events():
            self._on_event(PathEvent(PathEventKind(kind), narrow(address), value, queue))


def _checked(outer: Outer) -> Outer:
    if len(outer.senders) > MOST_SENDERS:
        raise KernelError(f"{len(outer.senders)} source ports are more than the {MOST_SENDERS} that the path knows")
    return outer


def _together(pumps: Sequence[PumpCounters]) -> PumpCounters:
    """The sums of all pumps of one direction."""
    drops = tuple(map(sum, zip(*(pump["drops"] for pump in pumps), strict=True)))
    return cast("PumpCounters", {**totals(pumps), "drops": drops})


def _borrowed(fd: int) -> socket.socket:
    """A socket of our own for a descriptor that stays the caller's."""
    return socket.socket(fileno=os.dup(fd))


def _tell_outer_header(receiver: socket.socket) -> None:
    if receiver.family == socket.AF_INET6:
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        receiver.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)


def _without_signals(body: Callable[[], None]) -> None:
    """Signals are the event loop's business: a pump that a signal wakes would only lose time."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    body()


@cache
def _starter() -> ThreadPoolExecutor:
    """Starts pumps. A thread has the priority of the one that starts it, and no way back up without CAP_SYS_NICE."""
    return ThreadPoolExecutor(1, thread_name_prefix="loden-starter")


def give_way_to_pumps() -> None:
    """Lower the priority of this thread and of all that it starts from now on; pumps keep the one that it had. Else a
    change of many leases takes processors from them, whose queues are full within 30 ms."""
    _starter().submit(int).result()  # an executor has no thread before its first task
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(CONTROL_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
