# Owns what the fuzzer starts from: a generator of random numbers, packets and superframes with right checksums, the
# ways in which they are spoiled, and memory that ends where a packet ends. Free of what is being tested: sums and
# headers are made in the plainest way, so that they can serve as an oracle.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from dataplane.abi cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap

cdef extern from "<sys/mman.h>" nogil:
    int mprotect(void* address, size_t length, int protection)
    int PROT_NONE

cdef enum:
    PAGE = 4096

cdef struct flow_seed:
    bint v6
    bint tcp
    uint32_t source          # IPv4, or the last word of the IPv6 address
    uint32_t destination
    uint16_t sport
    uint16_t dport
    uint32_t sequence
    uint16_t identification
    uint16_t fragment        # DF and what goes with it
    uint8_t traffic_class
    uint8_t hops
    uint32_t options         # bytes of TCP options
    uint32_t extension       # bytes of IPv6 extension headers

cdef struct packet_shape:
    uint32_t l4
    uint32_t header          # bytes of all headers


cdef inline uint8_t* guarded(size_t bytes) noexcept nogil:
    """The end of `bytes` (whole pages) of memory behind which nothing can be read or written; NULL if there is none."""
    cdef uint8_t* memory = <uint8_t*>mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED or mprotect(memory + bytes, PAGE, PROT_NONE):
        return NULL
    return memory + bytes


# ------------------------------------------------------------------------------------------------------- numbers

cdef inline uint64_t seeded(uint64_t number) noexcept nogil:
    """splitmix64: neighbouring numbers give unrelated states, never 0."""
    number = (number + 1) * <uint64_t>0x9E3779B97F4A7C15
    number = (number ^ (number >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    number = (number ^ (number >> 27)) * <uint64_t>0x94D049BB133111EB
    return (number ^ (number >> 31)) | 1


cdef inline uint32_t draw(uint64_t* state) noexcept nogil:
    """xorshift64*"""
    state[0] ^= state[0] >> 12
    state[0] ^= state[0] << 25
    state[0] ^= state[0] >> 27
    return <uint32_t>((state[0] * <uint64_t>0x2545F4914F6CDD1D) >> 32)


cdef inline uint32_t below(uint64_t* state, uint32_t limit) noexcept nogil:
    return <uint32_t>((<uint64_t>draw(state) * limit) >> 32)


cdef inline bint one_in(uint64_t* state, uint32_t many) noexcept nogil:
    return below(state, many) == 0


# ------------------------------------------------------------------------------------------------------- packets

cdef inline void put16(uint8_t* at, uint32_t value) noexcept nogil:
    at[0] = <uint8_t>(value >> 8)
    at[1] = <uint8_t>value


cdef inline void put32(uint8_t* at, uint32_t value) noexcept nogil:
    put16(at, value >> 16)
    put16(at + 2, value)


cdef inline uint32_t get16(const uint8_t* at) noexcept nogil:
    return <uint32_t>at[0] << 8 | at[1]


cdef inline uint32_t get32(const uint8_t* at) noexcept nogil:
    return get16(at) << 16 | get16(at + 2)


cdef inline uint32_t plain_sum(const uint8_t* at, uint32_t length, uint32_t total) noexcept nogil:
    """RFC 1071, word by word."""
    cdef uint32_t i
    for i in range(length // 2):
        total += get16(at + 2 * i)
    if length & 1:
        total += <uint32_t>at[length - 1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


cdef inline uint32_t pseudo(const uint8_t* packet, uint32_t protocol, uint32_t l4_length) noexcept nogil:
    if packet[0] >> 4 == 4:
        return plain_sum(packet + 12, 8, protocol + l4_length)
    return plain_sum(packet + 8, 32, protocol + l4_length)


cdef inline bint all_right(const uint8_t* packet, uint32_t l4, uint32_t protocol, uint32_t length) noexcept nogil:
    """Whether both checksums of a packet without a routing header are right."""
    if packet[0] >> 4 == 4 and plain_sum(packet, l4, 0) != 0xFFFF:
        return False
    return plain_sum(packet + l4, length - l4, pseudo(packet, protocol, length - l4)) == 0xFFFF


cdef inline void draw_flow(uint64_t* state, flow_seed* flow, bint v6) noexcept nogil:
    """One of few flows, so that packets meet."""
    flow.v6 = v6
    flow.tcp = not one_in(state, 3)
    flow.source = <uint32_t>0x0A010001 + (below(state, 5) << 8) + below(state, 2)
    flow.destination = <uint32_t>0x0A010001 + (below(state, 5) << 8)
    flow.sport = <uint16_t>(1000 + below(state, 2))
    flow.dport = 8472 if one_in(state, 40) else 80
    flow.sequence = <uint32_t>0xFFFFFF80 if one_in(state, 4) else draw(state)
    flow.identification = 0xFFFE if one_in(state, 4) else <uint16_t>draw(state)
    flow.fragment = 0 if one_in(state, 3) else 0x4000
    flow.traffic_class = <uint8_t>below(state, 4)
    flow.hops = 64
    flow.options = 4 * below(state, 11) if one_in(state, 3) else 0
    flow.extension = 0


cdef inline packet_shape shape_of(const flow_seed* flow) noexcept nogil:
    cdef packet_shape shape
    shape.l4 = 40 + flow.extension if flow.v6 else 20
    shape.header = shape.l4 + (20 + flow.options if flow.tcp else 8)
    return shape


cdef inline void write_ip(const flow_seed* flow, uint8_t* packet, uint32_t length) noexcept nogil:
    cdef uint32_t protocol = 6 if flow.tcp else 17
    if flow.v6:
        put32(packet, <uint32_t>0x60000000 | <uint32_t>flow.traffic_class << 20)
        put16(packet + 4, length - 40)
        packet[6] = <uint8_t>(60 if flow.extension else protocol)
        packet[7] = flow.hops
        packet[8] = packet[24] = 0xFD
        put32(packet + 20, flow.source)
        put32(packet + 36, flow.destination)
        if flow.extension:                   # destination options: one PadN that fills them
            packet[40] = <uint8_t>protocol
            packet[41] = <uint8_t>(flow.extension // 8 - 1)
            packet[42] = 1
            packet[43] = <uint8_t>(flow.extension - 4)
        return
    packet[0] = 0x45
    packet[1] = flow.traffic_class
    put16(packet + 2, length)
    put16(packet + 4, flow.identification)
    put16(packet + 6, flow.fragment)
    packet[8] = flow.hops
    packet[9] = <uint8_t>protocol
    put32(packet + 12, flow.source)
    put32(packet + 16, flow.destination)
    put16(packet + 10, ~plain_sum(packet, 20, 0))


cdef inline uint32_t write_packet(uint64_t* state, const flow_seed* flow, uint8_t* packet, uint32_t payload,
                                  uint8_t flags, bint finished) noexcept nogil:
    """Write a packet; returns its length. Unfinished: with the pseudo-header's sum for a checksum."""
    cdef packet_shape shape = shape_of(flow)
    cdef uint32_t length = shape.header + payload, i, sum
    cdef uint64_t filling = state[0]
    cdef uint8_t* l4 = packet + shape.l4
    memset(packet, 0, shape.header)
    for i in range(payload // 8):
        filling += <uint64_t>0x9E3779B97F4A7C15
        memcpy(packet + shape.header + 8 * i, &filling, 8)
    memset(packet + length - payload % 8, <int>(filling & 255), payload % 8)
    write_ip(flow, packet, length)
    put16(l4, flow.sport)
    put16(l4 + 2, flow.dport)
    if flow.tcp:
        put32(l4 + 4, flow.sequence)
        put32(l4 + 8, 7)
        l4[12] = <uint8_t>((5 + flow.options // 4) << 4)
        l4[13] = flags
        put16(l4 + 14, 500)
        memset(l4 + 20, 1, flow.options)
    else:
        put16(l4 + 4, 8 + payload)
    sum = pseudo(packet, 6 if flow.tcp else 17, length - shape.l4)
    if finished:
        sum = ~plain_sum(l4, length - shape.l4, sum) & 0xFFFF
        if sum == 0 and not flow.tcp:
            sum = 0xFFFF
    put16(l4 + (16 if flow.tcp else 6), sum)
    return length


cdef inline uint32_t spoil(uint64_t* state, uint8_t** packet, uint32_t length) noexcept nogil:
    """Change a packet that ends where its memory ends, mostly in its headers; returns its length, now perhaps less."""
    cdef uint32_t near = length if length < 64 or one_in(state, 4) else 64
    cdef uint32_t kept, kind = below(state, 5)
    if length == 0:
        return 0
    if kind == 0:
        packet[0][below(state, near)] ^= <uint8_t>(1 << below(state, 8))
    elif kind == 1:
        packet[0][below(state, near)] = <uint8_t>draw(state)
    elif kind == 2 and length >= 2:
        put16(packet[0] + below(state, near - 1), 0xFFFF if one_in(state, 2) else below(state, 80))
    elif kind == 3:
        kept = below(state, near + 1)
        memmove(packet[0] + length - kept, packet[0], kept)
        packet[0] += length - kept
        return kept
    elif length > 20:                        # a length field that lies a little
        put16(packet[0] + (2 if packet[0][0] >> 4 == 4 else 4), length - 2 + below(state, 5))
    return length
