"""Owns the engine: the two pumps around one TUN and its UDP sockets, as Python sees them.

TX carries packets from the TUN into datagrams (_tx.pxd), RX datagrams into the TUN (_rx.pxd). Each pump is one thread
that enters `transmit` or `receive`, gives up the GIL and comes back when it is stopped; no Python object is touched in
between. Free of leases and of the control plane: a table of routes comes down by `publish`, counters and small event
records go up.
"""

import secrets

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from dataplane.abi cimport *
from dataplane._duty cimport pump_rx, pump_tx
from dataplane._fib cimport Fib
from dataplane._pump cimport EVENTS, SENDERS, engine_state, pump_state
from dataplane._rx cimport rx_state
from dataplane._tap cimport TapSet
from dataplane._tx cimport ICMP_BURST, READS, tx_state
from dataplane._udpio cimport MESSAGES, RUN_DATAGRAMS, prepare_inbox
from dataplane.headers cimport (
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAME_HEAD, ICMP_MOST, VXLAN_HEADER, build_icmp_error, decap_ecn, encap_ecn, ip_view,
    may_answer_with_icmp, parse_frame_head, parse_ip, store_u128, unfinished_checksum, vxlan_link, write_frame_head,
)

MOST_SENDERS = SENDERS


cdef uint8_t* map_buffers(size_t count) noexcept:
    """Pages that no packet has touched cost no memory."""
    cdef void* memory = mmap(
        NULL, count * BUFFER_STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    return NULL if memory == MAP_FAILED else <uint8_t*>memory


cdef void describe_link(vxlan_link* link, uint32_t vni, const uint8_t* mac, int version) noexcept:
    """RFC 7348 section 5: flags, 24 reserved bits, VNI, 8 reserved bits; then the Ethernet header."""
    memset(link, 0, sizeof(link[0]))
    link.head[0] = 0x08
    link.head[4] = <uint8_t>(vni >> 16)
    link.head[5] = <uint8_t>(vni >> 8)
    link.head[6] = <uint8_t>vni
    memcpy(link.head + VXLAN_HEADER + 6, mac, 6)
    memcpy(link.mac, mac, 6)
    link.ethertype = ETHERTYPE_IPV4 if version == 4 else ETHERTYPE_IPV6


cdef class Engine:
    """The two pumps around one TUN and its UDP sockets. The descriptors stay the caller's."""

    def __cinit__(self, int tun, int udp, tuple senders, *, int port, int source_check, uint32_t slots,
                  uint32_t run_datagrams, bint merge_tcp, bint merge_udp, uint64_t spin_ns,
                  uint64_t moderation_ns, uint32_t mtu,
                  int icmp_v4=-1, bytes icmp_source_v4=bytes(4), int icmp_v6=-1, bytes icmp_source_v6=bytes(16),
                  int vni=-1, bytes mac=bytes(6), int version=4):
        """`udp` receives, `senders` send. `run_datagrams`: how many the kernel cuts out of one send, 1 for none;
        `merge_tcp`, `merge_udp`: the TUN takes superframes; `spin_ns`: how long a pump that has just carried something
        looks again before it sleeps; `moderation_ns`: how long one that carries at a high rate lets packets gather
        whenever it has emptied its queue, 0 for never; `mtu`: the TUN's. `icmp_v4`, `icmp_v6`: raw sockets that take whole packets, for
        the errors that pods get from these sources; -1 for none. `vni`: packets travel in VXLAN frames of that network
        and of IP version `version`, and `mac` is ours; -1: datagrams are packets."""
        cdef engine_state* state = <engine_state*>calloc(1, sizeof(engine_state))
        if len(mac) != 6 or len(icmp_source_v4) != 4 or len(icmp_source_v6) != 16:
            raise ValueError("a wrong number of bytes in an address")
        self.state = state
        self.tx = <tx_state*>calloc(1, sizeof(tx_state))
        self.rx = <rx_state*>calloc(1, sizeof(rx_state))
        if not (state and self.tx and self.rx):
            raise MemoryError
        state.flow_keys[0] = secrets.randbits(64) | 1
        state.flow_keys[1] = secrets.randbits(64)
        state.icmp_v4 = icmp_v4
        state.icmp_v6 = icmp_v6
        memcpy(state.icmp_source_v4, <const uint8_t*>icmp_source_v4, 4)
        memcpy(state.icmp_source_v6, <const uint8_t*>icmp_source_v6, 16)
        state.vxlan = vni >= 0
        describe_link(&state.link, <uint32_t>vni, mac, version)
        state.stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        state.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        state.tx_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        state.rx_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if min(state.stop_fd, state.event_fd, state.tx_bell, state.rx_bell) < 0:
            raise OSError(errno, "eventfd")
        state.tun = tun
        state.check = source_check
        state.merge_tcp = merge_tcp
        state.merge_udp = merge_udp
        state.spin_ns = spin_ns
        state.moderation_ns = moderation_ns
        state.slots = slots
        state.sent = <peer_counters*>calloc(slots, sizeof(peer_counters))
        state.received = <peer_counters*>calloc(slots, sizeof(peer_counters))
        self.tx.outbox.most = min(run_datagrams, <uint32_t>RUN_DATAGRAMS)
        self.tx.icmp_tokens = ICMP_BURST
        self.tx.buffers = map_buffers(READS)
        self.rx.buffers = map_buffers(MESSAGES)
        self.rx.most = MESSAGES
        if not (state.sent and state.received and self.tx.buffers and self.rx.buffers):
            raise MemoryError
        self.rewire(udp, senders, port, mtu)
        prepare_inbox(&self.rx.inbox, self.rx.buffers, BUFFER_STRIDE, BUFFER_BYTES)
        self.retired = []
        self.fib = Fib()
        state.table = self.fib.table
        state.generation = 1

    def __dealloc__(self):
        if self.state != NULL:
            for fd in (self.state.stop_fd, self.state.event_fd, self.state.tx_bell, self.state.rx_bell):
                if fd > 0:
                    close(fd)
            free(self.state.sent)
            free(self.state.received)
        if self.tx != NULL and self.tx.buffers != NULL:
            munmap(self.tx.buffers, READS * BUFFER_STRIDE)
        if self.rx != NULL and self.rx.buffers != NULL:
            munmap(self.rx.buffers, MESSAGES * BUFFER_STRIDE)
        free(self.tx)
        free(self.rx)
        free(self.state)

    @property
    def event_fd(self):
        """Readable while `events` has something to tell."""
        return self.state.event_fd

    def transmit(self):
        """Body of the TX thread: returns after `stop`."""
        with nogil:
            pump_tx(self.state, self.tx)

    def receive(self):
        """Body of the RX thread: returns after `stop`."""
        with nogil:
            pump_rx(self.state, self.tx, self.rx)

    def stop(self):
        """Make both pumps return. They finish the batch in hand first."""
        store_u64(&self.state.stopping, 1)
        eventfd_write(self.state.stop_fd, 1)

    def rewire(self, int udp, tuple senders, int port, uint32_t mtu):
        """Other sockets, or another MTU of the TUN. Only while no pump runs; they may be started again afterwards."""
        cdef engine_state* state = self.state
        cdef uint64_t ignored
        cdef int sender
        if not 1 <= len(senders) <= SENDERS:
            raise ValueError("a wrong number of sockets")
        state.udp = udp
        state.senders_count = 0
        for sender in senders:
            state.senders[state.senders_count] = sender
            state.senders_count += 1
        state.segment_mtu = mtu
        self.tx.outbox.port_be = htons(<uint16_t>port)
        self.tx.outbox.count = self.tx.stamped = self.rx.outbox.count = 0
        eventfd_read(state.stop_fd, &ignored)
        state.apart = 0
        store_u64(&state.stopping, 0)

    def set_segment_mtu(self, uint32_t mtu):
        """Into packets of how many bytes a TCP superframe from a kernel VTEP is cut; until then the MTU of the TUN."""
        store_relaxed_u32(&self.state.segment_mtu, mtu)

    def publish(self, Fib fib not None):
        """Let both pumps use `fib` from their next batch on; never waits. Returns the new generation: once
        `oldest_generation` has reached it, nothing uses the former table any more."""
        cdef engine_state* state = self.state
        former = self.fib
        self.fib = fib
        store_pointer(&state.table, fib.table)
        return self.retire(former)

    def arm(self, TapSet taps):
        """Let both pumps show what they carry to `taps`, or to nobody, from their next batch on; as `publish`."""
        former = self.taps
        self.taps = taps
        store_pointer(&self.state.taps, &taps.armed if taps is not None else NULL)
        return self.retire(former)

    cdef retire(self, former):
        cdef engine_state* state = self.state
        store_u64(&state.generation, state.generation + 1)
        self.retired.append((state.generation, former))
        self.oldest_generation()
        return state.generation

    def oldest_generation(self):
        """The oldest generation that a pump may still work under; frees the tables that nothing uses any more."""
        cdef uint64_t oldest = self.state.generation
        cdef uint64_t tx = load_u64(&self.state.tx.generation)
        cdef uint64_t rx = load_u64(&self.state.rx.generation)
        if tx and tx < oldest:
            oldest = tx
        if rx and rx < oldest:
            oldest = rx
        self.retired = [entry for entry in self.retired if entry[0] > oldest]
        return oldest

    def events(self):
        """Drain what the pumps reported: (kind, address, value) each, oldest first for each pump. The address has 16
        bytes, IPv4 as ::ffff:a.b.c.d."""
        cdef uint64_t ignored
        cdef list found = []
        cdef pump_state* pump
        cdef path_event* event
        cdef uint8_t address[16]
        cdef int which
        eventfd_read(self.state.event_fd, &ignored)
        for which in range(2):
            pump = &self.state.tx if which == 0 else &self.state.rx
            while pump.events_read < load_u64(&pump.events_written):
                event = &pump.events[pump.events_read % EVENTS]
                store_u128(address, event.address)
                found.append((event.kind, address[:16], event.value))
                store_u64(&pump.events_read, pump.events_read + 1)
        return found

    def counters(self):
        """Totals of each pump: {"tx": {...}, "rx": {...}}, with `drops` as a tuple by DropReason."""
        return {"tx": pump_counters(&self.state.tx), "rx": pump_counters(&self.state.rx)}

    def peer_counters(self, uint32_t slot):
        """(tx packets, tx bytes, tx last, rx packets, rx bytes, rx last); last in monotonic ms, 0 for never."""
        if slot >= self.state.slots:
            raise IndexError(slot)
        cdef peer_counters* sent = &self.state.sent[slot]
        cdef peer_counters* received = &self.state.received[slot]
        return (
            load_relaxed(&sent.packets), load_relaxed(&sent.bytes), load_relaxed(&sent.last_ms),
            load_relaxed(&received.packets), load_relaxed(&received.bytes), load_relaxed(&received.last_ms),
        )

    def clear_slot(self, uint32_t slot):
        """Zero a slot that no table uses any more."""
        if slot >= self.state.slots:
            raise IndexError(slot)
        memset(&self.state.sent[slot], 0, sizeof(peer_counters))
        memset(&self.state.received[slot], 0, sizeof(peer_counters))


cdef dict pump_counters(pump_state* pump):
    return {
        "packets": load_relaxed(&pump.packets),
        "bytes": load_relaxed(&pump.bytes),
        "superframes": load_relaxed(&pump.superframes),
        "messages": load_relaxed(&pump.messages),
        "calls": load_relaxed(&pump.calls),
        "wakeups": load_relaxed(&pump.wakeups),
        "moderations": load_relaxed(&pump.moderations),
        "partings": load_relaxed(&pump.partings),
        "icmp_errors": load_relaxed(&pump.icmp_errors),
        "wrong_checksums": load_relaxed(&pump.wrong_checksums),
        "events_lost": load_relaxed(&pump.events_lost),
        "drops": tuple([load_relaxed(&pump.drops[i]) for i in range(DROP_REASONS)]),
    }


# What the packet functions answer, for holding them against their oracle, dataplane.path.wire.

def inspect_ip(bytes packet):
    """(verdict, source, destination, length); the verdict is a DropReason's value or None, addresses have 16 bytes."""
    cdef ip_view view
    cdef uint8_t address[16]
    cdef int verdict = parse_ip(packet, len(packet), &view)
    if verdict != DROP_REASONS:
        return verdict, None, None, None
    store_u128(address, view.source)
    source = address[:16]
    store_u128(address, view.destination)
    return None, source, address[:16], view.length


def icmp_error(bytes source, bytes packet, uint16_t mtu=0):
    """The ICMP error about `packet` from our address of its version: it has no route, or is longer than `mtu`. None where
    none may be sent or the packet cannot be carried."""
    cdef uint8_t out[ICMP_MOST]
    cdef ip_view view
    cdef const uint8_t* data = packet
    cdef size_t length
    if parse_ip(data, len(packet), &view) != DROP_REASONS or not may_answer_with_icmp(data, &view, mtu != 0):
        return None
    if len(source) != (4 if view.version == 4 else 16):
        raise ValueError("the source is of another version than the packet")
    length = build_icmp_error(out, source, mtu, data, &view)
    return out[:length]


def frame_head(uint32_t vni, bytes mac, bytes to, int version):
    """What stands between UDP header and packet: `mac` is ours, `to` the peer's."""
    cdef vxlan_link link
    cdef uint8_t out[FRAME_HEAD]
    if len(mac) != 6 or len(to) != 6:
        raise ValueError("a MAC has 6 bytes")
    describe_link(&link, vni, mac, version)
    write_frame_head(out, &link, to, version)
    return out[:FRAME_HEAD]


def inspect_frame(bytes datagram, uint32_t vni, bytes mac, int version):
    """Why the frame of a datagram is dropped, as a DropReason's value; None where a packet for us follows."""
    cdef vxlan_link link
    if len(mac) != 6:
        raise ValueError("a MAC has 6 bytes")
    describe_link(&link, vni, mac, version)
    verdict = parse_frame_head(datagram, len(datagram), &link)
    return None if verdict == DROP_REASONS else verdict


def outer_ecn(bytes packet):
    """The ECN field of the outer header for a packet that `inspect_ip` takes."""
    return encap_ecn(packet)


def with_outer_ecn(bytes packet, uint8_t ecn):
    """Such a packet as it leaves a tunnel whose outer header had that ECN field; None where it is dropped."""
    copy = bytearray(packet)
    return None if decap_ecn(copy, ecn) == DROP_ECN else bytes(copy)


def unfinished(bytes packet):
    """(start, offset) of a checksum that holds the pseudo-header's sum only, in a packet that `inspect_ip` takes."""
    cdef ip_view view
    cdef uint16_t start, offset
    if parse_ip(packet, len(packet), &view) != DROP_REASONS:
        raise ValueError("not a packet")
    return (start, offset) if unfinished_checksum(packet, &view, &start, &offset) else None
