"""Owns coalescing of TCP and UDP over IPv4 and IPv6; see _coalesce.pxd for the words.

Free of descriptors, tables and memory. Invariants: a packet whose checksum is wrong is never merged, since a
superframe's checksum is made anew; packets of one flow leave in the order in which they came; cutting gives them back,
but for the identifications of packets that forbid fragmentation.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from dataplane.abi cimport (
    DROP_REASONS, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, NO_PEER, tally, virtio_net_hdr,
)
from dataplane.headers cimport (
    ACK, ECE, ICMPV6_PROTOCOL, MOST_PACKET, PSH, TCP, UDP, checksum_add, checksum_finish, checksum_fold, find_l4, ip_view,
    load_be16, load_be32, parse_ip, pseudo_sum, store_be16, unfinished_checksum,
)

cdef enum kinship:
    LONER                    # of no TCP or UDP flow that could be merged: passes by itself
    SEALER                   # could be of any flow (fragments, options): no chain may grow over it
    MEMBER                   # of a flow, but passes by itself: its flow's chain ends
    MERGEABLE


cdef inline bint checksums_right(const packet_ref* packet, uint64_t* wrong) noexcept nogil:
    """An unfinished checksum says nothing, and nothing against the packet. `wrong` counts those that do."""
    cdef uint32_t l4_length = packet.length - packet.l4
    cdef uint64_t sum
    if packet.data[0] >> 4 == 4 and checksum_fold(checksum_add(packet.data, packet.l4, 0)) != 0xFFFF:
        tally(wrong, 1)
        return False
    if packet.check_start:
        return True
    sum = pseudo_sum(packet.data, packet.protocol, l4_length)
    if checksum_fold(checksum_add(packet.data + packet.l4, l4_length, sum)) != 0xFFFF:
        tally(wrong, 1)
        return False
    return True


cdef inline bint tunnel_port(uint16_t port) noexcept nogil:
    """Kernels before 6.9 spoil merged UDP that a VXLAN or GENEVE device takes in (CVE-2024-35884)."""
    return port == 4789 or port == 8472 or port == 6081 or port == 4790


cdef inline kinship look(packet_ref* packet, bint tcp, bint udp) noexcept nogil:
    """Fill in what merging needs to know."""
    cdef const uint8_t* data = packet.data
    cdef const uint8_t* l4
    cdef uint32_t l4_header
    packet.header = 0
    packet.next = NO_PEER
    if packet.length >= 20 and data[0] >> 4 == 4:
        packet.protocol = data[9]
        if load_be16(data + 6) & 0x3FFF or data[0] != 0x45:
            return SEALER
        if load_be16(data + 2) != packet.length:
            return SEALER
        packet.l4 = 20
    elif packet.length >= 40 and data[0] >> 4 == 6:
        packet.protocol = data[6]
        if packet.protocol not in (TCP, UDP, ICMPV6_PROTOCOL):
            return SEALER
        if load_be16(data + 4) + 40 != packet.length:
            return SEALER
        packet.l4 = 40
    else:
        return SEALER
    l4 = data + packet.l4
    if packet.protocol == TCP:
        if packet.l4 + 20 > packet.length:
            return SEALER
        l4_header = (l4[12] >> 4) * 4
        if l4_header < 20 or packet.l4 + l4_header > packet.length:
            return SEALER
        packet.flags = l4[13]
        packet.sequence = load_be32(l4 + 4)
        packet.payload = <uint16_t>(packet.length - packet.l4 - l4_header)
        if not tcp or packet.segment or packet.payload == 0 or packet.flags & ~(PSH | ECE) != ACK or l4[12] & 15:
            return MEMBER
        packet.header = <uint16_t>(packet.l4 + l4_header)
        return MERGEABLE
    if packet.protocol == UDP:
        if packet.l4 + 8 > packet.length:
            return SEALER
        packet.payload = <uint16_t>(packet.length - packet.l4 - 8)
        if not udp or packet.segment or packet.payload == 0 or load_be16(l4 + 4) != packet.length - packet.l4:
            return MEMBER
        if load_be16(l4 + 6) == 0 or tunnel_port(load_be16(l4 + 2)):
            return MEMBER
        packet.flags = 0
        packet.header = <uint16_t>(packet.l4 + 8)
        return MERGEABLE
    return LONER


cdef inline uint32_t flow_hash(const packet_ref* packet) noexcept nogil:
    """Of addresses and ports, which lie side by side in both versions, and the protocol."""
    cdef const uint8_t* at = packet.data + (12 if packet.l4 == 20 else 8)
    cdef const uint8_t* end = packet.data + packet.l4 + 4
    cdef uint32_t hash = packet.protocol
    cdef uint32_t word
    while at < end:
        memcpy(&word, at, 4)
        hash = (hash ^ word) * <uint32_t>2654435769
        hash ^= hash >> 15
        at += 4
    return hash


cdef inline bint same_flow(const packet_ref* a, const packet_ref* b) noexcept nogil:
    cdef uint16_t start = 12 if a.l4 == 20 else 8
    return (
        a.protocol == b.protocol
        and a.l4 == b.l4
        and memcmp(a.data + start, b.data + start, a.l4 + 4 - start) == 0
    )


cdef inline uint32_t flow_slot(const packet_ref* packets, const packet_chain* chains, const uint32_t* flows,
                               const packet_ref* packet) noexcept nogil:
    """Where the last chain of the packet's flow stands, or would stand. With more flows than slots one takes the
    place of another, which costs a merge and nothing else."""
    cdef uint32_t home = flow_hash(packet) & (FLOWS - 1)
    cdef uint32_t slot = home
    while flows[slot] != NO_PEER and not same_flow(&packets[chains[flows[slot]].first], packet):
        slot = (slot + 1) & (FLOWS - 1)
        if slot == home:
            break
    return slot


cdef inline bint same_headers(const packet_ref* first, const packet_ref* packet, uint32_t count) noexcept nogil:
    """Everything but lengths, checksums, sequence numbers and PSH agrees, so that cutting gives both back."""
    cdef const uint8_t* a = first.data
    cdef const uint8_t* b = packet.data
    cdef uint16_t l4 = first.l4
    if first.protocol != packet.protocol or l4 != packet.l4 or first.header != packet.header:
        return False
    if l4 == 20:
        # version, TOS with ECN; DF and the reserved bit, TTL, protocol; addresses and ports
        if memcmp(a, b, 2) or memcmp(a + 6, b + 6, 4) or memcmp(a + 12, b + 12, 12):
            return False
        # without DF the identification matters to reassembly: it must be the one that cutting writes
        if not a[6] & 0x40 and load_be16(b + 4) != <uint16_t>(load_be16(a + 4) + count):
            return False
    elif memcmp(a, b, 4) or memcmp(a + 6, b + 6, 38):
        # class and flow label; next header, hop limit, addresses and ports
        return False
    if first.protocol == UDP:
        return True
    a += l4
    b += l4
    # acknowledgement; data offset; window; urgent pointer and options
    return (
        memcmp(a + 8, b + 8, 5) == 0
        and memcmp(a + 14, b + 14, 2) == 0
        and memcmp(a + 18, b + 18, first.header - l4 - 18) == 0
        and (first.flags | PSH) == (packet.flags | PSH)
    )


cdef inline bint may_join(const packet_ref* first, const packet_chain* chain, const packet_ref* packet) noexcept nogil:
    if not chain.open or chain.count >= CHAIN_PACKETS or packet.payload > first.payload:
        return False
    if chain.payload + packet.payload + first.header > MOST_PACKET:
        return False
    if packet.protocol == TCP and packet.sequence != <uint32_t>(first.sequence + chain.payload):
        return False
    return same_headers(first, packet, chain.count)


cdef inline bint ends_chain(const packet_ref* first, const packet_ref* packet) noexcept nogil:
    """After a short segment or a push nothing more is cut from the superframe."""
    return packet.payload < first.payload or (packet.protocol == TCP and packet.flags & PSH)


cdef bint join(packet_ref* packets, packet_chain* chain, uint32_t i, uint64_t* wrong) noexcept nogil:
    """Append packet i to its flow's chain if nothing speaks against it. Checksums come last, as the dearest."""
    cdef packet_ref* first = &packets[chain.first]
    if not may_join(first, chain, &packets[i]):
        return False
    if not chain.verified:
        chain.verified = checksums_right(first, wrong)
        if not chain.verified:
            chain.open = False
            return False
    if not checksums_right(&packets[i], wrong):
        packets[i].header = 0                # nothing shall join it either
        return False
    packets[chain.last].next = i
    chain.last = i
    chain.count += 1
    chain.payload += packets[i].payload
    chain.open = not ends_chain(first, &packets[i])
    return True


cdef uint32_t chain_packets(packet_ref* packets, uint32_t count, packet_chain* chains, bint tcp, bint udp,
                            uint64_t* wrong) noexcept nogil:
    """Arrange `count` packets in at most as many chains, in the order in which the chains leave; returns how many.
    `tcp`, `udp`: what may be merged at all. Each packet has `data` and `length` set, its length being its IP length, and
    what is said of its checksum and segments. `wrong`: grows by the wrong checksums that were met."""
    cdef uint32_t flows[FLOWS]
    cdef uint32_t made = 0, sealed = 0, i, slot
    cdef packet_ref* packet
    cdef packet_chain* chain
    cdef kinship kin
    memset(flows, 0xFF, sizeof(flows))
    for i in range(count):
        packet = &packets[i]
        kin = look(packet, tcp, udp)
        if kin == MERGEABLE:
            slot = flow_slot(packets, chains, flows, packet)
            # a chain from before the last SEALER does not grow any more
            if flows[slot] != NO_PEER and flows[slot] >= sealed and join(packets, &chains[flows[slot]], i, wrong):
                continue
            flows[slot] = made
        elif kin == MEMBER:
            slot = flow_slot(packets, chains, flows, packet)
            if flows[slot] != NO_PEER:
                chains[flows[slot]].open = False
        elif kin == SEALER:
            sealed = made
        chain = &chains[made]
        chain.first = chain.last = i
        chain.count = 1
        chain.payload = packet.payload
        chain.open = kin == MERGEABLE and packet.header != 0 and not ends_chain(packet, packet)
        chain.verified = False
        made += 1
    return made


cdef void mark_unfinished(packet_ref* packet, const ip_view* view) noexcept nogil:
    if not unfinished_checksum(packet.data, view, &packet.check_start, &packet.check_offset):
        packet.check_start = 0


cdef bint mark_superframe(packet_ref* packet, const ip_view* view, uint32_t segment, uint32_t most) noexcept nogil:
    """Note how a packet that stands for many is to be cut: UDP into payloads of `segment` bytes, TCP into packets of `most`
    bytes. A checksum that was finished is made unfinished, for whoever cuts it makes them anew; so one that is wrong makes
    it a packet that is not cut. False where it is no superframe."""
    cdef uint8_t protocol
    cdef uint16_t checksum
    cdef uint32_t l4 = find_l4(packet.data, view, &protocol), header
    cdef uint64_t sum
    if l4 == 0 or (protocol != TCP and protocol != UDP) or l4 + (20 if protocol == TCP else 8) > view.length:
        return False
    header = l4 + ((packet.data[l4 + 12] >> 4) * 4 if protocol == TCP else 8)
    if protocol == TCP:
        if header < l4 + 20 or header >= most or view.length <= most:
            return False
        segment = most - header
    if segment == 0 or header + segment >= view.length:
        return False
    if not packet.check_start:
        sum = pseudo_sum(packet.data, protocol, <uint32_t>view.length - l4)
        if checksum_fold(checksum_add(packet.data + l4, view.length - l4, sum)) != 0xFFFF:
            return False
        checksum = checksum_fold(sum)
        packet.check_start = <uint16_t>l4
        packet.check_offset = 16 if protocol == TCP else 6
        memcpy(packet.data + l4 + packet.check_offset, &checksum, 2)
    packet.segment = <uint16_t>segment
    return True


cdef void describe_single(const packet_ref* packet, virtio_net_hdr* header) noexcept nogil:
    """How a packet that was not merged is given to a TUN."""
    cdef const uint8_t* l4 = packet.data + packet.check_start
    memset(header, 0, sizeof(header[0]))
    if packet.check_start == 0:
        return
    header.flags = NEEDS_CSUM
    header.csum_start = packet.check_start
    header.csum_offset = packet.check_offset
    if packet.segment == 0:
        return
    header.gso_size = packet.segment
    if packet.check_offset == 6:
        header.gso_type = GSO_UDP_L4
        header.hdr_len = packet.check_start + 8
    else:
        header.gso_type = GSO_TCPV4 if packet.data[0] >> 4 == 4 else GSO_TCPV6
        header.hdr_len = packet.check_start + (l4[12] >> 4) * 4


cdef void stamp_superframe(const packet_ref* packets, const packet_chain* chain, virtio_net_hdr* header,
                           uint8_t* out) noexcept nogil:
    """Write the headers of a chain of two packets or more (packets[chain.first].header bytes) to `out`, and how to
    cut it to `header`. The checksum is left to whoever cuts it: the field holds the pseudo-header sum."""
    cdef const packet_ref* first = &packets[chain.first]
    cdef uint32_t l4_length = first.header - first.l4 + chain.payload
    cdef uint16_t checksum
    cdef bint v4 = first.l4 == 20
    memcpy(out, first.data, first.header)
    if v4:
        store_be16(out + 2, <uint16_t>(first.header + chain.payload))
        memset(out + 10, 0, 2)
        checksum = checksum_finish(checksum_add(out, 20, 0))
        memcpy(out + 10, &checksum, 2)
    else:
        store_be16(out + 4, <uint16_t>(first.header - 40 + chain.payload))
    checksum = checksum_fold(pseudo_sum(first.data, first.protocol, l4_length))
    header.flags = NEEDS_CSUM
    header.hdr_len = first.header
    header.gso_size = first.payload
    header.csum_start = first.l4
    if first.protocol == TCP:
        header.gso_type = GSO_TCPV4 if v4 else GSO_TCPV6
        header.csum_offset = 16
        out[first.l4 + 13] |= packets[chain.last].flags & PSH
        memcpy(out + first.l4 + 16, &checksum, 2)
    else:
        header.gso_type = GSO_UDP_L4
        header.csum_offset = 6
        store_be16(out + first.l4 + 4, <uint16_t>l4_length)
        memcpy(out + first.l4 + 6, &checksum, 2)


# ---------------------------------------------------- the same for Python: what the oracle is held against

def superframes(list packets, *, bint tcp=True, bint udp=True, bint unfinished=False):
    """(virtio_net_hdr, packet) for each chain of `packets`, in the order in which they leave. `unfinished`: a checksum
    that holds the pseudo-header's sum is one."""
    cdef uint32_t count = len(packets)
    cdef packet_ref* refs = <packet_ref*>malloc((count + 1) * sizeof(packet_ref))
    cdef packet_chain* chains = <packet_chain*>malloc((count + 1) * sizeof(packet_chain))
    cdef virtio_net_hdr how
    cdef uint8_t out[MOST_CHAIN_HEADER]
    cdef uint32_t i, at, made
    cdef uint64_t wrong = 0
    cdef bytes packet
    cdef ip_view view
    try:
        if refs == NULL or chains == NULL:
            raise MemoryError
        for i in range(count):
            packet = packets[i]
            refs[i].data = <uint8_t*>packet
            refs[i].length = len(packet)
            refs[i].segment = refs[i].check_start = 0
            if unfinished and parse_ip(refs[i].data, refs[i].length, &view) == DROP_REASONS:
                mark_unfinished(&refs[i], &view)
        made = chain_packets(refs, count, chains, tcp, udp, &wrong)
        found = []
        for i in range(made):
            memset(&how, 0, sizeof(how))
            at = chains[i].first
            if chains[i].count == 1:
                describe_single(&refs[at], &how)
                found.append(((<uint8_t*>&how)[:sizeof(how)], packets[at]))
                continue
            stamp_superframe(refs, &chains[i], &how, out)
            whole = bytearray(out[:refs[at].header])
            while at != NO_PEER:
                whole += packets[at][refs[at].header:]
                at = refs[at].next
            found.append(((<uint8_t*>&how)[:sizeof(how)], bytes(whole)))
        return found
    finally:
        free(refs)
        free(chains)
