# Owns the RX pump: from datagrams into the TUN. Read it from the bottom up: pump_rx is the way of a batch.

from libc.errno cimport EAGAIN, EBADFD, EINTR, EINVAL, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from dataplane.abi cimport *
from dataplane._fib cimport fib_route, fib_source, fib_table
from dataplane._offload cimport (
    CHAIN_PACKETS, MOST_HEADER, chain_packets, packet_chain, packet_ref, stamp_superframe,
)
from dataplane._pump cimport (
    engine_state, enter, leave, now_ms, now_ns, park, post_event, rest, stopping, wait_for,
)
from dataplane._tunio cimport tun_write_parts
from dataplane._udpio cimport MESSAGES, datagram_size, receive, source_of, udp_inbox
from dataplane.headers cimport ipv4_view, parse_ipv4

cdef enum:
    PACKETS = 1024           # looked at together; more than that are delivered in several goes
    LARGE_MESSAGES = 8       # received at once while the kernel merges them: they fill the cache
    SOURCES = 64
    UDP_PROTOCOL = 17

cdef struct unknown_source:
    uint32_t address
    uint64_t datagrams
    uint64_t reported_ms

cdef struct rx_state:
    udp_inbox inbox
    uint8_t* buffers         # MESSAGES of them, BUFFER_STRIDE apart
    unsigned int most        # messages received at once
    packet_ref packets[PACKETS]
    packet_chain chains[PACKETS]
    uint32_t count
    iovec parts[CHAIN_PACKETS + 2]
    uint8_t header[MOST_HEADER]
    int device_error
    unknown_source unknown[SOURCES]


cdef inline void note_unknown(engine_state* engine, rx_state* rx, uint32_t address, uint32_t datagrams) noexcept nogil:
    """Remember who sends without a lease; tell the control plane at most once a second for each."""
    cdef unknown_source* source = &rx.unknown[(address * <uint32_t>2654435769) >> 26]
    cdef uint64_t now = now_ms()
    if source.address != address:
        if source.address and now - source.reported_ms < 1000:
            return
        source.address = address
        source.datagrams = 0
        source.reported_ms = 0
    source.datagrams += datagrams
    if source.reported_ms == 0 or now - source.reported_ms >= 1000:
        source.reported_ms = now
        post_event(engine, &engine.rx, EVENT_UNKNOWN_SOURCE, address, source.datagrams)


# ----------------------------------------------------------------------------------------------------- delivery

cdef inline int write_patiently(engine_state* engine, virtio_net_hdr* header, iovec* parts, int count) noexcept nogil:
    """0 or -errno; a TUN that would block is waited for."""
    cdef int error = tun_write_parts(engine.tun, header, parts, count)
    while (error == -EAGAIN or error == -EINTR) and not stopping(engine):
        if error == -EAGAIN:
            wait_for(engine, &engine.rx, engine.tun, POLLOUT)
        error = tun_write_parts(engine.tun, header, parts, count)
    return error


cdef inline void write_packet(engine_state* engine, rx_state* rx, const packet_ref* packet) noexcept nogil:
    cdef virtio_net_hdr header
    cdef int error
    memset(&header, 0, sizeof(header))
    rx.parts[1].iov_base = packet.data
    rx.parts[1].iov_len = packet.length
    error = write_patiently(engine, &header, rx.parts, 2)
    if error:
        engine.rx.drops[DROP_TUN_WRITE] += 1
        rx.device_error = error
    else:
        engine.rx.packets += 1
        engine.rx.bytes += packet.length


cdef inline int write_superframe(engine_state* engine, rx_state* rx, const packet_chain* chain) noexcept nogil:
    """0 or -errno. The payloads are gathered from where the datagrams lie."""
    cdef virtio_net_hdr header
    cdef const packet_ref* packet = &rx.packets[chain.first]
    cdef int count = 2, error
    stamp_superframe(rx.packets, chain, &header, rx.header)
    rx.parts[1].iov_base = rx.header
    rx.parts[1].iov_len = packet.header
    while True:
        rx.parts[count].iov_base = packet.data + packet.header
        rx.parts[count].iov_len = packet.payload
        count += 1
        if packet.next == NO_PEER:
            break
        packet = &rx.packets[packet.next]
    error = write_patiently(engine, &header, rx.parts, count)
    if error == 0:
        engine.rx.superframes += 1
        engine.rx.packets += chain.count
        engine.rx.bytes += chain.payload + <uint64_t>chain.count * rx.packets[chain.first].header
    return error


cdef inline void write_chain(engine_state* engine, rx_state* rx, const packet_chain* chain) noexcept nogil:
    cdef uint32_t at = chain.first
    cdef int error = -EINVAL
    if chain.count > 1:
        error = write_superframe(engine, rx, chain)
        if error == 0:
            return
        if error == -EINVAL:
            # a kernel that does not take what it granted: go on without, from this chain on
            if rx.packets[chain.first].protocol == UDP_PROTOCOL:
                engine.merge_udp = False
                post_event(engine, &engine.rx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_TUN_USO)
            else:
                engine.merge_tcp = False
                post_event(engine, &engine.rx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_TUN_TSO)
    while at != NO_PEER:
        write_packet(engine, rx, &rx.packets[at])
        at = rx.packets[at].next


cdef inline void deliver(engine_state* engine, rx_state* rx) noexcept nogil:
    """Write everything that was accepted, merged where that can be."""
    cdef uint32_t i, made
    if rx.count == 0:
        return
    made = chain_packets(rx.packets, rx.count, rx.chains, engine.merge_tcp, engine.merge_udp)
    for i in range(made):
        write_chain(engine, rx, &rx.chains[i])
    rx.count = 0


# --------------------------------------------------------------------------------------------------- acceptance

cdef inline bint may_send(const fib_table* table, uint32_t first, uint32_t source, int check) noexcept nogil:
    """Whether the inner source belongs to the peer: one masked compare for each of its subnets, nearly always one."""
    cdef const fib_route* route
    while first != NO_PEER:
        route = &table.routes[first]
        if source & route.mask == route.subnet or (check == CHECK_NODE and source == route.address):
            return True
        first = route.next_same
    return False


cdef inline bint accept(engine_state* engine, rx_state* rx, const fib_table* table, uint32_t peer, uint8_t* datagram,
                        size_t length) noexcept nogil:
    """Put one inner packet up for delivery, or drop it."""
    cdef ipv4_view view
    cdef packet_ref* packet
    cdef int verdict = parse_ipv4(datagram, length, &view)
    if verdict == DROP_REASONS and engine.check != CHECK_OFF and not may_send(table, peer, view.source, engine.check):
        verdict = DROP_SPOOFED_SOURCE
    if verdict != DROP_REASONS:
        engine.rx.drops[verdict] += 1
        return False
    if rx.count == PACKETS:
        deliver(engine, rx)
    packet = &rx.packets[rx.count]
    packet.data = datagram
    packet.length = <uint32_t>view.length
    rx.count += 1
    if peer != NO_PEER:
        engine.received[table.routes[peer].slot].packets += 1
        engine.received[table.routes[peer].slot].bytes += view.length
    return True


cdef inline void take_message(engine_state* engine, rx_state* rx, const fib_table* table, unsigned int i,
                              uint64_t now) noexcept nogil:
    """Take a message apart into its datagrams; their outer source is looked at once."""
    cdef uint8_t* at = <uint8_t*>rx.inbox.parts[i].iov_base
    cdef uint32_t left = rx.inbox.messages[i].msg_len
    cdef uint32_t size = datagram_size(&rx.inbox, i)
    cdef uint32_t source = source_of(&rx.inbox, i)
    cdef uint32_t peer = fib_source(table, source)
    cdef uint32_t datagrams = (left + size - 1) // size if size else 1
    cdef bint any = False
    engine.rx.messages += 1
    if peer == NO_PEER and engine.check != CHECK_OFF:
        engine.rx.drops[DROP_UNKNOWN_PEER] += datagrams
        note_unknown(engine, rx, source, datagrams)
        return
    while True:
        if left < size:
            size = left
        any |= accept(engine, rx, table, peer, at, size)
        at += size
        left -= size
        if left == 0:
            break
    if any and peer != NO_PEER:
        engine.received[table.routes[peer].slot].last_ms = now


cdef inline int receive_spinning(engine_state* engine, rx_state* rx) noexcept nogil:
    """A batch of messages. Where none waits, look again for a while before the caller sleeps."""
    cdef int got = receive(engine.udp, &rx.inbox, rx.most)
    cdef uint64_t end
    if got >= 0 or errno != EAGAIN or engine.spin_ns == 0:
        return got
    end = now_ns() + engine.spin_ns
    while got < 0 and errno == EAGAIN and not stopping(engine) and now_ns() < end:
        sched_yield()
        got = receive(engine.udp, &rx.inbox, rx.most)
    return got


cdef inline void pump_rx(engine_state* engine, rx_state* rx) noexcept nogil:
    cdef const fib_table* table
    cdef int got, i
    cdef uint64_t now, bytes
    while not stopping(engine):
        got = receive_spinning(engine, rx)
        engine.rx.calls += 1
        if got < 0:
            if errno == EAGAIN:
                wait_for(engine, &engine.rx, engine.udp, POLLIN)
            elif errno != EINTR:
                rest(engine)
            continue
        now = now_ms()
        bytes = 0
        table = enter(engine, &engine.rx)
        for i in range(got):
            bytes += rx.inbox.messages[i].msg_len
            take_message(engine, rx, table, i, now)
        deliver(engine, rx)
        leave(&engine.rx)
        rx.most = LARGE_MESSAGES if bytes > <uint64_t>got * 8192 else MESSAGES
        if rx.device_error == -EBADFD:
            park(engine, &engine.rx, EBADFD)
        rx.device_error = 0
