# Owns the TX pump: from the TUN into runs of datagrams. Read it from the bottom up: transmit_batch is the way of a batch.

from libc.errno cimport EAGAIN, EBADFD, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from dataplane.abi cimport *
from dataplane._fib_table cimport fib_lookup_v4, fib_lookup_v6, fib_route, fib_table
from dataplane._segment cimport finish_checksum, plan_split, split_plan, stamp_segment
from dataplane._pump cimport (
    EMPTIED, MORE_WAITS, NOTHING, batch_end, engine_state, enter, leave, name_lease, now_ms, park, post_event, rest, stopping, wait_for_room,
)
from dataplane._tap cimport TAP_TX, name_remote, tap_bytes, tap_payload, tap_record, wall_ns
from dataplane._tunio cimport tun_read
from dataplane._udpio cimport (
    add_to_run, describe_run, fits_run, open_run, outer_address, seal_outbox, udp_outbox, udp_run, write_address,
)
from dataplane.headers cimport (
    FRAME_HEAD, ICMP_MOST, IPV6_HEADER, TCP, UDP, build_icmp_error, encap_ecn, ip_view, load_be16, load_be32, load_be64,
    load_u128,
    may_answer_with_icmp, parse_ip, write_frame_head,
)

cdef enum:
    READS = 64               # packets of one batch at most ...
    READ_SUPERFRAMES = 8     # ... and superframes: what is read is sent while the cache still holds it
    HEADROOM = 64            # before each packet: what goes out in front of it is written there
    STAMP_BYTES = 1 << 17
    ICMP_BURST = 50
    ICMP_PER_SECOND = 100
    LEAST_IPV6_MTU = 1280    # RFC 8200 section 5: no path may say less, the outer datagram is fragmented instead

cdef struct tx_state:
    udp_outbox outbox
    uint8_t* buffers         # READS of them, BUFFER_STRIDE apart
    uint8_t stamps[STAMP_BYTES]
    uint32_t stamped
    virtio_net_hdr header
    uint64_t icmp_tokens
    uint64_t icmp_refilled_ms
    uint8_t icmp_packet[ICMP_MOST]
    uint64_t reads           # before this batch: with its place in the batch they number a superframe
    uint64_t tap_ns          # when the outbox was sent, for those who look

cdef struct tx_way:          # how a packet leaves
    const fib_route* route
    uint32_t version
    uint32_t overhead        # bytes of the frame's head
    uint32_t socket
    uint32_t mtu             # of the path; 0: nothing to heed
    uint8_t ecn


# --------------------------------------------------------------------------------------------------------- taps

cdef inline void tap_parts(engine_state* engine, tx_state* tx, const udp_run* run, uint32_t first, uint32_t used,
                           uint8_t drop) noexcept nogil:
    """Show the datagrams of a run that lie in parts[first] to parts[used - 1]: sent, or dropped for `drop`."""
    cdef tap_record about = engine.tx.taps.about
    cdef const iovec* parts = <const iovec*>run.parts
    cdef const uint8_t* packet
    cdef uint32_t next = first, length, at
    about.direction = TAP_TX
    about.ns = tx.tap_ns
    about.drop = drop
    about.tos = run.ecn
    about.local_port = engine.tx.taps.ports[run.socket]
    name_remote(&about, run.address)
    while next < used:
        first = next
        length = 0
        while next < used and length < run.size:
            length += <uint32_t>parts[next].iov_len
            next += 1
        about.superframe = 0
        about.superframe_bytes = 0
        if next - first == 2:        # a stamped header, and a payload that lies where the superframe was read
            at = <uint32_t>(<size_t>(<uint8_t*>parts[next - 1].iov_base - tx.buffers) // BUFFER_STRIDE)
            packet = tx.buffers + <size_t>at * BUFFER_STRIDE + HEADROOM
            about.superframe = tx.reads + at + 1
            about.superframe_bytes = load_be16(packet + 2) if packet[0] >> 4 == 4 else IPV6_HEADER + load_be16(packet + 4)
        packet = <const uint8_t*>parts[first].iov_base + about.skip
        if packet[0] >> 4 == 4:
            at = fib_lookup_v4(engine.tx.table, load_be32(packet + 16))
        else:
            at = fib_lookup_v6(engine.tx.table, load_u128(packet + 24))
        name_lease(&about, engine.tx.table, at)
        tap_payload(engine.tx.taps, &about, &parts[first], next - first)


cdef inline void drop_packet(engine_state* engine, const uint8_t* packet, size_t length, uint8_t drop) noexcept nogil:
    """Count a packet that never got an outer header, and show it."""
    cdef tap_record about
    tally(&engine.tx.drops[drop], 1)
    if engine.tx.taps == NULL:
        return
    about = engine.tx.taps.about
    about.direction = TAP_TX
    about.ns = wall_ns()
    about.drop = drop
    about.outer = about.skip = 0
    tap_bytes(engine.tx.taps, &about, packet, length)


cdef inline void answer(engine_state* engine, tx_state* tx, const uint8_t* packet, const ip_view* view, uint32_t mtu) noexcept nogil:
    """Tell the sender that its packet has no route, or is longer than `mtu`."""
    cdef uint64_t now = now_ms()
    cdef uint64_t earned = (now - tx.icmp_refilled_ms) * ICMP_PER_SECOND // 1000
    cdef int fd = engine.icmp_v4 if view.version == 4 else engine.icmp_v6
    cdef const uint8_t* source = &engine.icmp_source_v4[0] if view.version == 4 else &engine.icmp_source_v6[0]
    cdef outer_address to
    cdef uint32_t to_length
    cdef size_t length
    if fd < 0 or not may_answer_with_icmp(packet, view, mtu != 0):
        return
    if earned:
        tx.icmp_tokens = min(<uint64_t>ICMP_BURST, tx.icmp_tokens + earned)
        tx.icmp_refilled_ms = now
    if tx.icmp_tokens == 0:
        return
    tx.icmp_tokens -= 1
    length = build_icmp_error(tx.icmp_packet, source, <uint16_t>mtu, packet, view)
    write_address(&to, &to_length, view.source, 0)
    if sendto(fd, tx.icmp_packet, length, MSG_DONTWAIT, <sockaddr*>&to, to_length) >= 0:
        tally(&engine.tx.icmp_errors, 1)


# ------------------------------------------------------------------------------------------------------ sending

cdef inline void count_sent(engine_state* engine, const udp_run* run, uint32_t datagrams, uint64_t bytes) noexcept nogil:
    """Packets and their bytes; `bytes` are those of the datagrams."""
    cdef peer_counters* peer = &engine.sent[run.slot]
    if engine.vxlan:
        bytes -= FRAME_HEAD * datagrams
    tally(&peer.packets, datagrams)
    tally(&peer.bytes, bytes)
    store_relaxed(&peer.last_ms, now_ms())
    tally(&engine.tx.packets, datagrams)
    tally(&engine.tx.bytes, bytes)


cdef inline void drop_unsent(engine_state* engine, tx_state* tx, const udp_run* run, uint32_t first, uint32_t used,
                             uint32_t datagrams, int error) noexcept nogil:
    tally(&engine.tx.drops[DROP_SEND_FAILED], datagrams)
    if engine.tx.taps != NULL:
        tap_parts(engine, tx, run, first, used, DROP_SEND_FAILED)
    post_event(engine, &engine.tx, EVENT_SEND_FAILED, run.address, error)


cdef inline int send_patiently(engine_state* engine, int fd, mmsghdr* messages, uint32_t count) noexcept nogil:
    """How many messages left, at least one; else -errno of the first. A full socket buffer is waited for until the
    engine stops, while the TUN's queue holds what comes."""
    cdef int sent, shortages = 0
    while True:
        sent = sendmmsg(fd, messages, count, MSG_DONTWAIT)
        tally(&engine.tx.calls, 1)
        if sent > 0:
            return sent
        if errno == EAGAIN and not stopping(engine):
            wait_for_room(engine, &engine.tx, fd, -1)
        elif errno == ENOBUFS and shortages < 3:
            shortages += 1
            rest(engine)
        elif errno != EINTR:
            return -errno


cdef inline void send_singly(engine_state* engine, tx_state* tx, udp_run* run) noexcept nogil:
    """Send a run that the kernel would not cut, datagram by datagram, each once."""
    cdef mmsghdr message
    cdef uint32_t part = 0, first, length
    cdef int sent
    describe_run(run, &message.msg_hdr, False)
    while part < run.used:
        first = part
        length = 0
        while part < run.used and length < run.size:
            length += <uint32_t>run.parts[part].iov_len
            part += 1
        message.msg_hdr.msg_iov = &run.parts[first]
        message.msg_hdr.msg_iovlen = part - first
        sent = send_patiently(engine, engine.senders[run.socket], &message, 1)
        if sent > 0:
            count_sent(engine, run, 1, length)
            if engine.tx.taps != NULL:
                tap_parts(engine, tx, run, first, part, DROP_REASONS)
        else:
            drop_unsent(engine, tx, run, first, part, 1, -sent)


cdef inline void send_refused(engine_state* engine, tx_state* tx, udp_run* run, int error) noexcept nogil:
    """The kernel took nothing of this run: go on without what it may lack, and remember that."""
    cdef udp_outbox* outbox = &tx.outbox
    if run.count == 1 or error not in (EIO, EINVAL, EMSGSIZE):
        drop_unsent(engine, tx, run, 0, run.used, run.count, error)
        return
    if error == EMSGSIZE:                            # the path's MTU is smaller than we believed
        post_event(engine, &engine.tx, EVENT_TOO_LONG, run.address, run.size)
    elif error == EINVAL and run.count > 64:         # UDP_MAX_SEGMENTS before 6.9
        outbox.most = 64
    elif outbox.most > 1:                            # EIO: no checksum offload below, or a transform
        outbox.most = 1
        post_event(engine, &engine.tx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_UDP_SEGMENT)
    send_singly(engine, tx, run)


cdef inline void send_outbox(engine_state* engine, tx_state* tx) noexcept nogil:
    """Send every run once, those of a socket in order. sendmmsg reports an error only for the first message that it is
    handed, so one that the kernel refuses costs nothing of the others."""
    cdef udp_outbox* outbox = &tx.outbox
    cdef udp_run* run
    cdef uint32_t done = 0, together
    cdef int sent, i
    seal_outbox(outbox)
    if engine.tx.taps != NULL:
        tx.tap_ns = wall_ns()
    while done < outbox.count:
        run = &outbox.runs[outbox.order[done]]
        together = 1
        while done + together < outbox.count and outbox.runs[outbox.order[done + together]].socket == run.socket:
            together += 1
        sent = send_patiently(engine, engine.senders[run.socket], &outbox.messages[done], together)
        if sent > 0:
            for i in range(sent):
                run = &outbox.runs[outbox.order[done]]
                count_sent(engine, run, run.count, run.bytes)
                if engine.tx.taps != NULL:
                    tap_parts(engine, tx, run, 0, run.used, DROP_REASONS)
                done += 1
        else:
            send_refused(engine, tx, run, -sent)
            done += 1
    tally(&engine.tx.messages, done)
    outbox.count = 0
    tx.stamped = 0


# ------------------------------------------------------------------------------------------------------ batching

cdef inline uint64_t stirred(uint64_t a, uint64_t b) noexcept nogil:
    cdef u128 product = <u128>a * b
    return <uint64_t>(product >> 64) ^ <uint64_t>product


cdef inline uint32_t flow_socket(const engine_state* engine, const uint8_t* packet, const ip_view* view) noexcept nogil:
    """The socket of the packet's flow: by addresses, protocol and ports; of fragments, which lack these, without."""
    cdef uint64_t hash, ends
    cdef uint32_t l4 = (packet[0] & 15) * 4 if view.version == 4 else <uint32_t>IPV6_HEADER
    cdef uint8_t protocol = packet[9] if view.version == 4 else packet[6]
    ends = <uint64_t>protocol << 32
    if (protocol == TCP or protocol == UDP) and l4 + 4 <= view.length:
        if view.version == 6 or load_be16(packet + 6) & 0x3FFF == 0:
            ends |= load_be32(packet + l4)
    if view.version == 4:
        hash = load_be64(packet + 12)
    else:
        hash = stirred(load_be64(packet + 8) ^ engine.flow_keys[1], load_be64(packet + 16) ^ engine.flow_keys[0])
        hash ^= stirred(load_be64(packet + 24) ^ engine.flow_keys[0], load_be64(packet + 32) ^ engine.flow_keys[1])
    hash = stirred(hash ^ engine.flow_keys[0], ends ^ engine.flow_keys[1])
    # once more: of neighbouring ports one product alone gives an arithmetic progression, which may miss most sockets
    hash = stirred(hash ^ engine.flow_keys[1], engine.flow_keys[0])
    return <uint32_t>(<uint64_t><uint32_t>hash * engine.senders_count >> 32)


cdef inline void push_datagram(engine_state* engine, tx_state* tx, const tx_way* way, uint8_t* head,
                               uint32_t head_length, uint8_t* tail, uint32_t tail_length) noexcept nogil:
    cdef const fib_route* route = way.route
    cdef udp_run* run = open_run(&tx.outbox, route.address, route.slot, way.socket, way.ecn)
    cdef bint alone = way.mtu and head_length + tail_length - way.overhead > way.mtu
    if run != NULL and alone and run.count:
        run.closed = True
        run = open_run(&tx.outbox, route.address, route.slot, way.socket, way.ecn)
    if run != NULL and not fits_run(&tx.outbox, run, head_length + tail_length):
        run = open_run(&tx.outbox, route.address, route.slot, way.socket, way.ecn)
    if run == NULL:
        send_outbox(engine, tx)
        run = open_run(&tx.outbox, route.address, route.slot, way.socket, way.ecn)
    add_to_run(run, head, head_length, tail, tail_length)
    if alone:
        run.closed = True    # by itself the kernel cuts it into fragments; a run it would refuse


cdef inline void push_packet(engine_state* engine, tx_state* tx, const tx_way* way, uint8_t* packet,
                             uint32_t length) noexcept nogil:
    """What goes in front of the packet is written into the headroom."""
    if way.overhead:
        write_frame_head(packet - FRAME_HEAD, &engine.link, way.route.mac, way.version)
    push_datagram(engine, tx, way, packet - way.overhead, length + way.overhead, NULL, 0)


cdef inline void take_superframe(engine_state* engine, tx_state* tx, const tx_way* way, uint8_t* packet,
                                 size_t length) noexcept nogil:
    cdef split_plan plan
    cdef uint32_t index, payload, head
    cdef uint8_t* stamp
    if not plan_split(&tx.header, packet, length, &plan):
        drop_packet(engine, packet, length, DROP_SUPERFRAME)
        return
    tally(&engine.tx.superframes, 1)
    head = plan.header + way.overhead
    for index in range(plan.segments):
        if tx.stamped + head > STAMP_BYTES:
            send_outbox(engine, tx)
        stamp = tx.stamps + tx.stamped
        if way.overhead:
            write_frame_head(stamp, &engine.link, way.route.mac, way.version)
        payload = stamp_segment(&plan, index, stamp + way.overhead)
        # before the push, which may empty the outbox and with it the stamps
        push_datagram(engine, tx, way, stamp, head, packet + plan.header + index * plan.size, payload)
        tx.stamped = <uint32_t>(stamp - tx.stamps) + head


cdef inline bint too_long(const tx_state* tx, uint32_t mtu, const uint8_t* packet, const ip_view* view) noexcept nogil:
    """Whether a packet, or a segment of a superframe, forbids fragmentation and is longer than the path takes."""
    cdef size_t length = view.length
    cdef size_t segment = tx.header.csum_start + tx.header.gso_size
    if view.version == 4 and not load_be16(packet + 6) & 0x4000:
        return False
    if tx.header.gso_type and tx.header.csum_start + 13 <= length:
        segment += 8 if tx.header.csum_offset == 6 else (packet[tx.header.csum_start + 12] >> 4) * 4
        if segment < length:
            length = segment
    return length > mtu


cdef inline uint32_t find_route(const fib_table* table, const ip_view* view) noexcept nogil:
    if view.version == 4:
        return fib_lookup_v4(table, <uint32_t>view.destination)
    return fib_lookup_v6(table, view.destination)


cdef inline tx_way way_of(const engine_state* engine, const fib_route* route, const uint8_t* packet,
                          const ip_view* view) noexcept nogil:
    cdef tx_way way
    way.route = route
    way.version = view.version
    way.mtu = route.mtu
    way.overhead = way.socket = way.ecn = 0
    if way.mtu and way.version == 6 and way.mtu < LEAST_IPV6_MTU:
        way.mtu = LEAST_IPV6_MTU
    if engine.vxlan:
        way.overhead = FRAME_HEAD
        way.ecn = encap_ecn(packet)
    if engine.senders_count > 1:
        way.socket = flow_socket(engine, packet, view)
    return way


cdef inline void take_packet(engine_state* engine, tx_state* tx, const fib_table* table, uint8_t* packet,
                             size_t length) noexcept nogil:
    """Look the packet up and append what it stands for to the outbox, or drop it. Before the packet lies the headroom."""
    cdef ip_view view
    cdef tx_way way
    cdef uint32_t at
    cdef int verdict = parse_ip(packet, length, &view)
    if verdict != DROP_REASONS:
        drop_packet(engine, packet, length, <uint8_t>verdict)
        return
    at = find_route(table, &view)
    if at == NO_PEER:
        drop_packet(engine, packet, view.length, DROP_NO_ROUTE)
        answer(engine, tx, packet, &view, 0)
        return
    way = way_of(engine, &table.routes[at], packet, &view)
    if way.mtu and too_long(tx, way.mtu, packet, &view):
        drop_packet(engine, packet, view.length, DROP_PATH_MTU)
        answer(engine, tx, packet, &view, way.mtu)
    elif tx.header.gso_type:
        take_superframe(engine, tx, &way, packet, view.length)
    elif tx.header.flags & NEEDS_CSUM and not finish_checksum(&tx.header, packet, view.length):
        drop_packet(engine, packet, view.length, DROP_SUPERFRAME)
    else:
        push_packet(engine, tx, &way, packet, <uint32_t>view.length)


cdef inline batch_end transmit_batch(engine_state* engine, tx_state* tx) noexcept nogil:
    """Carry what waits in the TUN, up to a batch."""
    cdef ssize_t got = tun_read(engine.tun, &tx.header, tx.buffers + HEADROOM, BUFFER_BYTES)
    cdef const fib_table* table
    cdef uint8_t* packet
    cdef uint32_t reads = 0
    cdef uint64_t superframes = engine.tx.superframes
    if got == -EAGAIN:
        return NOTHING
    table = enter(engine, &engine.tx)
    packet = tx.buffers + HEADROOM
    while got >= 0:
        take_packet(engine, tx, table, packet, <size_t>got)
        reads += 1
        if reads == READS or engine.tx.superframes - superframes == READ_SUPERFRAMES:
            break
        packet = tx.buffers + <size_t>reads * BUFFER_STRIDE + HEADROOM
        got = tun_read(engine.tun, &tx.header, packet, BUFFER_BYTES)
    send_outbox(engine, tx)
    leave(&engine.tx)
    tx.reads += reads
    if got == -EBADFD:
        park(engine, &engine.tx, EBADFD)
    elif got < 0 and got not in (-EAGAIN, -EINTR):
        rest(engine)
    return EMPTIED if got == -EAGAIN else MORE_WAITS
