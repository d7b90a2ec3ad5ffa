"""Owns the engine: the two pumps around one TUN and one UDP socket, as Python sees them.

TX carries packets from the TUN into datagrams (_tx.pxd), RX datagrams into the TUN (_rx.pxd). Each pump is one thread
that enters `transmit` or `receive`, gives up the GIL and comes back when it is stopped; no Python object is touched in
between. Free of leases and of the control plane: a table of routes comes down by `publish`, counters and small event
records go up.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dataplane.abi cimport *
from dataplane._fib cimport Fib
from dataplane._pump cimport EVENTS, engine_state, pump_state
from dataplane._rx cimport pump_rx, rx_state
from dataplane._tx cimport ICMP_BURST, READS, pump_tx, tx_state
from dataplane._udpio cimport MESSAGES, RUN_DATAGRAMS, prepare_inbox
from dataplane.headers cimport (
    ICMP_UNREACHABLE, build_icmp_error, ipv4_view, may_answer_with_icmp, parse_ipv4,
)


cdef uint8_t* map_buffers(size_t count) noexcept:
    """Pages that no packet has touched cost no memory."""
    cdef void* memory = mmap(
        NULL, count * BUFFER_STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    return NULL if memory == MAP_FAILED else <uint8_t*>memory


cdef class Engine:
    """The two pumps around one TUN and one UDP socket; `icmp` is a raw socket that takes whole packets, for the errors
    that pods get. The descriptors stay the caller's."""

    cdef engine_state* state
    cdef tx_state* tx
    cdef rx_state* rx
    cdef Fib fib
    cdef list retired        # (generation in which it was replaced, table)

    def __cinit__(self, int tun, int udp, int icmp, *, int port, uint32_t icmp_source, int source_check,
                  uint32_t slots, uint32_t run_datagrams, bint merge_tcp, bint merge_udp, uint64_t spin_ns):
        """`run_datagrams`: how many the socket cuts out of one send, 1 for none; `merge_tcp`, `merge_udp`: the TUN takes
        superframes; `spin_ns`: how long a pump that has just carried something looks again before it sleeps."""
        cdef engine_state* state = <engine_state*>calloc(1, sizeof(engine_state))
        self.state = state
        self.tx = <tx_state*>calloc(1, sizeof(tx_state))
        self.rx = <rx_state*>calloc(1, sizeof(rx_state))
        if not (state and self.tx and self.rx):
            raise MemoryError
        state.stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        state.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if state.stop_fd < 0 or state.event_fd < 0:
            raise OSError(errno, "eventfd")
        state.tun = tun
        state.udp = udp
        state.icmp = icmp
        state.icmp_source = icmp_source
        state.check = source_check
        state.merge_tcp = merge_tcp
        state.merge_udp = merge_udp
        state.spin_ns = spin_ns
        state.slots = slots
        state.sent = <peer_counters*>calloc(slots, sizeof(peer_counters))
        state.received = <peer_counters*>calloc(slots, sizeof(peer_counters))
        self.tx.outbox.port_be = htons(<uint16_t>port)
        self.tx.outbox.most = min(run_datagrams, <uint32_t>RUN_DATAGRAMS)
        self.tx.icmp_tokens = ICMP_BURST
        self.tx.buffers = map_buffers(READS)
        self.rx.buffers = map_buffers(MESSAGES)
        self.rx.most = MESSAGES
        if not (state.sent and state.received and self.tx.buffers and self.rx.buffers):
            raise MemoryError
        prepare_inbox(&self.rx.inbox, self.rx.buffers, BUFFER_STRIDE, BUFFER_BYTES)
        self.retired = []
        self.fib = Fib()
        state.table = self.fib.table
        state.generation = 1

    def __dealloc__(self):
        if self.state != NULL:
            if self.state.stop_fd > 0:
                close(self.state.stop_fd)
            if self.state.event_fd > 0:
                close(self.state.event_fd)
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
            pump_rx(self.state, self.rx)

    def stop(self):
        """Make both pumps return. They finish the batch in hand first."""
        store_u64(&self.state.stopping, 1)
        eventfd_write(self.state.stop_fd, 1)

    def publish(self, Fib fib not None):
        """Let both pumps use `fib` from their next batch on; never waits. Returns the new generation: once
        `oldest_generation` has reached it, nothing uses the former table any more."""
        cdef engine_state* state = self.state
        former = self.fib
        self.fib = fib
        store_pointer(&state.table, fib.table)
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
        """Drain what the pumps reported: (kind, address, value) each, oldest first for each pump."""
        cdef uint64_t ignored
        cdef list found = []
        cdef pump_state* pump
        cdef path_event* event
        cdef int which
        eventfd_read(self.state.event_fd, &ignored)
        for which in range(2):
            pump = &self.state.tx if which == 0 else &self.state.rx
            while pump.events_read < load_u64(&pump.events_written):
                event = &pump.events[pump.events_read % EVENTS]
                found.append((event.kind, event.address, event.value))
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
        return sent.packets, sent.bytes, sent.last_ms, received.packets, received.bytes, received.last_ms

    def clear_slot(self, uint32_t slot):
        """Zero a slot that no table uses any more."""
        if slot >= self.state.slots:
            raise IndexError(slot)
        memset(&self.state.sent[slot], 0, sizeof(peer_counters))
        memset(&self.state.received[slot], 0, sizeof(peer_counters))


cdef dict pump_counters(pump_state* pump):
    return {
        "packets": pump.packets,
        "bytes": pump.bytes,
        "superframes": pump.superframes,
        "messages": pump.messages,
        "calls": pump.calls,
        "wakeups": pump.wakeups,
        "icmp_errors": pump.icmp_errors,
        "events_lost": pump.events_lost,
        "drops": tuple([pump.drops[i] for i in range(DROP_REASONS)]),
    }


# What the packet functions answer, for holding them against their oracle, dataplane.path.wire.

def inspect_ipv4(bytes packet):
    """(verdict, source, destination, length); the verdict is a DropReason's value or None, addresses in host order."""
    cdef ipv4_view view
    cdef int verdict = parse_ipv4(packet, len(packet), &view)
    if verdict != DROP_REASONS:
        return verdict, None, None, None
    return None, view.source, view.destination, view.length


def icmp_unreachable(uint32_t source, bytes packet):
    """The ICMP network unreachable about `packet`, or None where none may be sent or the packet cannot be carried."""
    cdef uint8_t out[576]
    cdef ipv4_view view
    cdef const uint8_t* data = packet
    cdef size_t length
    if parse_ipv4(data, len(packet), &view) != DROP_REASONS or not may_answer_with_icmp(data, &view):
        return None
    length = build_icmp_error(out, source, ICMP_UNREACHABLE, 0, 0, data, &view)
    return out[:length]
