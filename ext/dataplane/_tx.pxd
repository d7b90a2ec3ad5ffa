# Owns the TX pump: from the TUN into runs of datagrams. Read it from the bottom up: pump_tx is the way of a batch.

from libc.errno cimport EAGAIN, EBADFD, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from dataplane.abi cimport *
from dataplane._fib cimport fib_lookup, fib_route, fib_table
from dataplane._offload cimport finish_checksum, plan_split, split_plan, stamp_segment
from dataplane._pump cimport (
    engine_state, enter, leave, now_ms, now_ns, park, post_event, rest, stopping, wait_for,
)
from dataplane._tunio cimport tun_read
from dataplane._udpio cimport add_to_run, fits_run, open_run, seal_outbox, udp_outbox, udp_run
from dataplane.headers cimport (
    ICMP_UNREACHABLE, build_icmp_error, ipv4_view, load_be16, may_answer_with_icmp, parse_ipv4,
)

cdef enum:
    READS = 64               # packets of one batch at most ...
    READ_SUPERFRAMES = 8     # ... and superframes: what is read is sent while the cache still holds it
    STAMP_BYTES = 1 << 17
    ICMP_BURST = 50
    ICMP_PER_SECOND = 100

cdef struct tx_state:
    udp_outbox outbox
    uint8_t* buffers         # READS of them, BUFFER_STRIDE apart
    uint8_t stamps[STAMP_BYTES]
    uint32_t stamped
    virtio_net_hdr header
    uint64_t icmp_tokens
    uint64_t icmp_refilled_ms
    uint8_t icmp_packet[576]


cdef inline void answer(engine_state* engine, tx_state* tx, const uint8_t* packet, const ipv4_view* view, uint8_t code,
                        uint32_t rest) noexcept nogil:
    """Tell the sender that its packet is unreachable (RFC 792): `code` 0 for no route, 4 with the MTU in `rest` for too
    long (RFC 1191 section 4)."""
    cdef uint64_t now = now_ms()
    cdef uint64_t earned = (now - tx.icmp_refilled_ms) * ICMP_PER_SECOND // 1000
    cdef sockaddr_in to
    cdef size_t length
    if not may_answer_with_icmp(packet, view):
        return
    if earned:
        tx.icmp_tokens = min(<uint64_t>ICMP_BURST, tx.icmp_tokens + earned)
        tx.icmp_refilled_ms = now
    if tx.icmp_tokens == 0:
        return
    tx.icmp_tokens -= 1
    length = build_icmp_error(tx.icmp_packet, engine.icmp_source, ICMP_UNREACHABLE, code, rest, packet, view)
    memset(&to, 0, sizeof(to))
    to.sin_family = AF_INET
    to.sin_addr.s_addr = htonl(view.source)
    if sendto(engine.icmp, tx.icmp_packet, length, MSG_DONTWAIT, <sockaddr*>&to, sizeof(to)) >= 0:
        engine.tx.icmp_errors += 1


# ------------------------------------------------------------------------------------------------------ sending

cdef inline void count_sent(engine_state* engine, const udp_run* run, uint32_t datagrams, uint64_t bytes) noexcept nogil:
    cdef peer_counters* peer = &engine.sent[run.slot]
    peer.packets += datagrams
    peer.bytes += bytes
    peer.last_ms = now_ms()
    engine.tx.packets += datagrams
    engine.tx.bytes += bytes


cdef inline void drop_unsent(engine_state* engine, const udp_run* run, uint32_t datagrams, int error) noexcept nogil:
    engine.tx.drops[DROP_SEND_FAILED] += datagrams
    post_event(engine, &engine.tx, EVENT_SEND_FAILED, run.address, error)


cdef inline int send_patiently(engine_state* engine, mmsghdr* messages, uint32_t count) noexcept nogil:
    """How many messages left, at least one; else -errno of the first. A full socket buffer is waited for, while the
    TUN's queue holds what comes."""
    cdef int sent, shortages = 0
    while not stopping(engine):
        sent = sendmmsg(engine.udp, messages, count, MSG_DONTWAIT)
        engine.tx.calls += 1
        if sent > 0:
            return sent
        if errno == EAGAIN:
            wait_for(engine, &engine.tx, engine.udp, POLLOUT)
        elif errno == ENOBUFS and shortages < 3:
            shortages += 1
            rest(engine)
        elif errno != EINTR:
            return -errno
    return -EINTR


cdef inline void send_singly(engine_state* engine, udp_run* run) noexcept nogil:
    """Send a run that the kernel would not cut, datagram by datagram, each once."""
    cdef mmsghdr message
    cdef uint32_t part = 0, first, length
    cdef int sent
    message.msg_hdr.msg_name = &run.to
    message.msg_hdr.msg_namelen = sizeof(sockaddr_in)
    message.msg_hdr.msg_control = NULL
    message.msg_hdr.msg_controllen = 0
    message.msg_hdr.msg_flags = 0
    while part < run.used:
        first = part
        length = 0
        while part < run.used and length < run.size:
            length += <uint32_t>run.parts[part].iov_len
            part += 1
        message.msg_hdr.msg_iov = &run.parts[first]
        message.msg_hdr.msg_iovlen = part - first
        sent = send_patiently(engine, &message, 1)
        if sent > 0:
            count_sent(engine, run, 1, length)
        else:
            drop_unsent(engine, run, 1, -sent)


cdef inline void send_refused(engine_state* engine, udp_outbox* outbox, udp_run* run, int error) noexcept nogil:
    """The kernel took nothing of this run: go on without what it may lack, and remember that."""
    if run.count == 1 or error not in (EIO, EINVAL, EMSGSIZE):
        drop_unsent(engine, run, run.count, error)
        return
    if error == EMSGSIZE:                            # the path's MTU is smaller than we believed
        post_event(engine, &engine.tx, EVENT_TOO_LONG, run.address, run.size)
    elif error == EINVAL and run.count > 64:         # UDP_MAX_SEGMENTS before 6.9
        outbox.most = 64
    elif outbox.most > 1:                            # EIO: no checksum offload below, or a transform
        outbox.most = 1
        post_event(engine, &engine.tx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_UDP_SEGMENT)
    send_singly(engine, run)


cdef inline void send_outbox(engine_state* engine, tx_state* tx) noexcept nogil:
    """Send every run once, in order. sendmmsg reports an error only for the first message that it is handed, so
    one that the kernel refuses costs nothing of the others."""
    cdef udp_outbox* outbox = &tx.outbox
    cdef uint32_t done = 0
    cdef int sent, i
    seal_outbox(outbox)
    while done < outbox.count and not stopping(engine):
        sent = send_patiently(engine, &outbox.messages[done], outbox.count - done)
        if sent > 0:
            for i in range(sent):
                count_sent(engine, &outbox.runs[done], outbox.runs[done].count, outbox.runs[done].bytes)
                done += 1
        else:
            send_refused(engine, outbox, &outbox.runs[done], -sent)
            done += 1
    engine.tx.messages += done
    outbox.count = 0
    tx.stamped = 0


# ------------------------------------------------------------------------------------------------------ batching

cdef inline void push_datagram(engine_state* engine, tx_state* tx, const fib_route* route, uint8_t* head,
                               uint32_t head_length, uint8_t* tail, uint32_t tail_length) noexcept nogil:
    cdef udp_run* run = open_run(&tx.outbox, route.address, route.slot)
    cdef bint alone = route.mtu and head_length + tail_length > route.mtu
    if run != NULL and alone and run.count:
        run.closed = True
        run = open_run(&tx.outbox, route.address, route.slot)
    if run != NULL and not fits_run(&tx.outbox, run, head_length + tail_length):
        run = open_run(&tx.outbox, route.address, route.slot)
    if run == NULL:
        send_outbox(engine, tx)
        run = open_run(&tx.outbox, route.address, route.slot)
    add_to_run(run, head, head_length, tail, tail_length)
    if alone:
        run.closed = True    # by itself the kernel cuts it into fragments; a run it would refuse


cdef inline void take_superframe(engine_state* engine, tx_state* tx, const fib_route* route, uint8_t* packet,
                                 size_t length) noexcept nogil:
    cdef split_plan plan
    cdef uint32_t index, payload
    cdef uint8_t* stamp
    if not plan_split(&tx.header, packet, length, &plan):
        engine.tx.drops[DROP_SUPERFRAME] += 1
        return
    engine.tx.superframes += 1
    for index in range(plan.segments):
        if tx.stamped + plan.header > STAMP_BYTES:
            send_outbox(engine, tx)
        stamp = tx.stamps + tx.stamped
        payload = stamp_segment(&plan, index, stamp)
        # before the push, which may empty the outbox and with it the stamps
        push_datagram(engine, tx, route, stamp, plan.header, packet + plan.header + index * plan.size, payload)
        tx.stamped = <uint32_t>(stamp - tx.stamps) + plan.header


cdef inline bint too_long(engine_state* engine, tx_state* tx, const fib_route* route, const uint8_t* packet,
                          const ipv4_view* view) noexcept nogil:
    """Whether a packet, or a segment of a superframe, forbids fragmentation and is longer than the path takes."""
    cdef size_t length = view.length
    cdef size_t segment = tx.header.csum_start + tx.header.gso_size
    if route.mtu == 0 or not load_be16(packet + 6) & 0x4000:
        return False
    if tx.header.gso_type and tx.header.csum_start + 13 <= length:
        segment += 8 if tx.header.csum_offset == 6 else (packet[tx.header.csum_start + 12] >> 4) * 4
        if segment < length:
            length = segment
    return length > route.mtu


cdef inline void take_packet(engine_state* engine, tx_state* tx, const fib_table* table, uint8_t* packet,
                             size_t length) noexcept nogil:
    """Look the packet up and append what it stands for to the outbox, or drop it."""
    cdef ipv4_view view
    cdef uint32_t at
    cdef int verdict = parse_ipv4(packet, length, &view)
    if verdict != DROP_REASONS:
        engine.tx.drops[verdict] += 1
        return
    at = fib_lookup(table, view.destination)
    if at == NO_PEER:
        engine.tx.drops[DROP_NO_ROUTE] += 1
        answer(engine, tx, packet, &view, 0, 0)
    elif too_long(engine, tx, &table.routes[at], packet, &view):
        engine.tx.drops[DROP_PATH_MTU] += 1
        answer(engine, tx, packet, &view, 4, table.routes[at].mtu)
    elif tx.header.gso_type:
        take_superframe(engine, tx, &table.routes[at], packet, view.length)
    elif tx.header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM and not finish_checksum(&tx.header, packet, view.length):
        engine.tx.drops[DROP_SUPERFRAME] += 1
    else:
        push_datagram(engine, tx, &table.routes[at], packet, <uint32_t>view.length, NULL, 0)


cdef inline ssize_t read_spinning(engine_state* engine, tx_state* tx) noexcept nogil:
    """The first packet of a batch. Where none waits, look again for a while before the caller sleeps."""
    cdef ssize_t got = tun_read(engine.tun, &tx.header, tx.buffers, BUFFER_BYTES)
    cdef uint64_t end
    if got != -EAGAIN or engine.spin_ns == 0:
        return got
    end = now_ns() + engine.spin_ns
    while got == -EAGAIN and not stopping(engine) and now_ns() < end:
        sched_yield()
        got = tun_read(engine.tun, &tx.header, tx.buffers, BUFFER_BYTES)
    return got


cdef inline void pump_tx(engine_state* engine, tx_state* tx) noexcept nogil:
    cdef const fib_table* table
    cdef uint8_t* packet
    cdef ssize_t got
    cdef uint32_t reads
    cdef uint64_t superframes
    while not stopping(engine):
        got = read_spinning(engine, tx)
        if got == -EAGAIN:
            wait_for(engine, &engine.tx, engine.tun, POLLIN)
            continue
        table = enter(engine, &engine.tx)
        packet = tx.buffers
        reads = 0
        superframes = engine.tx.superframes
        while got >= 0:
            take_packet(engine, tx, table, packet, <size_t>got)
            reads += 1
            if reads == READS or engine.tx.superframes - superframes == READ_SUPERFRAMES:
                break
            packet = tx.buffers + <size_t>reads * BUFFER_STRIDE
            got = tun_read(engine.tun, &tx.header, packet, BUFFER_BYTES)
        leave(&engine.tx)
        send_outbox(engine, tx)
        if got == -EBADFD:
            park(engine, &engine.tx, EBADFD)
        elif got < 0 and got not in (-EAGAIN, -EINTR):
            rest(engine)
