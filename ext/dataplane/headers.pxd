# Owns what is read from and written into one packet: the IPv4 header, and the ICMP errors that we send.
# Free of descriptors, tables and memory: callers own every buffer and say how long it is.
# dataplane/path/wire.py is the oracle of every function here.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from dataplane.abi cimport DROP_LENGTH, DROP_NOT_IP, DROP_REASONS

cdef extern from "checksum.h" nogil:
    uint64_t checksum_add(const uint8_t* bytes, size_t length, uint64_t sum)
    uint16_t checksum_finish(uint64_t sum)
    uint16_t checksum_fold(uint64_t sum)

cdef enum:
    IPV4_HEADER = 20
    ICMP_HEADER = 8
    ICMP_PROTOCOL = 1
    ICMP_UNREACHABLE = 3
    # RFC 1812 section 4.3.2.3: quote as much as fits without the error exceeding 576 bytes
    ICMP_QUOTE = 548

cdef struct ipv4_view:
    uint32_t source          # host order
    uint32_t destination     # host order
    size_t length            # total length by the header; what lies behind it is padding


cdef inline uint16_t load_be16(const uint8_t* bytes) noexcept nogil:
    return <uint16_t>((bytes[0] << 8) | bytes[1])


cdef inline uint32_t load_be32(const uint8_t* bytes) noexcept nogil:
    return (<uint32_t>bytes[0] << 24) | (<uint32_t>bytes[1] << 16) | (<uint32_t>bytes[2] << 8) | bytes[3]


cdef inline void store_be16(uint8_t* bytes, uint16_t value) noexcept nogil:
    bytes[0] = <uint8_t>(value >> 8)
    bytes[1] = <uint8_t>value


cdef inline void store_be32(uint8_t* bytes, uint32_t value) noexcept nogil:
    bytes[0] = <uint8_t>(value >> 24)
    bytes[1] = <uint8_t>(value >> 16)
    bytes[2] = <uint8_t>(value >> 8)
    bytes[3] = <uint8_t>value


cdef inline int parse_ipv4(const uint8_t* packet, size_t length, ipv4_view* view) noexcept nogil:
    """Read the header of a packet of `length` bytes; DROP_REASONS where it can be carried, else why not."""
    cdef size_t header
    if length < IPV4_HEADER or packet[0] >> 4 != 4:
        return DROP_NOT_IP
    header = (packet[0] & 15) * 4
    view.length = load_be16(packet + 2)
    if header < IPV4_HEADER:
        return DROP_NOT_IP
    if view.length < header or view.length > length:
        return DROP_LENGTH
    view.source = load_be32(packet + 12)
    view.destination = load_be32(packet + 16)
    return DROP_REASONS


cdef inline bint may_answer_with_icmp(const uint8_t* packet, const ipv4_view* view) noexcept nogil:
    """RFC 1122 section 3.2.2: no ICMP error about an ICMP error, a later fragment, a multicast or broadcast
    destination, or a source that is no single host."""
    cdef size_t header = (packet[0] & 15) * 4
    cdef uint8_t kind
    if load_be16(packet + 6) & 0x1FFF:
        return False
    if view.destination >> 28 >= 14 or view.source >> 28 >= 14:
        return False
    if view.source >> 24 == 0 or view.source >> 24 == 127:
        return False
    if packet[9] == ICMP_PROTOCOL:
        if view.length < header + 1:
            return False
        kind = packet[header]
        # the queries of RFC 792 and RFC 950; everything else is an error or unknown
        return kind == 0 or kind == 8 or 13 <= kind <= 18
    return True


cdef inline size_t build_icmp_error(uint8_t* out, uint32_t source, uint8_t kind, uint8_t code, uint32_t rest,
                                    const uint8_t* packet, const ipv4_view* about) noexcept nogil:
    """Write an ICMP error from `source` (host order) about `packet` into `out`, which holds 576 bytes; returns its
    length. `rest` is the second word of the ICMP header (RFC 792)."""
    cdef size_t quote = about.length if about.length < ICMP_QUOTE else <size_t>ICMP_QUOTE
    cdef size_t total = IPV4_HEADER + ICMP_HEADER + quote
    cdef uint8_t* icmp = out + IPV4_HEADER
    cdef uint16_t checksum
    memset(out, 0, IPV4_HEADER + ICMP_HEADER)
    out[0] = 0x45
    out[1] = 0xC0                    # RFC 1812 section 5.3.2: precedence of internetwork control
    store_be16(out + 2, <uint16_t>total)
    out[8] = 64
    out[9] = ICMP_PROTOCOL
    store_be32(out + 12, source)
    store_be32(out + 16, about.source)
    checksum = checksum_finish(checksum_add(out, IPV4_HEADER, 0))
    memcpy(out + 10, &checksum, 2)
    icmp[0] = kind
    icmp[1] = code
    store_be32(icmp + 4, rest)
    memcpy(icmp + ICMP_HEADER, packet, quote)
    checksum = checksum_finish(checksum_add(icmp, ICMP_HEADER + quote, 0))
    memcpy(icmp + 2, &checksum, 2)
    return total
