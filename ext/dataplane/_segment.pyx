"""Owns segmentation of TCP and UDP over IPv4 and IPv6, and the finishing of checksums; see _segment.pxd for the words.

Free of descriptors, tables and memory. Invariant: segments carry the payload of their superframe once, in order, with
right checksums.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from dataplane.abi cimport GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, RSC_INFO, virtio_net_hdr
from dataplane.headers cimport (
    CWR, FIN, MOST_PACKET, PSH, TCP, UDP, checksum_add, checksum_finish, checksum_fold, load_be16, load_be32, store_be16,
    store_be32,
)


cdef bint finish_checksum(const virtio_net_hdr* header, uint8_t* packet, size_t length) noexcept nogil:
    """Complete the checksum that the kernel left unfinished in a plain packet; False where it cannot be."""
    cdef size_t start = header.csum_start
    cdef size_t at = start + header.csum_offset
    cdef uint16_t checksum
    if at + 2 > length or header.flags & RSC_INFO:
        return False
    checksum = checksum_finish(checksum_add(packet + start, length - start, 0))
    # a UDP checksum of 0 means "none" (RFC 768); TCP's, at another offset, may be 0
    if checksum == 0 and header.csum_offset == 6:
        checksum = 0xFFFF
    memcpy(packet + at, &checksum, 2)
    return True


cdef bint plan_split(const virtio_net_hdr* header, const uint8_t* packet, size_t length, split_plan* plan) noexcept nogil:
    """Read how a superframe is to be cut; False where it is none that can be."""
    cdef uint8_t kind = header.gso_type & <uint8_t>~GSO_ECN
    cdef size_t l4_header
    cdef uint16_t former
    cdef uint32_t sum
    plan.packet = packet
    plan.version = packet[0] >> 4 if length else 0
    plan.l4 = header.csum_start
    plan.size = header.gso_size
    if header.flags & (NEEDS_CSUM | RSC_INFO) != NEEDS_CSUM or plan.size == 0 or length > MOST_PACKET:
        return False
    if plan.version == 4 and kind in (GSO_TCPV4, GSO_UDP_L4):
        if plan.l4 < 20 or plan.l4 != (packet[0] & 15) * 4:
            return False
    elif plan.version == 6 and kind in (GSO_TCPV6, GSO_UDP_L4):
        if plan.l4 < 40:
            return False
    else:
        return False
    plan.protocol = UDP if kind == GSO_UDP_L4 else TCP
    if plan.l4 + (8 if plan.protocol == UDP else 20) > length:
        return False
    # hdr_len is a hint that may cover the whole first packet: the data offset says where the payload begins
    l4_header = 8 if plan.protocol == UDP else (packet[plan.l4 + 12] >> 4) * 4
    if l4_header < 8 or (plan.protocol == TCP and l4_header < 20):
        return False
    if header.csum_offset != (6 if plan.protocol == UDP else 16):
        return False
    if plan.l4 + l4_header >= length:
        return False
    plan.header = <uint16_t>(plan.l4 + l4_header)
    plan.payload = <uint32_t>(length - plan.header)
    plan.segments = (plan.payload + plan.size - 1) // plan.size
    plan.identification = load_be16(packet + 4)
    plan.sequence = load_be32(packet + plan.l4 + 4)
    plan.flags = packet[plan.l4 + 13] if plan.protocol == TCP else 0
    # take the length of the whole out of the pseudo-header sum: each segment adds its own (ones'-complement
    # subtraction is the addition of the complement). The addresses in it may be those of a routing header.
    memcpy(&former, packet + plan.l4 + header.csum_offset, 2)
    sum = former
    store_be16(<uint8_t*>&former, <uint16_t>(length - plan.l4))
    sum += <uint16_t>~former
    plan.partial = checksum_fold(sum)
    return True


cdef uint32_t stamp_segment(const split_plan* plan, uint32_t index, uint8_t* out) noexcept nogil:
    """Write the headers of segment `index` (plan.header bytes) to `out`; returns its payload's length. The payload is
    at packet + header + index * size."""
    cdef uint32_t start = index * plan.size
    cdef uint32_t payload = plan.payload - start if plan.payload - start < plan.size else plan.size
    cdef uint16_t l4_length = <uint16_t>(plan.header - plan.l4 + payload)
    cdef uint8_t* l4 = out + plan.l4
    cdef uint16_t checksum
    cdef uint64_t sum
    cdef uint8_t flags
    memcpy(out, plan.packet, plan.header)
    if plan.version == 4:
        store_be16(out + 2, <uint16_t>(plan.header + payload))
        store_be16(out + 4, <uint16_t>(plan.identification + index))
        memset(out + 10, 0, 2)
        checksum = checksum_finish(checksum_add(out, plan.l4, 0))
        memcpy(out + 10, &checksum, 2)
    else:
        store_be16(out + 4, <uint16_t>(plan.header + payload - 40))
    if plan.protocol == TCP:
        store_be32(l4 + 4, plan.sequence + start)
        flags = plan.flags
        if index:
            flags &= <uint8_t>~CWR           # RFC 3168: once is enough, and the first says it
        if index + 1 < plan.segments:
            flags &= <uint8_t>~(FIN | PSH)   # only where the data ends
        l4[13] = flags
        memset(l4 + 16, 0, 2)
    else:
        store_be16(l4 + 4, l4_length)
        memset(l4 + 6, 0, 2)
    store_be16(<uint8_t*>&checksum, l4_length)
    sum = <uint64_t>plan.partial + checksum
    sum = checksum_add(l4, plan.header - plan.l4, sum)
    checksum = checksum_finish(checksum_add(plan.packet + plan.header + start, payload, sum))
    if plan.protocol == TCP:
        memcpy(l4 + 16, &checksum, 2)
    else:
        if checksum == 0:
            checksum = 0xFFFF
        memcpy(l4 + 6, &checksum, 2)
    return payload


# ---------------------------------------------------- the same for Python: what the oracle is held against

def finished(bytes header, bytes packet):
    """The packet with the checksum that `header` (a virtio_net_hdr) leaves unfinished; None where it cannot be."""
    cdef virtio_net_hdr how
    if len(header) != sizeof(how):
        raise ValueError("not a virtio_net_hdr")
    memcpy(&how, <const uint8_t*>header, sizeof(how))
    copy = bytearray(packet)
    cdef uint8_t[::1] view = copy
    if not len(copy) or not finish_checksum(&how, &view[0], len(copy)):
        return None
    return bytes(copy)


def segments(bytes header, bytes packet):
    """The packets of a superframe; None where it is none that can be cut."""
    cdef virtio_net_hdr how
    cdef split_plan plan
    cdef uint32_t index, length
    cdef bytearray stamp
    if len(header) != sizeof(how):
        raise ValueError("not a virtio_net_hdr")
    memcpy(&how, <const uint8_t*>header, sizeof(how))
    if not plan_split(&how, packet, len(packet), &plan):
        return None
    found = []
    for index in range(plan.segments):
        stamp = bytearray(plan.header)
        length = stamp_segment(&plan, index, stamp)
        start = plan.header + index * plan.size
        found.append(bytes(stamp) + packet[start:start + length])
    return found
