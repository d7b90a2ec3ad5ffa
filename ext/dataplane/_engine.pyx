"""Owns the pumps: TX carries packets from the TUN into datagrams, RX datagrams into the TUN.

Each pump is one thread that enters `transmit` or `receive`, gives up the GIL and comes back when it is stopped; no
Python object is touched in between. Free of leases and of the control plane: a table of routes comes down by
`publish`, counters and small event records go up.

Invariant (a pump and a table): a pump writes the generation that it works under into a word of its own before it
loads the table, and 0 before it waits. A table that was replaced in generation g is unused once every word is 0 or at
least g; so `publish` never waits and the pumps never lock.
"""

from libc.errno cimport EAGAIN, EBADFD, EINTR, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dataplane.abi cimport *
from dataplane._fib cimport Fib, fib_lookup, fib_route, fib_source, fib_table
from dataplane._tunio cimport tun_read, tun_write
from dataplane._udpio cimport udp_batch, udp_batch_add, udp_batch_address, udp_batch_free, udp_batch_init
from dataplane.headers cimport (
    ICMP_UNREACHABLE, build_icmp_error, ipv4_view, may_answer_with_icmp, parse_ipv4,
)

cdef enum:
    BATCH = 64
    # buffers lie a little more than 64 KiB apart, or all of them would share the same sets of the caches
    BUFFER_STRIDE = BUFFER_BYTES + 67 * 64
    EVENTS = 256
    SOURCES = 64
    ICMP_BURST = 50
    ICMP_PER_SECOND = 100
    RETRY_MS = 10            # how long a pump rests where the kernel gives an error instead of readiness

cdef struct unknown_source:
    uint32_t address
    uint64_t datagrams
    uint64_t reported_ms

cdef struct pump_state:
    uint64_t generation      # alone on its cache line: publish reads it
    uint64_t padding[7]
    uint64_t packets
    uint64_t bytes
    uint64_t batches
    uint64_t wakeups
    uint64_t icmp_errors
    uint64_t drops[DROP_REASONS]
    uint64_t events_written  # ring of events: written by the pump ...
    uint64_t events_read     # ... and read by the event loop
    uint64_t events_lost
    path_event events[EVENTS]

cdef struct engine_state:
    void* table              # fib_table*
    uint64_t generation
    uint64_t stopping
    int tun
    int udp
    int icmp
    int stop_fd
    int event_fd
    uint16_t port_be
    uint32_t icmp_source
    int check
    uint32_t slots
    peer_counters* sent      # by slot; written by TX only
    peer_counters* received  # by slot; written by RX only
    pump_state tx
    pump_state rx
    udp_batch outgoing
    uint32_t outgoing_slots[BATCH]
    udp_batch incoming
    uint8_t* tx_buffers
    uint8_t* rx_buffers
    virtio_net_hdr tun_header
    uint64_t icmp_tokens
    uint64_t icmp_refilled_ms
    unknown_source unknown[SOURCES]
    uint8_t icmp_packet[576]


cdef inline uint64_t now_ms() noexcept nogil:
    cdef clock_time now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>(now.tv_nsec // 1000000)


cdef void post_event(engine_state* engine, pump_state* pump, event_kind kind, uint32_t address, uint64_t value) noexcept nogil:
    cdef uint64_t at = pump.events_written
    cdef path_event* event = &pump.events[at % EVENTS]
    if at - load_u64(&pump.events_read) >= EVENTS:
        pump.events_lost += 1
        return
    event.kind = kind
    event.address = address
    event.value = value
    store_u64(&pump.events_written, at + 1)
    eventfd_write(engine.event_fd, 1)


cdef const fib_table* enter(engine_state* engine, pump_state* pump) noexcept nogil:
    store_u64(&pump.generation, load_u64(&engine.generation))
    return <const fib_table*>load_pointer(&engine.table)


cdef inline void leave(pump_state* pump) noexcept nogil:
    store_u64(&pump.generation, 0)


cdef void wait_for(engine_state* engine, pump_state* pump, int fd, short events) noexcept nogil:
    """Sleep until `fd` is ready or the engine stops. A descriptor that reports only an error would wake us for
    ever: rest instead, the next read or write says what is wrong."""
    cdef pollfd fds[2]
    pump.wakeups += 1
    fds[0].fd = fd
    fds[0].events = events
    fds[1].fd = engine.stop_fd
    fds[1].events = POLLIN
    poll(fds, 2, -1)
    if fds[0].revents & (POLLERR | POLLHUP | POLLNVAL) and not fds[0].revents & events:
        rest(engine)


cdef void rest(engine_state* engine) noexcept nogil:
    cdef pollfd stop
    stop.fd = engine.stop_fd
    stop.events = POLLIN
    poll(&stop, 1, RETRY_MS)


cdef void park(engine_state* engine, pump_state* pump, int error) noexcept nogil:
    """The device is gone: say so once, and wait for the engine to be stopped."""
    cdef pollfd stop
    post_event(engine, pump, EVENT_DEVICE_GONE, 0, error)
    leave(pump)
    stop.fd = engine.stop_fd
    stop.events = POLLIN
    while not load_u64(&engine.stopping):
        poll(&stop, 1, -1)


# ---------------------------------------------------------------------------------------------------- TX

cdef void answer_no_route(engine_state* engine, const uint8_t* packet, const ipv4_view* view) noexcept nogil:
    cdef uint64_t now = now_ms()
    cdef uint64_t earned = (now - engine.icmp_refilled_ms) * ICMP_PER_SECOND // 1000
    cdef sockaddr_in to
    cdef size_t length
    if not may_answer_with_icmp(packet, view):
        return
    if earned:
        engine.icmp_tokens = min(<uint64_t>ICMP_BURST, engine.icmp_tokens + earned)
        engine.icmp_refilled_ms = now
    if engine.icmp_tokens == 0:
        return
    engine.icmp_tokens -= 1
    length = build_icmp_error(engine.icmp_packet, engine.icmp_source, ICMP_UNREACHABLE, 0, 0, packet, view)
    memset(&to, 0, sizeof(to))
    to.sin_family = AF_INET
    to.sin_addr.s_addr = htonl(view.source)
    if sendto(engine.icmp, engine.icmp_packet, length, MSG_DONTWAIT, <sockaddr*>&to, sizeof(to)) >= 0:
        engine.tx.icmp_errors += 1


cdef void take_packet(engine_state* engine, const fib_table* table, uint8_t* packet, size_t length) noexcept nogil:
    """Look the packet up and append it to the batch, or drop it."""
    cdef ipv4_view view
    cdef uint32_t at
    cdef int verdict = parse_ipv4(packet, length, &view)
    if verdict != DROP_REASONS:
        engine.tx.drops[verdict] += 1
        return
    at = fib_lookup(table, view.destination)
    if at == NO_PEER:
        engine.tx.drops[DROP_NO_ROUTE] += 1
        answer_no_route(engine, packet, &view)
        return
    engine.outgoing_slots[engine.outgoing.count] = table.routes[at].slot
    udp_batch_add(&engine.outgoing, table.routes[at].address, engine.port_be, packet, view.length)


cdef void count_sent(engine_state* engine, unsigned int first, unsigned int count, uint64_t now) noexcept nogil:
    cdef unsigned int i
    cdef peer_counters* peer
    cdef uint64_t length
    for i in range(first, first + count):
        length = engine.outgoing.vectors[i].iov_len
        peer = &engine.sent[engine.outgoing_slots[i]]
        peer.packets += 1
        peer.bytes += length
        peer.last_ms = now
        engine.tx.packets += 1
        engine.tx.bytes += length


cdef void send_batch(engine_state* engine) noexcept nogil:
    """Send every datagram of the batch once. One that the kernel refuses is dropped alone (sendmmsg reports the error
    of the first datagram that it was handed); a full socket buffer is waited for, and the TUN's queue holds the rest."""
    cdef udp_batch* batch = &engine.outgoing
    cdef unsigned int done = 0
    cdef int sent, error, shortages = 0
    cdef uint64_t now = now_ms()
    while done < batch.count and not load_u64(&engine.stopping):
        sent = sendmmsg(engine.udp, &batch.messages[done], batch.count - done, MSG_DONTWAIT)
        if sent > 0:
            count_sent(engine, done, sent, now)
            done += sent
            shortages = 0
            continue
        error = errno
        if error == EINTR:
            continue
        if error == EAGAIN:
            wait_for(engine, &engine.tx, engine.udp, POLLOUT)
            continue
        if error == ENOBUFS and shortages < 3:
            shortages += 1
            rest(engine)
            continue
        engine.tx.drops[DROP_SEND_FAILED] += 1
        post_event(engine, &engine.tx, EVENT_SEND_FAILED, udp_batch_address(batch, done), error)
        done += 1
        shortages = 0
    batch.count = 0


cdef void pump_tx(engine_state* engine) noexcept nogil:
    cdef const fib_table* table
    cdef ssize_t got = 0
    cdef uint8_t* packet
    cdef unsigned int reads
    while not load_u64(&engine.stopping):
        table = enter(engine, &engine.tx)
        for reads in range(BATCH):
            packet = engine.tx_buffers + <size_t>reads * BUFFER_STRIDE
            got = tun_read(engine.tun, &engine.tun_header, packet, BUFFER_BYTES)
            if got < 0:
                break
            take_packet(engine, table, packet, <size_t>got)
        leave(&engine.tx)
        if engine.outgoing.count:
            engine.tx.batches += 1
            send_batch(engine)
        if got == -EBADFD:
            park(engine, &engine.tx, <int>-got)
        elif got == -EAGAIN:
            wait_for(engine, &engine.tx, engine.tun, POLLIN)
        elif got < 0 and got != -EINTR:
            rest(engine)


# ---------------------------------------------------------------------------------------------------- RX

cdef void note_unknown(engine_state* engine, uint32_t address) noexcept nogil:
    """Remember who sends without a lease; tell the control plane at most once a second for each."""
    cdef unknown_source* source = &engine.unknown[(address * <uint32_t>2654435769) >> 26]
    cdef uint64_t now = now_ms()
    if source.address != address:
        if source.address and now - source.reported_ms < 1000:
            return
        source.address = address
        source.datagrams = 0
        source.reported_ms = 0
    source.datagrams += 1
    if source.reported_ms == 0 or now - source.reported_ms >= 1000:
        source.reported_ms = now
        post_event(engine, &engine.rx, EVENT_UNKNOWN_SOURCE, address, source.datagrams)


cdef inline bint may_send(const fib_table* table, uint32_t first, uint32_t source, int check) noexcept nogil:
    """Whether the inner source belongs to the peer: one masked compare for each of its subnets, nearly always one."""
    cdef const fib_route* route
    while first != NO_PEER:
        route = &table.routes[first]
        if source & route.mask == route.subnet or (check == CHECK_NODE and source == route.address):
            return True
        first = route.next_same
    return False


cdef int judge(engine_state* engine, const fib_table* table, const uint8_t* packet, size_t length, uint32_t outer,
               ipv4_view* view, uint32_t* peer) noexcept nogil:
    """DROP_REASONS where the datagram may enter, else why not."""
    cdef int verdict
    peer[0] = fib_source(table, outer)
    if peer[0] == NO_PEER and engine.check != CHECK_OFF:
        return DROP_UNKNOWN_PEER
    verdict = parse_ipv4(packet, length, view)
    if verdict != DROP_REASONS:
        return verdict
    if engine.check != CHECK_OFF and not may_send(table, peer[0], view.source, engine.check):
        return DROP_SPOOFED_SOURCE
    return DROP_REASONS


cdef int write_packet(engine_state* engine, const uint8_t* packet, size_t length) noexcept nogil:
    """0 or -errno; a TUN that would block is waited for."""
    cdef int error = tun_write(engine.tun, packet, length)
    while (error == -EAGAIN or error == -EINTR) and not load_u64(&engine.stopping):
        if error == -EAGAIN:
            wait_for(engine, &engine.rx, engine.tun, POLLOUT)
        error = tun_write(engine.tun, packet, length)
    return error


cdef int take_datagram(engine_state* engine, const fib_table* table, unsigned int i, uint64_t now) noexcept nogil:
    """Deliver datagram `i` of the batch or drop it; 0, or -errno where the TUN refused it."""
    cdef uint8_t* packet = <uint8_t*>engine.incoming.vectors[i].iov_base
    cdef uint32_t outer = udp_batch_address(&engine.incoming, i)
    cdef ipv4_view view
    cdef peer_counters* peer
    cdef uint32_t at
    cdef int error
    cdef int verdict = judge(engine, table, packet, engine.incoming.messages[i].msg_len, outer, &view, &at)
    if verdict != DROP_REASONS:
        engine.rx.drops[verdict] += 1
        if verdict == DROP_UNKNOWN_PEER:
            note_unknown(engine, outer)
        return 0
    error = write_packet(engine, packet, view.length)
    if error:
        engine.rx.drops[DROP_TUN_WRITE] += 1
        return error
    engine.rx.packets += 1
    engine.rx.bytes += view.length
    if at != NO_PEER:
        peer = &engine.received[table.routes[at].slot]
        peer.packets += 1
        peer.bytes += view.length
        peer.last_ms = now
    return 0


cdef void pump_rx(engine_state* engine) noexcept nogil:
    cdef const fib_table* table
    cdef int got, i, error
    cdef uint64_t now
    while not load_u64(&engine.stopping):
        for i in range(BATCH):
            engine.incoming.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in)
        got = recvmmsg(engine.udp, engine.incoming.messages, BATCH, MSG_DONTWAIT, NULL)
        if got < 0:
            if errno == EAGAIN:
                wait_for(engine, &engine.rx, engine.udp, POLLIN)
            elif errno != EINTR:
                rest(engine)
            continue
        engine.rx.batches += 1
        now = now_ms()
        table = enter(engine, &engine.rx)
        for i in range(got):
            error = take_datagram(engine, table, i, now)
            if error == -EBADFD:
                park(engine, &engine.rx, -error)
                break
        leave(&engine.rx)


cdef uint8_t* map_buffers() noexcept:
    """BATCH buffers; pages that no packet has touched cost no memory."""
    cdef void* memory = mmap(
        NULL, <size_t>BATCH * BUFFER_STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    return NULL if memory == MAP_FAILED else <uint8_t*>memory


cdef class Engine:
    """The two pumps around one TUN and one UDP socket; `icmp` is a raw socket that takes whole packets, for the errors
    that pods get. The descriptors stay the caller's."""

    cdef engine_state* state
    cdef Fib fib
    cdef list retired        # (generation in which it was replaced, table)

    def __cinit__(self, int tun, int udp, int icmp, *, int port, uint32_t icmp_source, int source_check, uint32_t slots):
        cdef engine_state* state = <engine_state*>calloc(1, sizeof(engine_state))
        cdef unsigned int i
        if state == NULL:
            raise MemoryError
        self.state = state
        state.stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        state.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if state.stop_fd < 0 or state.event_fd < 0:
            raise OSError(errno, "eventfd")
        state.tun = tun
        state.udp = udp
        state.icmp = icmp
        state.port_be = htons(<uint16_t>port)
        state.icmp_source = icmp_source
        state.check = source_check
        state.slots = slots
        state.icmp_tokens = ICMP_BURST
        state.sent = <peer_counters*>calloc(slots, sizeof(peer_counters))
        state.received = <peer_counters*>calloc(slots, sizeof(peer_counters))
        state.tx_buffers = map_buffers()
        state.rx_buffers = map_buffers()
        if not (udp_batch_init(&state.outgoing, BATCH) and udp_batch_init(&state.incoming, BATCH) and state.sent
                and state.received and state.tx_buffers and state.rx_buffers):
            raise MemoryError
        for i in range(BATCH):
            state.incoming.vectors[i].iov_base = state.rx_buffers + <size_t>i * BUFFER_STRIDE
            state.incoming.vectors[i].iov_len = BUFFER_BYTES
        self.retired = []
        self.fib = Fib()
        state.table = self.fib.table
        state.generation = 1

    def __dealloc__(self):
        cdef engine_state* state = self.state
        if state == NULL:
            return
        if state.stop_fd > 0:
            close(state.stop_fd)
        if state.event_fd > 0:
            close(state.event_fd)
        udp_batch_free(&state.outgoing)
        udp_batch_free(&state.incoming)
        free(state.sent)
        free(state.received)
        if state.tx_buffers != NULL:
            munmap(state.tx_buffers, <size_t>BATCH * BUFFER_STRIDE)
        if state.rx_buffers != NULL:
            munmap(state.rx_buffers, <size_t>BATCH * BUFFER_STRIDE)
        free(state)

    @property
    def event_fd(self):
        """Readable while `events` has something to tell."""
        return self.state.event_fd

    def transmit(self):
        """Body of the TX thread: returns after `stop`."""
        with nogil:
            pump_tx(self.state)

    def receive(self):
        """Body of the RX thread: returns after `stop`."""
        with nogil:
            pump_rx(self.state)

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
        "batches": pump.batches,
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
