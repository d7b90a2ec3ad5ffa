# Owns what is read from and written into one packet or frame: IP headers of both versions, the ICMP errors that we send,
# VXLAN with its Ethernet header, ECN across the tunnel.
# Free of descriptors, tables and memory: callers own every buffer and say how long it is.
# dataplane/path/wire.py is the oracle of every function here.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from dataplane.abi cimport (
    DROP_ECN, DROP_ETHERTYPE, DROP_FOREIGN_VNI, DROP_LENGTH, DROP_NO_VNI, DROP_NOT_IP, DROP_OTHER_MAC, DROP_OWN_MAC,
    DROP_REASONS, DROP_RESERVED_BITS, DROP_VLAN, u128,
)

cdef extern from "checksum.h" nogil:
    uint64_t checksum_add(const uint8_t* bytes, size_t length, uint64_t sum)
    uint16_t checksum_finish(uint64_t sum)
    uint16_t checksum_fold(uint64_t sum)

cdef enum:
    IPV4_HEADER = 20
    IPV6_HEADER = 40
    TCP = 6
    UDP = 17
    MOST_PACKET = 65535      # bytes, by an IP length field
    ICMP_HEADER = 8
    ICMP_PROTOCOL = 1
    ICMP_UNREACHABLE = 3
    ICMPV6_PROTOCOL = 58
    ICMPV6_UNREACHABLE = 1
    ICMPV6_TOO_BIG = 2
    # RFC 1812 section 4.3.2.3: quote as much as fits without the error exceeding 576 bytes
    ICMP_QUOTE = 548
    # RFC 4443 section 2.4 (c): without exceeding the least MTU of IPv6
    ICMPV6_QUOTE = 1232
    ICMP_MOST = 1280         # bytes of an error, of either version
    EXTENSIONS = 8           # headers behind an IPv6 header that are looked through; more are nobody's honest packet
    VXLAN_HEADER = 8
    FRAME_HEAD = 22          # VXLAN and Ethernet
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_IPV6 = 0x86DD
    ECN_NOT_ECT = 0
    ECN_ECT_1 = 1
    ECN_ECT_0 = 2
    ECN_CE = 3

cdef enum:                   # TCP's flags
    FIN = 0x01
    PSH = 0x08
    ACK = 0x10
    ECE = 0x40
    CWR = 0x80

cdef struct ip_view:
    u128 source              # host order, IPv4 as ::ffff:a.b.c.d
    u128 destination
    size_t length            # total length by the header; what lies behind it is padding
    uint32_t version

cdef struct vxlan_link:
    uint8_t head[FRAME_HEAD] # of every frame that we send, but for the peer's MAC and the ethertype
    uint8_t mac[6]           # ours
    uint16_t ethertype       # the only one that we take


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


cdef inline uint64_t load_be64(const uint8_t* bytes) noexcept nogil:
    return <uint64_t>load_be32(bytes) << 32 | load_be32(bytes + 4)


cdef inline u128 load_u128(const uint8_t* bytes) noexcept nogil:
    return <u128>load_be64(bytes) << 64 | load_be64(bytes + 8)


cdef inline void store_u128(uint8_t* bytes, u128 value) noexcept nogil:
    store_be32(bytes, <uint32_t>(value >> 96))
    store_be32(bytes + 4, <uint32_t>(value >> 64))
    store_be32(bytes + 8, <uint32_t>(value >> 32))
    store_be32(bytes + 12, <uint32_t>value)


cdef inline u128 mapped(uint32_t address) noexcept nogil:
    """An IPv4 address as one of IPv6 (RFC 4291 section 2.5.5.2)."""
    return <u128>0xFFFF << 32 | address


cdef inline bint is_mapped(u128 address) noexcept nogil:
    return address >> 32 == 0xFFFF


# ------------------------------------------------------------------------------------------------------------ IP

cdef inline int parse_ipv4(const uint8_t* packet, size_t length, ip_view* view) noexcept nogil:
    cdef size_t header
    if length < IPV4_HEADER:
        return DROP_NOT_IP
    header = (packet[0] & 15) * 4
    view.length = load_be16(packet + 2)
    if header < IPV4_HEADER:
        return DROP_NOT_IP
    if view.length < header or view.length > length:
        return DROP_LENGTH
    view.version = 4
    view.source = mapped(load_be32(packet + 12))
    view.destination = mapped(load_be32(packet + 16))
    return DROP_REASONS


cdef inline int parse_ipv6(const uint8_t* packet, size_t length, ip_view* view) noexcept nogil:
    if length < IPV6_HEADER:
        return DROP_NOT_IP
    # a jumbogram (RFC 2675) says 0: it is longer than any datagram that could carry it
    view.length = IPV6_HEADER + load_be16(packet + 4)
    if view.length > length:
        return DROP_LENGTH
    view.version = 6
    view.source = load_u128(packet + 8)
    view.destination = load_u128(packet + 24)
    return DROP_REASONS


cdef inline int parse_ip(const uint8_t* packet, size_t length, ip_view* view) noexcept nogil:
    """Read the header of a packet of `length` bytes; DROP_REASONS where it can be carried, else why not."""
    view.source = 0          # gcc does not see everywhere that of a packet which cannot be carried it is never read
    if length and packet[0] >> 4 == 4:
        return parse_ipv4(packet, length, view)
    if length and packet[0] >> 4 == 6:
        return parse_ipv6(packet, length, view)
    return DROP_NOT_IP


cdef inline uint32_t find_l4(const uint8_t* packet, const ip_view* view, uint8_t* protocol) noexcept nogil:
    """Where the upper layer's header begins, and its protocol; 0 for a fragment, and where it cannot be found."""
    cdef uint32_t at = (packet[0] & 15) * 4, i
    if view.version == 4:
        protocol[0] = packet[9]
        return 0 if load_be16(packet + 6) & 0x3FFF else at
    protocol[0] = packet[6]
    at = IPV6_HEADER
    for i in range(EXTENSIONS):
        # hop-by-hop options, routing, destination options (RFC 8200 section 4)
        if protocol[0] != 0 and protocol[0] != 43 and protocol[0] != 60:
            return 0 if protocol[0] == 44 else at
        if at + 8 > view.length:
            return 0
        protocol[0] = packet[at]
        at += 8 * <uint32_t>packet[at + 1] + 8
    return 0


cdef inline uint64_t pseudo_sum(const uint8_t* packet, uint8_t protocol, uint32_t l4_length) noexcept nogil:
    """RFC 9293 section 3.1 and RFC 8200 section 8.1, in the machine's order."""
    cdef uint64_t sum
    cdef uint8_t words[4]
    words[0] = 0
    words[1] = protocol
    store_be16(words + 2, <uint16_t>l4_length)
    sum = checksum_add(words, 4, 0)
    if packet[0] >> 4 == 4:
        return checksum_add(packet + 12, 8, sum)
    return checksum_add(packet + 8, 32, sum)


cdef inline bint unfinished_checksum(const uint8_t* packet, const ip_view* view, uint16_t* start,
                                     uint16_t* offset) noexcept nogil:
    """Whether the packet's TCP or UDP checksum holds no more than the pseudo-header's sum, as a kernel VTEP leaves it for
    the next device; then also where it is. One that is right as it stands is finished, whatever it looks like."""
    cdef uint8_t protocol
    cdef uint32_t l4 = find_l4(packet, view, &protocol)
    cdef uint32_t length = <uint32_t>view.length - l4
    cdef uint16_t found
    cdef uint64_t sum
    offset[0] = 16 if protocol == TCP else 6
    start[0] = <uint16_t>l4
    if l4 == 0 or (protocol != TCP and protocol != UDP) or l4 + (20 if protocol == TCP else 8) > view.length:
        return False
    memcpy(&found, packet + l4 + offset[0], 2)
    sum = pseudo_sum(packet, protocol, length)
    if found != checksum_fold(sum):
        return False
    return checksum_fold(checksum_add(packet + l4, length, sum)) != 0xFFFF


# ---------------------------------------------------------------------------------------------------------- ICMP

cdef inline bint may_answer_v4(const uint8_t* packet, const ip_view* view) noexcept nogil:
    """RFC 1122 section 3.2.2: no ICMP error about an ICMP error, a later fragment, a multicast or broadcast
    destination, or a source that is no single host."""
    cdef size_t header = (packet[0] & 15) * 4
    cdef uint8_t kind
    if load_be16(packet + 6) & 0x1FFF:
        return False
    if packet[16] >= 224 or packet[12] >= 224 or packet[12] == 0 or packet[12] == 127:
        return False
    if packet[9] == ICMP_PROTOCOL:
        if view.length < header + 1:
            return False
        kind = packet[header]
        # the queries of RFC 792 and RFC 950; everything else is an error or unknown
        return kind == 0 or kind == 8 or 13 <= kind <= 18
    return True


cdef inline bint may_answer_v6(const uint8_t* packet, const ip_view* view, bint too_big) noexcept nogil:
    """RFC 4443 section 2.4 (e): no error about an ICMPv6 error or redirect, a multicast destination (but that it is too
    big), or a source that is no single host. What may be any of these, such as a later fragment, gets none either."""
    cdef uint8_t protocol
    cdef uint32_t l4
    cdef u128 source = view.source
    if packet[24] == 0xFF and not too_big:
        return False
    if packet[8] == 0xFF or source <= 1 or is_mapped(source):
        return False
    if packet[6] == 44:                  # a first fragment says what it is, if its header lies within (RFC 7112)
        if view.length < 56 or load_be16(packet + 42) & 0xFFF8 or packet[40] in (0, 43, 44, 60):
            return False
        protocol, l4 = packet[40], 48
    else:
        l4 = find_l4(packet, view, &protocol)
    if l4 == 0 or (protocol == ICMPV6_PROTOCOL and (l4 >= view.length or packet[l4] < 128 or packet[l4] == 137)):
        return False
    return True


cdef inline bint may_answer_with_icmp(const uint8_t* packet, const ip_view* view, bint too_big) noexcept nogil:
    return may_answer_v4(packet, view) if view.version == 4 else may_answer_v6(packet, view, too_big)


cdef inline size_t build_icmpv4(uint8_t* out, const uint8_t* source, uint16_t mtu, const uint8_t* packet,
                                size_t length) noexcept nogil:
    cdef size_t quote = length if length < ICMP_QUOTE else <size_t>ICMP_QUOTE
    cdef size_t total = IPV4_HEADER + ICMP_HEADER + quote
    cdef uint8_t* icmp = out + IPV4_HEADER
    cdef uint16_t checksum
    memset(out, 0, IPV4_HEADER + ICMP_HEADER)
    out[0] = 0x45
    out[1] = 0xC0                    # RFC 1812 section 5.3.2: precedence of internetwork control
    store_be16(out + 2, <uint16_t>total)
    out[8] = 64
    out[9] = ICMP_PROTOCOL
    memcpy(out + 12, source, 4)
    memcpy(out + 16, packet + 12, 4)
    checksum = checksum_finish(checksum_add(out, IPV4_HEADER, 0))
    memcpy(out + 10, &checksum, 2)
    icmp[0] = ICMP_UNREACHABLE
    icmp[1] = 4 if mtu else 0
    store_be16(icmp + 6, mtu)        # RFC 1191 section 4
    memcpy(icmp + ICMP_HEADER, packet, quote)
    checksum = checksum_finish(checksum_add(icmp, ICMP_HEADER + quote, 0))
    memcpy(icmp + 2, &checksum, 2)
    return total


cdef inline size_t build_icmpv6(uint8_t* out, const uint8_t* source, uint16_t mtu, const uint8_t* packet,
                                size_t length) noexcept nogil:
    cdef size_t quote = length if length < ICMPV6_QUOTE else <size_t>ICMPV6_QUOTE
    cdef uint32_t payload = <uint32_t>(ICMP_HEADER + quote)
    cdef uint8_t* icmp = out + IPV6_HEADER
    cdef uint16_t checksum
    memset(out, 0, IPV6_HEADER + ICMP_HEADER)
    out[0] = 0x60
    store_be16(out + 4, <uint16_t>payload)
    out[6] = ICMPV6_PROTOCOL
    out[7] = 64
    memcpy(out + 8, source, 16)
    memcpy(out + 24, packet + 8, 16)
    icmp[0] = ICMPV6_TOO_BIG if mtu else ICMPV6_UNREACHABLE
    store_be16(icmp + 6, mtu)        # RFC 4443 section 3.2
    memcpy(icmp + ICMP_HEADER, packet, quote)
    checksum = checksum_finish(checksum_add(icmp, payload, pseudo_sum(out, ICMPV6_PROTOCOL, payload)))
    memcpy(icmp + 2, &checksum, 2)
    return IPV6_HEADER + payload


cdef inline size_t build_icmp_error(uint8_t* out, const uint8_t* source, uint16_t mtu, const uint8_t* packet,
                                    const ip_view* about) noexcept nogil:
    """Write an ICMP error about `packet` into `out`, which holds ICMP_MOST bytes; returns its length. `source`: our
    address of the packet's version, in network order. `mtu`: the packet is longer than that; 0: it has no route."""
    if about.version == 4:
        return build_icmpv4(out, source, mtu, packet, about.length)
    return build_icmpv6(out, source, mtu, packet, about.length)


# --------------------------------------------------------------------------------------------------------- VXLAN

cdef inline void write_frame_head(uint8_t* out, const vxlan_link* link, const uint8_t* to, uint32_t version) noexcept nogil:
    """What stands before an inner packet: RFC 7348 section 5."""
    memcpy(out, link.head, FRAME_HEAD)
    memcpy(out + VXLAN_HEADER, to, 6)
    store_be16(out + FRAME_HEAD - 2, ETHERTYPE_IPV4 if version == 4 else ETHERTYPE_IPV6)


cdef inline int parse_frame_head(const uint8_t* datagram, size_t length, const vxlan_link* link) noexcept nogil:
    """DROP_REASONS where a packet for us follows, else why not. What the kernel's device refuses comes first, in its
    order (drivers/net/vxlan/vxlan_core.c, vxlan_rcv); the rest is refused by the host behind such a device."""
    cdef uint16_t ethertype
    if length < VXLAN_HEADER:
        return DROP_LENGTH
    if not datagram[0] & 0x08:
        return DROP_NO_VNI
    if memcmp(datagram + 4, link.head + 4, 3):
        return DROP_FOREIGN_VNI
    if memcmp(datagram, link.head, VXLAN_HEADER):
        return DROP_RESERVED_BITS
    if length < FRAME_HEAD:
        return DROP_LENGTH
    if memcmp(datagram + VXLAN_HEADER + 6, link.mac, 6) == 0:
        return DROP_OWN_MAC
    if memcmp(datagram + VXLAN_HEADER, link.mac, 6):
        return DROP_OTHER_MAC
    ethertype = load_be16(datagram + FRAME_HEAD - 2)
    if ethertype == link.ethertype:
        return DROP_REASONS
    return DROP_VLAN if ethertype == 0x8100 or ethertype == 0x88A8 else DROP_ETHERTYPE


cdef inline uint8_t inner_ecn(const uint8_t* packet) noexcept nogil:
    return packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3


cdef inline uint8_t encap_ecn(const uint8_t* packet) noexcept nogil:
    """For the outer header: congestion that was met before the tunnel stays inside (include/net/inet_ecn.h)."""
    cdef uint8_t inner = inner_ecn(packet)
    return ECN_ECT_0 if inner == ECN_CE else inner


cdef inline void set_ecn(uint8_t* packet, uint8_t ecn) noexcept nogil:
    cdef uint16_t former, now, checksum
    if packet[0] >> 4 == 6:
        packet[1] = <uint8_t>(packet[1] & 0xCF | ecn << 4)
        return
    memcpy(&former, packet, 2)
    packet[1] = packet[1] & 0xFC | ecn
    memcpy(&now, packet, 2)
    memcpy(&checksum, packet + 10, 2)
    # RFC 1624 section 3: HC' = ~(~HC + ~m + m')
    checksum = checksum_finish(<uint64_t><uint16_t>~checksum + <uint16_t>~former + now)
    memcpy(packet + 10, &checksum, 2)


cdef inline int decap_ecn(uint8_t* packet, uint8_t outer) noexcept nogil:
    """Carry what the underlay said into the packet (RFC 6040 section 4.2); DROP_ECN where it cannot be heard."""
    cdef uint8_t inner = inner_ecn(packet)
    if outer == ECN_NOT_ECT or outer == inner:
        return DROP_REASONS
    if outer == ECN_CE:
        if inner == ECN_NOT_ECT:
            return DROP_ECN
        set_ecn(packet, ECN_CE)
    elif outer == ECN_ECT_1 and inner == ECN_ECT_0:
        set_ecn(packet, ECN_ECT_1)
    return DROP_REASONS
