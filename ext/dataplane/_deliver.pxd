# Owns the way of accepted packets into the TUN: which are written together, and what becomes of those that the device does
# not take.
#
# Free of datagrams, sources and tables: whoever puts a packet up has judged it, and keeps its bytes until it is
# delivered. Invariant: each packet that was put up is written once or counted as TUN_WRITE or SUPERFRAME, and packets
# of a flow are written in the order in which they came. Read it from the bottom up.

from libc.errno cimport EAGAIN, EINTR, EINVAL
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from dataplane.abi cimport *
from dataplane._coalesce cimport (
    CHAIN_PACKETS, chain_packets, describe_single, packet_chain, packet_ref, stamp_superframe,
)
from dataplane._pump cimport engine_state, part, post_event, stopping, wait_for_room
from dataplane._segment cimport plan_split, split_plan, stamp_segment
from dataplane._tap cimport TAP_RX, tap_bytes, tap_record, wall_ns
from dataplane._tunio cimport tun_write_parts
from dataplane.headers cimport UDP, ip_view

cdef enum:
    PACKETS = 1024           # looked at together; more than that are delivered in several goes

cdef struct tun_outbox:
    packet_ref packets[PACKETS]
    packet_chain chains[PACKETS]
    uint32_t count
    iovec parts[CHAIN_PACKETS + 2]
    uint8_t header[BUFFER_BYTES]     # of what is written now
    int device_error


cdef inline void tap_unwritten(engine_state* engine, const packet_ref* packet) noexcept nogil:
    """Show a packet that was accepted, and shown as such, but that the device refused."""
    cdef tap_record about = engine.rx.taps.about
    about.direction = TAP_RX
    about.ns = wall_ns()
    about.drop = DROP_TUN_WRITE
    about.outer = about.skip = 0
    tap_bytes(engine.rx.taps, &about, packet.data, packet.length)


cdef inline int write_patiently(engine_state* engine, virtio_net_hdr* header, iovec* parts, int count) noexcept nogil:
    """0 or -errno; a TUN that would block is waited for."""
    cdef int error = tun_write_parts(engine.tun, header, parts, count)
    cdef uint64_t ignored
    while (error == -EAGAIN or error == -EINTR) and not stopping(engine):
        if error == -EAGAIN:
            # whoever is to take these packets may wait until theirs are taken: TX goes, and again when it comes back
            eventfd_read(engine.rx_bell, &ignored)
            part(engine)
            wait_for_room(engine, &engine.rx, engine.tun, engine.rx_bell)
        error = tun_write_parts(engine.tun, header, parts, count)
    return error


cdef inline int write_single(engine_state* engine, tun_outbox* outbox, virtio_net_hdr* header, void* data,
                             size_t length) noexcept nogil:
    outbox.parts[1].iov_base = data
    outbox.parts[1].iov_len = length
    return write_patiently(engine, header, outbox.parts, 2)


cdef inline void count_written(engine_state* engine, tun_outbox* outbox, uint32_t packets, uint64_t bytes,
                               int error) noexcept nogil:
    if error:
        tally(&engine.rx.drops[DROP_TUN_WRITE], packets)
        outbox.device_error = error
    else:
        tally(&engine.rx.packets, packets)
        tally(&engine.rx.bytes, bytes)


cdef inline void cut_and_write(engine_state* engine, tun_outbox* outbox, const virtio_net_hdr* how,
                               const packet_ref* packet) noexcept nogil:
    """A superframe for a TUN that takes none."""
    cdef virtio_net_hdr header
    cdef split_plan plan
    cdef uint32_t index, payload
    memset(&header, 0, sizeof(header))
    if not plan_split(how, packet.data, packet.length, &plan):
        tally(&engine.rx.drops[DROP_SUPERFRAME], 1)
        return
    for index in range(plan.segments):
        payload = stamp_segment(&plan, index, outbox.header)
        outbox.parts[1].iov_base = outbox.header
        outbox.parts[1].iov_len = plan.header
        outbox.parts[2].iov_base = packet.data + plan.header + index * plan.size
        outbox.parts[2].iov_len = payload
        count_written(engine, outbox, 1, plan.header + payload, write_patiently(engine, &header, outbox.parts, 3))


cdef inline void write_packet(engine_state* engine, tun_outbox* outbox, const packet_ref* packet) noexcept nogil:
    cdef virtio_net_hdr header
    cdef uint32_t packets
    cdef int error = -EINVAL
    describe_single(packet, &header)
    if packet.segment == 0:
        error = write_single(engine, outbox, &header, packet.data, packet.length)
        count_written(engine, outbox, 1, packet.length, error)
        if error and engine.rx.taps != NULL:
            tap_unwritten(engine, packet)
        return
    if engine.merge_udp if packet.check_offset == 6 else engine.merge_tcp:
        error = write_single(engine, outbox, &header, packet.data, packet.length)
    if error == -EINVAL:     # or of more segments than the kernel takes
        cut_and_write(engine, outbox, &header, packet)
        return
    packets = (packet.length - header.hdr_len + packet.segment - 1) // packet.segment
    tally(&engine.rx.superframes, error == 0)
    count_written(engine, outbox, packets, packet.length + (packets - 1) * header.hdr_len, error)


cdef inline int write_superframe(engine_state* engine, tun_outbox* outbox, const packet_chain* chain) noexcept nogil:
    """0 or -errno. The payloads are gathered from where the datagrams lie."""
    cdef virtio_net_hdr header
    cdef const packet_ref* packet = &outbox.packets[chain.first]
    cdef int count = 2, error
    stamp_superframe(outbox.packets, chain, &header, outbox.header)
    outbox.parts[1].iov_base = outbox.header
    outbox.parts[1].iov_len = packet.header
    while True:
        outbox.parts[count].iov_base = packet.data + packet.header
        outbox.parts[count].iov_len = packet.payload
        count += 1
        if packet.next == NO_PEER:
            break
        packet = &outbox.packets[packet.next]
    error = write_patiently(engine, &header, outbox.parts, count)
    if error == 0:
        tally(&engine.rx.superframes, 1)
        tally(&engine.rx.packets, chain.count)
        tally(&engine.rx.bytes, chain.payload + <uint64_t>chain.count * outbox.packets[chain.first].header)
    return error


cdef inline void write_chain(engine_state* engine, tun_outbox* outbox, const packet_chain* chain) noexcept nogil:
    cdef uint32_t at = chain.first
    cdef int error = -EINVAL
    if chain.count > 1:
        error = write_superframe(engine, outbox, chain)
        if error == 0:
            return
        if error == -EINVAL:
            # a kernel that does not take what it granted: go on without, from this chain on
            if outbox.packets[chain.first].protocol == UDP:
                engine.merge_udp = False
                post_event(engine, &engine.rx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_TUN_USO)
            else:
                engine.merge_tcp = False
                post_event(engine, &engine.rx, EVENT_CAPABILITY_LOST, 0, CAPABILITY_TUN_TSO)
    while at != NO_PEER:
        write_packet(engine, outbox, &outbox.packets[at])
        at = outbox.packets[at].next


cdef inline void deliver(engine_state* engine, tun_outbox* outbox) noexcept nogil:
    """Write everything that was accepted, merged where that can be."""
    cdef uint32_t i, made
    if outbox.count == 0:
        return
    made = chain_packets(outbox.packets, outbox.count, outbox.chains, engine.merge_tcp, engine.merge_udp,
                         &engine.rx.wrong_checksums)
    for i in range(made):
        write_chain(engine, outbox, &outbox.chains[i])
    outbox.count = 0


cdef inline packet_ref* put_up(engine_state* engine, tun_outbox* outbox, uint8_t* data,
                               const ip_view* view) noexcept nogil:
    """Put a packet up for delivery."""
    cdef packet_ref* packet
    if outbox.count == PACKETS:
        deliver(engine, outbox)
    packet = &outbox.packets[outbox.count]
    packet.data = data
    packet.length = <uint32_t>view.length
    packet.check_start = packet.segment = 0
    outbox.count += 1
    return packet
