"""Owns the fuzz targets: decapsulation, encapsulation, segmentation, coalescing and the taps that look on, run without
any Python object.

Every packet ends where its memory ends, so that a byte read too far is a crash; what the engine writes is held against
properties that are checked in the plainest way. An execution depends on its number alone, and that number stands in
shared memory before it begins: a crash can be repeated. What the taps recorded is read behind each block of executions.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcmp, memcpy, memset

from dataplane._coalesce cimport chain_packets, mark_unfinished, packet_chain, packet_ref, stamp_superframe
from dataplane._deliver cimport PACKETS
from dataplane._fib cimport Fib
from dataplane._fib_table cimport fib_table
from dataplane._pump cimport engine_state
from dataplane._rx cimport rx_state, take_message
from dataplane._segment cimport finish_checksum, plan_split, split_plan, stamp_segment
from dataplane._tap cimport TapSet, tap_set
from dataplane._tx cimport HEADROOM, ICMP_BURST, take_packet, tap_parts, tx_state
from dataplane._udpio cimport RUN_DATAGRAMS, add_control, facts_of, prepare_inbox, udp_run
from dataplane.abi cimport *
from dataplane.headers cimport (
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAME_HEAD, ICMP_MOST, VXLAN_HEADER, build_icmp_error, decap_ecn, ip_view,
    may_answer_with_icmp, parse_frame_head, parse_ip, write_frame_head,
)
from seeds cimport *

cdef enum:
    BATCH = 12               # packets that are coalesced together
    LARGE = 1 << 17          # bytes of the slots that hold whole superframes
    SLOTS = 16               # peers' counters, of both IP versions
    BLOCK = 4096             # executions between two looks into the taps

cdef struct bench:
    engine_state* engine
    rx_state* rx
    tx_state* tx
    uint8_t* packets[BATCH]  # ends of memory
    uint8_t* large
    uint8_t* whole
    uint8_t* stamp
    packet_ref refs[BATCH]
    packet_chain chains[PACKETS]
    uint8_t taken[PACKETS]
    uint32_t order[PACKETS]  # when each packet left
    uint64_t segments        # that were cut
    uint64_t merged          # packets that left in superframes
    uint64_t accepted        # datagrams that decapsulation took
    uint8_t expected[65536]
    uint8_t found[65536]
    uint64_t wrong
    const tap_set* taps[2]   # of packets, and of frames
    bint reached             # by this execution: a superframe was cut or made
    const char* broken       # the property that did not hold


cdef inline bint must(bench* b, bint holds, const char* what) noexcept nogil:
    if not holds and b.broken == NULL:
        b.broken = what
    return holds


# -------------------------------------------------------------------------------------------------- segmentation

cdef void check_segment(bench* b, const split_plan* plan, uint32_t index, uint32_t payload, const uint8_t* out) noexcept nogil:
    """The headers are the superframe's with lengths, numbers and flags of this segment."""
    cdef uint8_t* expected = b.expected
    cdef uint8_t* found = b.found
    cdef uint8_t* l4 = expected + plan.l4
    cdef uint32_t check = plan.l4 + (16 if plan.protocol == 6 else 6)
    memcpy(expected, plan.packet, plan.header)
    memcpy(found, out, plan.header)
    if expected[0] >> 4 == 4:
        put16(expected + 2, plan.header + payload)
        put16(expected + 4, get16(plan.packet + 4) + index)
        put16(expected + 10, 0)
        must(b, plain_sum(found, plan.l4, 0) == 0xFFFF, b"a segment's IP header checksum is right")
        put16(found + 10, 0)
    else:
        put16(expected + 4, plan.header - 40 + payload)
    if plan.protocol == 6:
        put32(l4 + 4, get32(l4 + 4) + index * plan.size)
        if index:
            l4[13] &= 0x7F
        if index + 1 < plan.segments:
            l4[13] &= 0xF6
    else:
        put16(l4 + 4, plan.header - plan.l4 + payload)
    put16(expected + check, 0)
    put16(found + check, 0)
    must(b, memcmp(expected, found, plan.header) == 0, b"a segment's headers are the superframe's")


cdef void check_segments(bench* b, const split_plan* plan, uint32_t length, bint sound) noexcept nogil:
    """`sound`: the superframe's own checksum was right, so each segment's is."""
    cdef uint32_t index, payload, total = 0, sum, protocol = plan.protocol
    cdef uint8_t* out = b.stamp - plan.header
    must(b, plan.header < length, b"headers lie within the superframe")
    for index in range(plan.segments):
        payload = stamp_segment(plan, index, out)
        must(b, 0 < payload <= plan.size and (payload == plan.size or index + 1 == plan.segments),
             b"only the last segment is short, and none empty")
        if not must(b, plan.header + total + payload <= length, b"segments lie within the superframe"):
            return
        check_segment(b, plan, index, payload, out)
        if sound:
            sum = pseudo(out, protocol, plan.header - plan.l4 + payload)
            sum = plain_sum(out + plan.l4, plan.header - plan.l4, sum)
            sum = plain_sum(plan.packet + plan.header + total, payload, sum)
            must(b, sum == 0xFFFF, b"a segment's checksum is right")
        total += payload
        b.segments += 1
    must(b, total == length - plan.header, b"segments carry the payload once")


cdef uint32_t make_superframe(uint64_t* state, uint8_t* end, virtio_net_hdr* header, bint v6, uint8_t** packet) noexcept nogil:
    cdef flow_seed flow
    cdef packet_shape shape
    cdef uint32_t payload = 1 + below(state, 400)
    draw_flow(state, &flow, v6)
    flow.extension = 8 * below(state, 20 if one_in(state, 8) else 3) if flow.v6 and one_in(state, 4) else 0
    shape = shape_of(&flow)
    if one_in(state, 64):
        payload = 1 + below(state, 65535 - shape.header)
    packet[0] = end - shape.header - payload
    write_packet(state, &flow, packet[0], payload, <uint8_t>(draw(state) | 0x10), False)
    header.flags = 1
    header.gso_type = 5 if not flow.tcp else 4 if flow.v6 else 1
    if flow.tcp and one_in(state, 4):
        header.gso_type |= 0x80
    header.hdr_len = <uint16_t>shape.header
    header.gso_size = <uint16_t>(1 + payload // 20 + below(state, payload // 2 + 1))
    header.csum_start = <uint16_t>shape.l4
    header.csum_offset = 16 if flow.tcp else 6
    return shape.header + payload


cdef void spoil_header(uint64_t* state, virtio_net_hdr* header, uint32_t length) noexcept nogil:
    cdef uint32_t kind = below(state, 6)
    cdef uint16_t near = <uint16_t>(length - 24 + below(state, 48))
    if kind == 0:
        header.flags = <uint8_t>draw(state)
    elif kind == 1:
        header.gso_type = <uint8_t>(below(state, 8) | (draw(state) & 0x80))
    elif kind == 2:
        header.hdr_len = <uint16_t>draw(state)
    elif kind == 3:
        header.gso_size = <uint16_t>(draw(state) if one_in(state, 2) else below(state, 3))
    elif kind == 4:
        header.csum_start = near if one_in(state, 2) else <uint16_t>below(state, 70)
    else:
        header.csum_offset = <uint16_t>(draw(state) if one_in(state, 2) else below(state, 24))


cdef void fuzz_segment(bench* b, uint64_t* state) noexcept nogil:
    cdef virtio_net_hdr header
    cdef split_plan plan
    cdef uint8_t* packet
    cdef uint32_t length = make_superframe(state, b.large, &header, one_in(state, 2), &packet)
    cdef bint sound = True
    if one_in(state, 3):
        sound = False
        spoil_header(state, &header, length)
    if one_in(state, 3):
        sound = False
        length = spoil(state, &packet, length)
    if plan_split(&header, packet, length, &plan):
        check_segments(b, &plan, length, sound)
        b.reached |= plan.segments > 1
    else:
        must(b, not sound, b"a sound superframe is cut")
        finish_checksum(&header, packet, length)


# ---------------------------------------------------------------------------------------------------- coalescing

cdef void check_round_trip(bench* b, const packet_ref* refs, const packet_chain* chain) noexcept nogil:
    """What was merged is cut into the packets that came: identifications of atomic datagrams apart."""
    cdef virtio_net_hdr header
    cdef split_plan plan
    cdef const packet_ref* first = &refs[chain.first]
    cdef const packet_ref* packet = first
    cdef uint32_t length = first.header + chain.payload, index = 0, at = 0
    cdef uint8_t* whole = b.whole - length
    cdef uint8_t* out = b.stamp - first.header
    memset(&header, 0, sizeof(header))
    stamp_superframe(refs, chain, &header, out)
    memcpy(whole, out, first.header)
    while True:
        must(b, packet.segment == 0, b"a superframe is not merged")
        must(b, packet.check_start or all_right(packet.data, packet.l4, packet.protocol, packet.length),
             b"only right checksums are merged")
        memcpy(whole + first.header + at, packet.data + packet.header, packet.payload)
        at += packet.payload
        if packet.next == NO_PEER:
            break
        packet = &refs[packet.next]
    if not must(b, plan_split(&header, whole, length, &plan), b"what was merged can be cut"):
        return
    must(b, plan.segments == chain.count and plan.header == first.header, b"it is cut into as many packets")
    packet = first
    while True:
        at = stamp_segment(&plan, index, out)
        must(b, at == packet.payload, b"each packet gets its payload back")
        if out[0] >> 4 == 4 and out[6] & 0x40:
            memcpy(out + 4, packet.data + 4, 2)
            memcpy(out + 10, packet.data + 10, 2)
        if packet.check_start:
            memcpy(out + packet.check_start + packet.check_offset,
                   packet.data + packet.check_start + packet.check_offset, 2)
        must(b, memcmp(out, packet.data, first.header) == 0, b"each packet gets its headers back")
        index += 1
        if packet.next == NO_PEER:
            return
        packet = &refs[packet.next]


cdef inline bint unreadable(const packet_ref* packet) noexcept nogil:
    """A packet that might be of any flow."""
    if packet.length >= 20 and packet.data[0] >> 4 == 4:
        return packet.data[0] != 0x45 or get16(packet.data + 6) & 0x3FFF or get16(packet.data + 2) != packet.length
    return packet.length < 40 or packet.data[0] >> 4 != 6


cdef inline bint one_flow(const packet_ref* a, const packet_ref* b) noexcept nogil:
    cdef uint32_t l4 = 20 if a.data[0] >> 4 == 4 else 40, start = 12 if l4 == 20 else 8
    if a.length < l4 + 4 or b.length < l4 + 4 or a.data[0] >> 4 != b.data[0] >> 4:
        return False
    if a.data[9 if l4 == 20 else 6] != b.data[9 if l4 == 20 else 6] or a.data[9 if l4 == 20 else 6] not in (6, 17):
        return False
    return memcmp(a.data + start, b.data + start, l4 + 4 - start) == 0


cdef void check_order(bench* b, const packet_ref* refs, uint32_t count) noexcept nogil:
    """Of a flow, and around what might be of any flow, packets leave as they came."""
    cdef uint32_t i, j
    cdef bint any_flow
    for i in range(count):
        any_flow = unreadable(&refs[i])
        for j in range(i):
            if any_flow or unreadable(&refs[j]) or one_flow(&refs[i], &refs[j]):
                must(b, b.order[j] < b.order[i], b"no packet overtakes another of its flow")


cdef void check_chains(bench* b, packet_ref* refs, uint32_t count, bint tcp, bint udp) noexcept nogil:
    cdef uint32_t made = chain_packets(refs, count, b.chains, tcp, udp, &b.wrong)
    cdef uint32_t i, at, last, packets, payload, left = 0
    cdef packet_chain* chain
    memset(b.taken, 0, count)
    must(b, made <= count, b"no more chains than packets")
    for i in range(made):
        chain = &b.chains[i]
        packets = payload = 0
        last = at = chain.first
        while at != NO_PEER and packets <= count:
            if not must(b, at < count and not b.taken[at], b"each packet is in one chain, once"):
                return
            b.taken[at] = 1
            b.order[at] = left
            left += 1
            packets += 1
            payload += refs[at].payload
            last = at
            at = refs[at].next
        must(b, packets == chain.count and last == chain.last, b"a chain counts its packets")
        if packets > 1:
            must(b, payload == chain.payload, b"a chain counts its payload")
            must(b, tcp if refs[chain.first].protocol == 6 else udp, b"only what may be merged is")
            check_round_trip(b, refs, chain)
            b.merged += packets
            b.reached = True
    must(b, left == count, b"every packet leaves")
    if count <= 64:
        check_order(b, refs, count)


cdef void fuzz_coalesce(bench* b, uint64_t* state) noexcept nogil:
    cdef flow_seed flows[2]
    cdef flow_seed* flow
    cdef uint32_t count = 2 + below(state, BATCH - 1), i, payload, size = 1 + below(state, 1200 if one_in(state, 8) else 120)
    cdef uint8_t flags
    cdef ip_view view
    for i in range(2):
        draw_flow(state, &flows[i], one_in(state, 2))
    for i in range(count):
        flow = &flows[one_in(state, 4)]
        payload = size if not one_in(state, 10) else below(state, size + 2)
        flags = 0x10 if not one_in(state, 10) else <uint8_t>(0x10 | draw(state))
        b.refs[i].data = b.packets[i] - shape_of(flow).header - payload
        b.refs[i].length = write_packet(state, flow, b.refs[i].data, payload, flags, not one_in(state, 6))
        b.refs[i].check_start = b.refs[i].segment = 0
        if not one_in(state, 30):
            flow.sequence += payload
            flow.identification += 1
        if one_in(state, 16):
            b.refs[i].length = spoil(state, &b.refs[i].data, b.refs[i].length)
        if parse_ip(b.refs[i].data, b.refs[i].length, &view) == DROP_REASONS and view.length == b.refs[i].length:
            mark_unfinished(&b.refs[i], &view)
    check_chains(b, b.refs, count, not one_in(state, 16), not one_in(state, 16))


# ------------------------------------------------------------------------------------------ the ways of both pumps

cdef inline void peer_mac(uint8_t* mac, uint32_t peer) noexcept nogil:
    memset(mac, 0, 6)
    mac[0] = 2
    mac[5] = <uint8_t>peer


cdef inline uint64_t all_drops(const uint64_t* drops) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(DROP_REASONS):
        total += drops[i]
    return total


cdef void put_control(uint64_t* state, msghdr* message, uint8_t* memory, int gro, int ecn, bint v6) noexcept nogil:
    """What the kernel says beside a message, now and then garbled."""
    cdef uint8_t tos = <uint8_t>ecn
    cdef size_t size = CMSG_SPACE(sizeof(int))
    message.msg_control = memory
    message.msg_controllen = 0
    add_control(message, memory, SOL_UDP, UDP_GRO, &gro, sizeof(int))
    if v6:
        add_control(message, memory, SOL_IPV6, IPV6_TCLASS, &ecn, sizeof(int))
    else:
        add_control(message, memory, SOL_IP, IP_TOS, &tos, 1)
    if one_in(state, 24):
        memory[below(state, <uint32_t>message.msg_controllen)] = <uint8_t>draw(state)
    if one_in(state, 24):
        message.msg_controllen = below(state, <uint32_t>message.msg_controllen + 1)


cdef void put_source(rx_state* rx, uint32_t peer, bint v6) noexcept nogil:
    """198.18.0.N or fd00:198:18::N"""
    memset(&rx.inbox.sources[0], 0, sizeof(rx.inbox.sources[0]))
    if v6:
        rx.inbox.sources[0].v6.sin6_family = AF_INET6
        put32(rx.inbox.sources[0].v6.sin6_addr.s6_addr, <uint32_t>0xFD000198)
        put16(rx.inbox.sources[0].v6.sin6_addr.s6_addr + 4, 0x18)
        put16(rx.inbox.sources[0].v6.sin6_addr.s6_addr + 14, peer)
    else:
        rx.inbox.sources[0].v4.sin_family = AF_INET
        rx.inbox.sources[0].v4.sin_addr.s_addr = htonl(<uint32_t>0xC6120000 | peer)


cdef void check_accepted(bench* b, const uint8_t* first, bint v6, uint32_t peer) noexcept nogil:
    cdef uint32_t i, source
    cdef const packet_ref* packet
    for i in range(b.rx.outbox.count):
        packet = &b.rx.outbox.packets[i]
        must(b, packet.data >= first and packet.length >= 20 and packet.data + packet.length <= b.large,
             b"a packet lies within its message")
        if b.engine.check == CHECK_STRICT:
            source = get32(packet.data + (20 if packet.data[0] >> 4 == 6 else 12))
            must(b, source >> 8 == <uint32_t>0x0A0100 | peer, b"a source is its peer's")
        if packet.segment:
            must(b, b.engine.vxlan and packet.check_start, b"a superframe comes in a frame, its checksum unfinished")
        if b.engine.vxlan:
            must(b, packet.data[0] >> 4 == (6 if v6 else 4), b"a device carries its IP version only")


cdef inline void arm(bench* b, uint64_t* state) noexcept nogil:
    """Somebody looks on every other time."""
    b.engine.rx.taps = b.engine.tx.taps = b.taps[b.engine.vxlan] if one_in(state, 2) else NULL


cdef void fuzz_receive(bench* b, uint64_t* state) noexcept nogil:
    """A message as UDP_GRO hands it over: datagrams of one size, the last may be shorter; packets, or frames, or one frame
    with a superframe in it."""
    cdef rx_state* rx = b.rx
    cdef engine_state* engine = b.engine
    cdef msghdr* message = &rx.inbox.messages[0].msg_hdr
    cdef flow_seed flow
    cdef uint32_t count = 1 + below(state, 9), size, tail, header, length, i, peer = 1 + below(state, 6)
    cdef uint8_t* at
    cdef uint8_t mac[6]
    cdef bint v6 = one_in(state, 2), super_ = False
    cdef int gro, ecn = <int>below(state, 4)
    cdef uint64_t before
    engine.vxlan = one_in(state, 2)
    arm(b, state)
    engine.link.ethertype = ETHERTYPE_IPV6 if v6 else ETHERTYPE_IPV4
    draw_flow(state, &flow, v6)
    if not one_in(state, 8):
        flow.source = (flow.source & <uint32_t>0xFFFF00FF) | (peer << 8)
    header = shape_of(&flow).header
    size = 1 + below(state, 200)
    if engine.vxlan and one_in(state, 4):
        super_ = True
        count = 1
        size = 1 + below(state, 4000)
    tail = 1 + below(state, size)
    if engine.vxlan:
        header += FRAME_HEAD
    length = (count - 1) * (header + size) + header + tail
    gro = <int>(header + size if count > 1 else length)
    if super_ and one_in(state, 2):
        gro = <int>below(state, length) + 1
    at = b.large - length
    rx.inbox.parts[0].iov_base = at
    peer_mac(mac, peer)
    for i in range(count):
        if i + 1 == count:
            size = tail
        if engine.vxlan:
            write_frame_head(at, &engine.link, engine.link.mac, 6 if v6 else 4)
            memcpy(at + VXLAN_HEADER + 6, mac, 6)
            write_packet(state, &flow, at + FRAME_HEAD, size, 0x10, one_in(state, 2))
        else:
            write_packet(state, &flow, at, size, 0x10, True)
        flow.sequence += size
        flow.identification += 1
        if one_in(state, 20):
            at[below(state, header + size)] ^= <uint8_t>(1 << below(state, 8))
        at += header + size
    rx.inbox.messages[0].msg_len = length
    if one_in(state, 12):
        rx.inbox.messages[0].msg_len = below(state, length + 1)
        rx.inbox.parts[0].iov_base = b.large - rx.inbox.messages[0].msg_len
    if one_in(state, 12):
        gro = <int>draw(state) if one_in(state, 2) else <int>below(state, 64)
    put_control(state, message, rx.inbox.control[0], gro, ecn, engine.vxlan and v6)
    put_source(rx, peer, engine.vxlan and v6)
    engine.check = <int>below(state, 3)
    before = all_drops(engine.rx.drops) + engine.rx.packets
    size = facts_of(&rx.inbox, 0).size
    count = (rx.inbox.messages[0].msg_len + size - 1) // size if size else 1
    take_message(engine, rx, <const fib_table*>engine.table, 0, 1)
    i = <uint32_t>(all_drops(engine.rx.drops) + engine.rx.packets - before) + rx.outbox.count
    must(b, rx.outbox.count <= PACKETS and (i == count or (engine.vxlan and i == 1)),
         b"every datagram is accepted, delivered or dropped")
    check_accepted(b, b.large - length, v6, peer)
    b.accepted += rx.outbox.count
    check_chains(b, rx.outbox.packets, rx.outbox.count, True, True)
    rx.outbox.count = 0


cdef void check_run(bench* b, const udp_run* run) noexcept nogil:
    """One size for all but the last, as UDP_SEGMENT cuts."""
    cdef uint32_t part, bytes = 0
    for part in range(run.used):
        bytes += <uint32_t>run.parts[part].iov_len
    # one that is longer than any datagram goes alone, to be refused
    must(b, bytes == run.bytes and (bytes <= 65507 or run.count == 1), b"a run counts its bytes")
    must(b, 0 < run.count <= RUN_DATAGRAMS and (run.count - 1) * run.size < bytes <= run.count * run.size,
         b"a run's datagrams are of one size")


cdef void fuzz_transmit(bench* b, uint64_t* state) noexcept nogil:
    cdef tx_state* tx = b.tx
    cdef engine_state* engine = b.engine
    cdef split_plan plan
    cdef uint8_t* packet
    cdef bint v6 = one_in(state, 2)
    cdef uint32_t length = make_superframe(state, b.large, &tx.header, v6, &packet)
    cdef uint32_t i, datagrams = 0
    cdef uint64_t dropped, cut = engine.tx.superframes
    cdef ip_view view
    engine.vxlan = one_in(state, 2)
    arm(b, state)
    engine.senders_count = 1 + below(state, 8)
    if one_in(state, 4):
        spoil_header(state, &tx.header, length)
    if one_in(state, 4):
        length = spoil(state, &packet, length)
    if one_in(state, 8):
        memset(&tx.header, 0, sizeof(virtio_net_hdr))
    plan.segments = 1
    if tx.header.gso_type and parse_ip(packet, length, &view) == DROP_REASONS:
        plan_split(&tx.header, packet, view.length, &plan)
    dropped = all_drops(engine.tx.drops)
    tx.buffers = packet - HEADROOM           # where the batch's first packet lies
    take_packet(engine, tx, <const fib_table*>engine.table, packet, length)
    for i in range(tx.outbox.count):
        check_run(b, &tx.outbox.runs[i])
        datagrams += tx.outbox.runs[i].count
        if engine.tx.taps != NULL:
            tap_parts(engine, tx, &tx.outbox.runs[i], 0, tx.outbox.runs[i].used, DROP_REASONS)
        must(b, tx.outbox.runs[i].socket < engine.senders_count, b"a run has a socket")
        must(b, engine.vxlan or tx.outbox.runs[i].ecn == 0, b"only frames carry congestion marks outside")
    dropped = all_drops(engine.tx.drops) - dropped
    must(b, dropped + datagrams == 1 or dropped + datagrams == plan.segments, b"every datagram is in a run, or dropped")
    b.reached |= engine.tx.superframes > cut and plan.segments > 1
    tx.outbox.count = 0
    tx.stamped = 0


cdef void fuzz_icmp(bench* b, uint64_t* state) noexcept nogil:
    cdef flow_seed flow
    cdef ip_view view
    cdef uint8_t* packet
    cdef uint8_t* out = b.stamp - ICMP_MOST
    cdef uint8_t source[16]
    cdef uint32_t length, header, payload = below(state, 1400)
    cdef bint too_big = one_in(state, 2)
    draw_flow(state, &flow, one_in(state, 2))
    flow.extension = 8 * below(state, 4) if flow.v6 else 0
    packet = b.packets[0] - shape_of(&flow).header - payload
    length = write_packet(state, &flow, packet, payload, 0x10, True)
    if one_in(state, 2):
        length = spoil(state, &packet, length)
    if parse_ip(packet, length, &view) != DROP_REASONS:
        return
    memset(source, 1, 16)
    must(b, view.length <= length, b"a packet's length is no more than was read")
    if may_answer_with_icmp(packet, &view, too_big):
        length = <uint32_t>build_icmp_error(out, source, 1400 if too_big else 0, packet, &view)
        header = 20 if view.version == 4 else 40
        must(b, header + 8 < length <= <uint32_t>(576 if view.version == 4 else ICMP_MOST), b"an ICMP error is short")
        must(b, plain_sum(out + header, length - header, pseudo(out, 58, length - header) if header == 40 else 0) == 0xFFFF,
             b"an ICMP error's checksum is right")
        must(b, header == 40 or plain_sum(out, 20, 0) == 0xFFFF, b"an ICMP error's IP checksum is right")


cdef void fuzz_frame(bench* b, uint64_t* state) noexcept nogil:
    """Heads of frames, and congestion marks of whatever parses as a packet."""
    cdef flow_seed flow
    cdef ip_view view
    cdef uint8_t* frame
    cdef uint8_t* packet
    cdef uint32_t length, payload = below(state, 40)
    cdef int verdict
    draw_flow(state, &flow, one_in(state, 2))
    packet = b.packets[0] - shape_of(&flow).header - payload
    length = write_packet(state, &flow, packet, payload, 0x10, True)
    frame = packet - FRAME_HEAD
    b.engine.link.ethertype = ETHERTYPE_IPV6 if flow.v6 else ETHERTYPE_IPV4
    write_frame_head(frame, &b.engine.link, b.engine.link.mac, 6 if flow.v6 else 4)
    frame[VXLAN_HEADER + 6] ^= 2
    verdict = parse_frame_head(frame, FRAME_HEAD + length, &b.engine.link)
    must(b, verdict == DROP_REASONS, b"a sound frame is taken")
    length = spoil(state, &frame, FRAME_HEAD + length)
    verdict = parse_frame_head(frame, length, &b.engine.link)
    must(b, verdict != DROP_REASONS or length >= FRAME_HEAD, b"a frame that is taken has a whole head")
    if verdict == DROP_REASONS and parse_ip(frame + FRAME_HEAD, length - FRAME_HEAD, &view) == DROP_REASONS:
        decap_ecn(frame + FRAME_HEAD, <uint8_t>below(state, 4))


cdef inline void execute(bench* b, uint64_t number) noexcept nogil:
    cdef uint64_t state = seeded(number)
    cdef uint32_t target = below(&state, 16)
    b.reached = False
    if target < 6:
        fuzz_segment(b, &state)
    elif target < 10:
        fuzz_coalesce(b, &state)
    elif target < 13:
        fuzz_receive(b, &state)
    elif target < 15:
        fuzz_transmit(b, &state)
    elif one_in(&state, 2):
        fuzz_icmp(b, &state)
    else:
        fuzz_frame(b, &state)


cdef bint prepare(bench* b, Fib fib, int sink):
    """False where memory is short. Descriptors of the engine are `sink`, or none at all."""
    cdef int i
    b.engine = <engine_state*>calloc(1, sizeof(engine_state))
    b.rx = <rx_state*>calloc(1, sizeof(rx_state))
    b.tx = <tx_state*>calloc(1, sizeof(tx_state))
    b.large = guarded(LARGE)
    b.whole = guarded(LARGE)
    b.stamp = guarded(LARGE)
    if not (b.engine and b.rx and b.tx and b.large and b.whole and b.stamp):
        return False
    for i in range(BATCH):
        b.packets[i] = guarded(PAGE)
        if b.packets[i] == NULL:
            return False
    b.engine.table = fib.table
    b.engine.rx.table = b.engine.tx.table = fib.table
    b.engine.tun = sink
    b.engine.udp = b.engine.icmp_v4 = b.engine.icmp_v6 = b.engine.stop_fd = b.engine.event_fd = -1
    b.engine.senders_count = 1
    for i in range(8):
        b.engine.senders[i] = -1
    b.engine.flow_keys[0] = 1
    b.engine.flow_keys[1] = 2
    b.engine.segment_mtu = 1400
    b.engine.link.head[0] = 0x08
    b.engine.link.head[6] = 1
    memset(b.engine.link.mac, 2, 6)
    memset(b.engine.link.head + VXLAN_HEADER + 6, 2, 6)
    b.engine.slots = SLOTS
    b.engine.sent = <peer_counters*>calloc(SLOTS, sizeof(peer_counters))
    b.engine.received = <peer_counters*>calloc(SLOTS, sizeof(peer_counters))
    b.engine.merge_tcp = b.engine.merge_udp = True
    b.tx.outbox.most = RUN_DATAGRAMS
    b.tx.icmp_tokens = ICMP_BURST
    prepare_inbox(&b.rx.inbox, b.large - LARGE, 0, 0)
    return b.engine.sent != NULL and b.engine.received != NULL


def run(uint64_t first, uint64_t count, Fib fib not None, list taps not None, TapSet of_packets not None,
        TapSet of_frames not None, int sink, uint64_t[::1] position not None):
    """Execute `count` executions from number `first` on; `position[0]` is the number of the current one. `taps` are
    those of both sets. Returns what was reached, and the number and property of the first that failed. Call it once in
    a process: nothing is freed."""
    cdef bench* b = <bench*>calloc(1, sizeof(bench))
    cdef uint64_t number = first, reached = 0, end
    cdef uint64_t* now = &position[0]
    if b == NULL or not prepare(b, fib, sink):
        raise MemoryError
    b.taps[0] = &of_packets.armed
    b.taps[1] = &of_frames.armed
    while number < first + count and b.broken == NULL:
        end = min(number + BLOCK, first + count)
        with nogil:
            while number < end and b.broken == NULL:
                store_u64(now, number)
                execute(b, number)
                reached += b.reached
                number += 1
        for tap in taps:
            while len(tap.drain(<uint64_t>-1, BLOCK)):
                pass
    return {
        "executions": number - first,
        "reached": reached,
        "segments": b.segments,
        "merged": b.merged,
        "accepted": b.accepted,
        "tapped": sum([tap.statistics[0] for tap in taps]),
        "failed": None if b.broken == NULL else (number - 1, (<bytes>b.broken).decode()),
    }
