# Owns the RX pump: from datagrams to packets that may be delivered (_deliver.pxd). Read it from the bottom up:
# receive_batch is the way of a batch.
#
# Free of what the TUN takes and how. Invariant: each datagram is put up for delivery or counted under one reason, and what
# is put up lies in the inbox until the batch is delivered.

from libc.errno cimport EAGAIN, EBADFD, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

from dataplane.abi cimport *
from dataplane._coalesce cimport mark_superframe, mark_unfinished, packet_ref
from dataplane._deliver cimport deliver, put_up, tun_outbox
from dataplane._fib_table cimport fib_route, fib_source, fib_table
from dataplane._pump cimport (
    EMPTIED, MORE_WAITS, NOTHING, batch_end, engine_state, enter, leave, name_lease, now_ms, park, post_event, rest,
)
from dataplane._tap cimport TAP_RX, name_remote, tap_bytes, tap_record, wall_ns
from dataplane._udpio cimport MESSAGES, facts_of, message_facts, receive, source_of, udp_inbox
from dataplane.headers cimport (
    ETHERTYPE_IPV4, FRAME_HEAD, IPV6_HEADER, decap_ecn, ip_view, load_be16, load_be32,
    load_u128, mapped, parse_frame_head, parse_ip,
)

cdef enum:
    LARGE_MESSAGES = 8       # received at once while the kernel merges them: they fill the cache
    SOURCES = 64
    SUPERFRAME_MS = 5000     # between two reports of such from VTEPs
    ETHERNET_SOURCE = 14     # bytes of VXLAN and destination before it

cdef struct unknown_source:
    u128 address
    uint64_t datagrams
    uint64_t reported_ms

cdef struct rx_state:
    udp_inbox inbox
    uint8_t* buffers         # MESSAGES of them, BUFFER_STRIDE apart
    unsigned int most        # messages received at once
    tun_outbox outbox
    uint64_t superframe_told_ms
    unknown_source unknown[SOURCES]
    tap_record about         # what those who look are told of the message in hand


# --------------------------------------------------------------------------------------------------------- taps

cdef inline void begin_tap(engine_state* engine, rx_state* rx, unsigned int i, uint32_t size) noexcept nogil:
    """What a message's datagrams have in common: sender, TOS and TTL, and the superframe if it is one."""
    cdef tap_record* about = &rx.about
    cdef msghdr* message = <msghdr*>&rx.inbox.messages[i].msg_hdr
    cdef cmsghdr* control = CMSG_FIRSTHDR(message)
    about[0] = engine.rx.taps.about
    about.direction = TAP_RX
    about.ns = wall_ns()
    about.ttl = 0
    about.dont_fragment = False
    about.local_port = engine.rx.taps.port
    about.remote_port = ntohs(rx.inbox.sources[i].v4.sin_port)   # the same place as sin6_port
    name_remote(about, source_of(&rx.inbox, i))
    if size < rx.inbox.messages[i].msg_len:
        about.superframe = engine.rx.messages
        about.superframe_bytes = rx.inbox.messages[i].msg_len
    while control != NULL:
        if control.cmsg_level == SOL_IP and control.cmsg_type == IP_TOS:
            about.tos = CMSG_DATA(control)[0]
        elif control.cmsg_level == SOL_IP and control.cmsg_type == IP_TTL:
            about.ttl = <uint8_t>(<int*>CMSG_DATA(control))[0]
        elif control.cmsg_level == SOL_IPV6 and control.cmsg_type == IPV6_TCLASS:
            about.tos = <uint8_t>(<int*>CMSG_DATA(control))[0]
        elif control.cmsg_level == SOL_IPV6 and control.cmsg_type == IPV6_HOPLIMIT:
            about.ttl = <uint8_t>(<int*>CMSG_DATA(control))[0]
        control = CMSG_NXTHDR(message, control)


cdef inline void tap_datagram(engine_state* engine, rx_state* rx, uint32_t peer, const uint8_t* datagram, size_t length,
                              uint8_t drop) noexcept nogil:
    """Show a datagram of the message in hand: accepted, or dropped for `drop`."""
    cdef const fib_table* table = engine.rx.table
    cdef const uint8_t* packet = datagram + rx.about.skip
    cdef uint32_t at = peer
    cdef u128 source = 0
    rx.about.drop = drop
    if rx.about.skip and length >= 8:
        rx.about.vni = load_be32(datagram + 4) >> 8      # as it stands there, which may be why it is dropped
    if length >= rx.about.skip + 20 and packet[0] >> 4 == 4:
        source = mapped(load_be32(packet + 12))
    elif length >= rx.about.skip + 40 and packet[0] >> 4 == 6:
        source = load_u128(packet + 8)
    while at != NO_PEER and source & table.routes[at].mask != table.routes[at].subnet:
        at = table.routes[at].next_same
    name_lease(&rx.about, table, peer if at == NO_PEER else at)      # its first lease, where none holds the source
    tap_bytes(engine.rx.taps, &rx.about, datagram, length)


cdef inline void tap_message(engine_state* engine, rx_state* rx, uint32_t peer, const uint8_t* at, size_t left,
                             size_t size, uint8_t drop) noexcept nogil:
    """Show all datagrams of a message that is dropped as a whole."""
    while left:
        if left < size:
            size = left
        tap_datagram(engine, rx, peer, at, size, drop)
        at += size
        left -= size


cdef inline void note_unknown(engine_state* engine, rx_state* rx, u128 address, uint32_t datagrams) noexcept nogil:
    """Remember who sends without a lease; tell the control plane at most once a second for each."""
    cdef unknown_source* source = &rx.unknown[<uint32_t>((address ^ address >> 64) * <uint32_t>2654435769) >> 26]
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


# --------------------------------------------------------------------------------------------------- acceptance

cdef inline bint may_send(const fib_table* table, uint32_t first, u128 source, int check) noexcept nogil:
    """Whether the inner source belongs to the peer: one masked compare for each of its subnets, nearly always one."""
    cdef const fib_route* route
    while first != NO_PEER:
        route = &table.routes[first]
        if source & route.mask == route.subnet or (check == CHECK_NODE and source == route.address):
            return True
        first = route.next_same
    return False


cdef inline bint has_mac(const fib_table* table, uint32_t first, const uint8_t* mac) noexcept nogil:
    while first != NO_PEER:
        if memcmp(table.routes[first].mac, mac, 6) == 0:
            return True
        first = table.routes[first].next_same
    return False


cdef inline void count_received(engine_state* engine, const fib_table* table, uint32_t peer, u128 source,
                                const packet_ref* packet) noexcept nogil:
    """For the peer's subnet that the source is in, or its first where that is its own address."""
    cdef uint32_t at = peer
    cdef const fib_route* route
    cdef peer_counters* counters
    if peer == NO_PEER:
        return
    while at != NO_PEER:
        route = &table.routes[at]
        if source & route.mask == route.subnet:
            peer = at
            break
        at = route.next_same
    counters = &engine.received[table.routes[peer].slot]
    tally(&counters.packets, (packet.length + packet.segment - 1) // packet.segment if packet.segment else 1)
    tally(&counters.bytes, packet.length)


cdef inline int check_packet(const engine_state* engine, const fib_table* table, uint32_t peer, const uint8_t* packet,
                             size_t length, ip_view* view) noexcept nogil:
    """DROP_REASONS where the packet may be delivered, else why not."""
    cdef int verdict = parse_ip(packet, length, view)
    if verdict == DROP_REASONS and engine.check != CHECK_OFF and not may_send(table, peer, view.source, engine.check):
        return DROP_SPOOFED_SOURCE
    return verdict


cdef inline bint accept_packet(engine_state* engine, rx_state* rx, const fib_table* table, uint32_t peer, uint8_t* data,
                               size_t length) noexcept nogil:
    """Take a datagram that is a packet, or drop it."""
    cdef ip_view view
    cdef int verdict = check_packet(engine, table, peer, data, length, &view)
    if engine.rx.taps != NULL:
        tap_datagram(engine, rx, peer, data, length, <uint8_t>verdict)
    if verdict != DROP_REASONS:
        tally(&engine.rx.drops[verdict], 1)
        return False
    count_received(engine, table, peer, view.source, put_up(engine, &rx.outbox, data, &view))
    return True


cdef inline int check_frame(const engine_state* engine, const fib_table* table, uint32_t peer, const uint8_t* frame,
                            size_t length, ip_view* view) noexcept nogil:
    cdef int verdict = parse_frame_head(frame, length, &engine.link)
    if verdict != DROP_REASONS:
        return verdict
    if engine.check != CHECK_OFF and not has_mac(table, peer, frame + ETHERNET_SOURCE):
        return DROP_PEER_MAC
    verdict = check_packet(engine, table, peer, frame + FRAME_HEAD, length - FRAME_HEAD, view)
    if verdict == DROP_REASONS and (view.version == 4) != (engine.link.ethertype == ETHERTYPE_IPV4):
        return DROP_NOT_IP
    return verdict


cdef inline void tell_superframe(engine_state* engine, rx_state* rx, u128 address, uint64_t length) noexcept nogil:
    """The control plane shall look what MTU the pods have: nothing in the superframe says how it would have been cut."""
    cdef uint64_t now = now_ms()
    if rx.superframe_told_ms == 0 or now - rx.superframe_told_ms >= SUPERFRAME_MS:
        rx.superframe_told_ms = now
        post_event(engine, &engine.rx, EVENT_SUPERFRAME, address, length)


cdef inline bint accept_frame(engine_state* engine, rx_state* rx, const fib_table* table, uint32_t peer, uint8_t* frame,
                              size_t length, uint32_t segment, uint8_t ecn) noexcept nogil:
    """Take a datagram that is a frame, or drop it. Kernel VTEPs leave checksums unfinished, and hand over superframes:
    those of TCP are known by their length only, those of UDP by `segment`, the payload of each of their packets."""
    cdef ip_view view
    cdef packet_ref* packet
    cdef uint32_t mtu
    cdef int verdict = check_frame(engine, table, peer, frame, length, &view)
    if verdict == DROP_REASONS:
        verdict = decap_ecn(frame + FRAME_HEAD, ecn)
    if engine.rx.taps != NULL:
        tap_datagram(engine, rx, peer, frame, length, <uint8_t>verdict)
    if verdict != DROP_REASONS:
        tally(&engine.rx.drops[verdict], 1)
        return False
    packet = put_up(engine, &rx.outbox, frame + FRAME_HEAD, &view)
    mark_unfinished(packet, &view)
    mtu = load_relaxed_u32(&engine.segment_mtu)
    if peer != NO_PEER and (segment or view.length > mtu):
        if mark_superframe(packet, &view, segment, mtu) and segment == 0:
            tell_superframe(engine, rx, table.routes[peer].address, view.length)
    count_received(engine, table, peer, view.source, packet)
    return True


cdef inline uint32_t frame_length(const uint8_t* frame, uint32_t length) noexcept nogil:
    """How long the frame is by its packet's header; 0 where that says nothing."""
    if length < FRAME_HEAD + 6:
        return 0
    if frame[FRAME_HEAD] >> 4 == 4:
        return FRAME_HEAD + load_be16(frame + FRAME_HEAD + 2)
    if frame[FRAME_HEAD] >> 4 == 6:
        return FRAME_HEAD + IPV6_HEADER + load_be16(frame + FRAME_HEAD + 4)
    return 0


cdef inline int drop_message(engine_state* engine, const uint8_t* frame, uint32_t length, uint32_t datagrams) noexcept nogil:
    """A message whose first frame is longer than a datagram and shorter than all: neither can it be cut, nor is it one.
    Returns the reason."""
    cdef int verdict = parse_frame_head(frame, length, &engine.link)
    if verdict == DROP_REASONS:
        verdict = DROP_LENGTH
    tally(&engine.rx.drops[verdict], datagrams)
    return verdict


cdef inline void take_message(engine_state* engine, rx_state* rx, const fib_table* table, unsigned int i,
                              uint64_t now) noexcept nogil:
    """Take a message apart into its datagrams; their outer source is looked at once."""
    cdef uint8_t* at = <uint8_t*>rx.inbox.parts[i].iov_base
    cdef uint32_t left = rx.inbox.messages[i].msg_len
    cdef message_facts facts = facts_of(&rx.inbox, i)
    cdef uint32_t size = facts.size, segment = 0, expected
    cdef u128 source = source_of(&rx.inbox, i)
    cdef uint32_t peer = fib_source(table, source)
    cdef uint32_t datagrams = (left + size - 1) // size if size else 1
    cdef bint any = False
    cdef int verdict
    tally(&engine.rx.messages, 1)
    if engine.rx.taps != NULL:
        begin_tap(engine, rx, i, size)
    if peer == NO_PEER and engine.check != CHECK_OFF:
        tally(&engine.rx.drops[DROP_UNKNOWN_PEER], datagrams)
        if engine.rx.taps != NULL:
            tap_message(engine, rx, NO_PEER, at, left, size, DROP_UNKNOWN_PEER)
        note_unknown(engine, rx, source, datagrams)
        return
    if engine.vxlan and size < left:
        # the kernel tells the size of the datagrams that it merged, or of the packets that a VTEP left uncut
        expected = frame_length(at, left)
        if expected == left:
            segment, size = size, left
        elif expected > size:
            verdict = drop_message(engine, at, size, datagrams)
            if engine.rx.taps != NULL:
                tap_message(engine, rx, peer, at, left, size, <uint8_t>verdict)
            return
    while True:
        if left < size:
            size = left
        if engine.vxlan:
            any |= accept_frame(engine, rx, table, peer, at, size, segment, facts.ecn)
        else:
            any |= accept_packet(engine, rx, table, peer, at, size)
        at += size
        left -= size
        if left == 0:
            break
    if any and peer != NO_PEER:
        store_relaxed(&engine.received[table.routes[peer].slot].last_ms, now)


cdef inline batch_end receive_batch(engine_state* engine, rx_state* rx) noexcept nogil:
    """Carry what waits in the socket, up to a batch."""
    cdef bint emptied
    cdef const fib_table* table
    cdef int got = receive(engine.udp, &rx.inbox, rx.most), i
    cdef uint64_t now, bytes = 0
    tally(&engine.rx.calls, 1)
    if got < 0:
        if errno == EAGAIN:
            return NOTHING
        if errno != EINTR:
            rest(engine)
        return MORE_WAITS
    emptied = got < <int>rx.most
    now = now_ms()
    table = enter(engine, &engine.rx)
    for i in range(got):
        bytes += rx.inbox.messages[i].msg_len
        take_message(engine, rx, table, i, now)
    deliver(engine, &rx.outbox)
    leave(&engine.rx)
    rx.most = LARGE_MESSAGES if bytes > <uint64_t>got * 8192 else MESSAGES
    if rx.outbox.device_error == -EBADFD:
        park(engine, &engine.rx, EBADFD)
    rx.outbox.device_error = 0
    return EMPTIED if emptied else MORE_WAITS
