# Owns the taps: what a pump copies of a packet that somebody wants to see, into a ring of that pump's own.
# Free of descriptors and of the file that comes of it (_tap.pyx). dataplane/debug/expression.py compiles the filters.
#
# Invariant: one writer and one reader for each ring, no lock; a pump never waits for the reader: what finds no room is
# counted, and the next record that does says how many are missing before it. While nothing is armed, a pump looks at
# one pointer for each run or message.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from dataplane.abi cimport *
from dataplane.headers cimport checksum_add, checksum_fold, is_mapped, load_be16, store_be32, store_u128

cdef enum:
    TAPS = 4                 # armed at once
    PATHS = 32               # engines: of VXLAN two paths, one for each IP version, and of each up to 16 queues
    MOST_PORTS = 64          # SENDERS of _pump.pxd
    TAP_TX = 0
    TAP_RX = 1
    NO_VNI = 0xFFFFFFFF
    FRAGMENT_HEADER = 44
    # where a test leads
    TAP_ACCEPT = 0xFFFF
    TAP_REJECT = 0xFFFE

cdef enum tap_kind:          # mirrors dataplane.debug.expression.Kind
    TEST_DIRECTION = 0       # low: TAP_TX or TAP_RX
    TEST_DROP = 1            # low: a bit for each DropReason
    TEST_PEER = 2            # address, bits: the other node's outer address
    TEST_NET = 3             # ends, address, bits: inner addresses
    TEST_PROTOCOL = 4        # low
    TEST_PORT = 5            # ends, low to high
    TEST_VERSION = 6         # low: of the inner packet
    TEST_LENGTH = 7          # low to high: of the inner packet
    TEST_VNI = 8             # low

cdef enum tap_ends:
    END_SOURCE = 1
    END_DESTINATION = 2

cdef struct tap_test:        # 32 bytes; a filter is an array of them, and each leads to a later one
    uint8_t kind
    uint8_t ends             # END_SOURCE, END_DESTINATION; with both, one of them is enough
    uint8_t version          # of `address`
    uint8_t bits
    uint16_t yes
    uint16_t no
    uint32_t low
    uint32_t high
    uint8_t address[16]

cdef struct tap_view:        # what a filter asks about an inner packet
    uint8_t version          # 0: no IP packet, or too short to say
    uint8_t protocol
    uint8_t behind           # IPv6: the protocol of a fragment, behind its header
    bint ports
    uint16_t ports_of[2]     # source, destination
    uint32_t length
    const uint8_t* ends[2]

cdef struct tap_record:      # the payload's first bytes follow, padded to a multiple of 8
    uint32_t size            # with data and padding; 0: the ring goes on at its start
    uint32_t captured        # bytes of the payload that follow
    uint32_t length          # bytes of the whole payload: what the outer UDP header carries
    uint32_t lost            # records of this ring that found no room since the one before
    uint64_t ns              # CLOCK_REALTIME
    uint64_t superframe      # which one it was part of; 0 for none
    uint32_t superframe_bytes
    uint32_t vni
    uint16_t local_port
    uint16_t remote_port
    uint8_t direction
    uint8_t drop             # a DropReason, DROP_REASONS for none
    uint8_t outer            # version of the outer header; 0: none was made or seen
    uint8_t skip             # bytes of the payload before the inner packet
    uint8_t tos
    uint8_t ttl
    uint8_t lease            # version of `subnet`; 0: no lease is known
    uint8_t lease_bits
    uint8_t dont_fragment
    uint8_t path             # number of the engine among those of its backend
    uint16_t sum             # of the payload where `outer` is 6: there UDP must have a checksum (RFC 8200 section 8.1)
    uint8_t local[16]        # outer addresses; IPv4 in the first four bytes
    uint8_t remote[16]
    uint8_t subnet[16]       # of the peer's lease

cdef struct tap_ring:
    uint8_t* bytes
    uint64_t size            # a power of two
    uint64_t apart[6]
    uint64_t written         # bytes ever; by the pump
    uint64_t matched         # packets that the filter let through
    uint64_t lost
    uint64_t lost_before     # since the last record
    uint64_t apart_too[4]
    uint64_t read            # bytes ever; by the reader
    uint64_t apart_again[7]

cdef struct tap_state:
    tap_ring rings[2 * PATHS]        # by path and direction: each has one writer; those of a path that was never armed
                                     # have no bytes
    tap_test* tests
    uint32_t count
    uint32_t snaplen         # bytes of an inner packet that are kept

cdef struct tap_set:         # never changes once it is armed
    tap_record about         # what all records have in common
    uint16_t port            # where datagrams come in
    uint16_t ports[MOST_PORTS]   # by which they leave, by number of the socket
    uint32_t count
    tap_state* taps[TAPS]


cdef inline uint64_t wall_ns() noexcept nogil:
    cdef clock_time now
    clock_gettime(CLOCK_REALTIME, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline void name_remote(tap_record* about, u128 address) noexcept nogil:
    if is_mapped(address):
        about.outer = 4
        store_be32(about.remote, <uint32_t>address)
    else:
        about.outer = 6
        store_u128(about.remote, address)


# ------------------------------------------------------------------------------------------------------ filters

cdef inline void look(tap_view* view, const uint8_t* packet, size_t length) noexcept nogil:
    """Read what a filter may ask. `length`: bytes there are, which may be less than the packet's own."""
    cdef size_t header
    cdef bint first = True
    memset(view, 0, sizeof(tap_view))
    view.length = <uint32_t>length
    if length >= 20 and packet[0] >> 4 == 4:
        view.version = 4
        view.protocol = packet[9]
        view.ends[0] = packet + 12
        view.ends[1] = packet + 16
        view.length = load_be16(packet + 2)
        header = (packet[0] & 15) * 4
        first = not load_be16(packet + 6) & 0x1FFF
    elif length >= 40 and packet[0] >> 4 == 6:
        view.version = 6
        view.protocol = packet[6]
        view.ends[0] = packet + 8
        view.ends[1] = packet + 24
        view.length = load_be16(packet + 4) + 40
        header = 40
        if view.protocol == FRAGMENT_HEADER and length > 40:
            view.behind = packet[40]
    else:
        return
    if first and view.protocol in (6, 17, 132) and length >= header + 4:
        view.ports = True
        view.ports_of[0] = load_be16(packet + header)
        view.ports_of[1] = load_be16(packet + header + 2)


cdef inline bint within(const uint8_t* address, const tap_test* test) noexcept nogil:
    cdef unsigned int whole = test.bits >> 3, rest = test.bits & 7
    if whole and memcmp(address, test.address, whole) != 0:
        return False
    return rest == 0 or (address[whole] ^ test.address[whole]) >> (8 - rest) == 0


cdef inline bint end_within(const tap_view* view, const tap_test* test) noexcept nogil:
    if view.version != test.version:
        return False
    return (test.ends & END_SOURCE and within(view.ends[0], test)) or (
        test.ends & END_DESTINATION and within(view.ends[1], test)
    )


cdef inline bint port_within(const tap_view* view, const tap_test* test) noexcept nogil:
    if not view.ports:
        return False
    return (test.ends & END_SOURCE and test.low <= view.ports_of[0] <= test.high) or (
        test.ends & END_DESTINATION and test.low <= view.ports_of[1] <= test.high
    )


cdef inline bint holds(const tap_test* test, const tap_view* view, const tap_record* about) noexcept nogil:
    if test.kind == TEST_NET:
        return end_within(view, test)
    if test.kind == TEST_PROTOCOL:
        return view.version != 0 and (view.protocol == test.low or (view.behind and view.behind == test.low))
    if test.kind == TEST_PORT:
        return port_within(view, test)
    if test.kind == TEST_VERSION:
        return view.version == test.low
    if test.kind == TEST_LENGTH:
        return test.low <= view.length <= test.high
    if test.kind == TEST_DIRECTION:
        return about.direction == test.low
    if test.kind == TEST_DROP:
        return about.drop != DROP_REASONS and (test.low >> about.drop) & 1
    if test.kind == TEST_PEER:
        return about.outer == test.version and within(about.remote, test)
    return about.vni == test.low


cdef inline bint lets_through(const tap_test* tests, uint32_t count, const tap_view* view,
                              const tap_record* about) noexcept nogil:
    """Whether a filter accepts; one without tests accepts everything. It ends, since every test leads to a later one."""
    cdef uint32_t at = 0
    while at < count:
        at = tests[at].yes if holds(&tests[at], view, about) else tests[at].no
    return at != TAP_REJECT


# ------------------------------------------------------------------------------------------------------ the ring

cdef inline uint32_t padded(uint32_t size) noexcept nogil:
    return (size + 7) & ~<uint32_t>7


cdef inline tap_record* reserve(tap_ring* ring, uint32_t size) noexcept nogil:
    """Room for a record of `size` bytes in one piece; NULL where there is none, which is counted."""
    cdef uint64_t at = ring.written & (ring.size - 1)
    cdef uint64_t skipped = ring.size - at if at + size > ring.size else 0
    tally(&ring.matched, 1)
    if ring.written + skipped + size - load_u64(&ring.read) > ring.size:
        tally(&ring.lost, 1)
        ring.lost_before += 1
        return NULL
    if skipped:
        (<tap_record*>(ring.bytes + at)).size = 0
        store_u64(&ring.written, ring.written + skipped)
        at = 0
    return <tap_record*>(ring.bytes + at)


cdef inline void write_record(tap_state* tap, tap_record* about, const iovec* parts, uint32_t count) noexcept nogil:
    """Copy the first bytes of a payload, gathered from `parts`, behind what is known `about` it."""
    cdef tap_ring* ring = &tap.rings[2 * about.path + about.direction]
    cdef uint32_t most = about.skip + tap.snaplen, i, length
    cdef uint32_t captured = about.length if about.length < most else most
    cdef uint32_t size = <uint32_t>sizeof(tap_record) + padded(captured)
    cdef tap_record* record = reserve(ring, size)
    cdef uint64_t sum = 0
    cdef uint8_t* to
    if record == NULL:
        return
    memcpy(record, about, sizeof(tap_record))
    record.size = size
    record.captured = captured
    record.lost = <uint32_t>ring.lost_before
    ring.lost_before = 0
    if about.outer == 6:
        for i in range(count):       # only the last part can have an odd length
            sum = checksum_add(<const uint8_t*>parts[i].iov_base, parts[i].iov_len, sum)
        record.sum = checksum_fold(sum)
    to = <uint8_t*>record + sizeof(tap_record)
    for i in range(count):
        length = <uint32_t>parts[i].iov_len if parts[i].iov_len < captured else captured
        memcpy(to, parts[i].iov_base, length)
        to += length
        captured -= length
    store_u64(&ring.written, ring.written + size)


cdef inline void tap_payload(const tap_set* armed, tap_record* about, const iovec* parts, uint32_t count) noexcept nogil:
    """Show one payload to every armed tap. One part holds all headers of the inner packet, or the whole of it."""
    cdef tap_view view
    cdef uint32_t i
    cdef tap_state* tap
    cdef size_t skip = about.skip
    about.length = 0
    for i in range(count):
        about.length += <uint32_t>parts[i].iov_len
    i = 0
    while i < count - 1 and parts[i].iov_len <= skip:
        skip -= parts[i].iov_len
        i += 1
    if parts[i].iov_len > skip:
        look(&view, <const uint8_t*>parts[i].iov_base + skip, parts[i].iov_len - skip)
    else:
        look(&view, NULL, 0)
    for i in range(armed.count):
        tap = <tap_state*>armed.taps[i]
        if lets_through(tap.tests, tap.count, &view, about):
            write_record(tap, about, parts, count)


cdef inline void tap_bytes(const tap_set* armed, tap_record* about, const void* bytes, size_t length) noexcept nogil:
    """The same for a payload in one piece."""
    cdef iovec part
    part.iov_base = <void*>bytes
    part.iov_len = length
    tap_payload(armed, about, &part, 1)


cdef struct name_entry:
    uint8_t address[17]      # version, then the address: what they are sorted by
    uint8_t length
    char text[62]


cdef class Tap:
    cdef tap_state state
    cdef uint64_t ring_bytes
    cdef uint64_t rings      # up to the last that has bytes
    cdef uint8_t* out
    cdef name_entry* names
    cdef uint32_t name_count
    cdef uint64_t delivered
    cdef uint64_t numbered
    cdef tuple reasons
    cdef const char* drops[DROP_REASONS]
    cdef take_program(self, bytes program)
    cdef open_rings(self, uint8_t path)
    cdef take_names(self, list names)
    cdef tap_ring* oldest(self, uint64_t before) noexcept nogil
    cdef size_t format(self, uint8_t* out, const tap_record* record) noexcept nogil
    cdef uint32_t describe(self, uint8_t* out, const tap_record* record, bint inner) noexcept nogil
    cdef uint8_t* put_node(self, uint8_t* at, const tap_record* record) noexcept nogil


cdef class TapSet:
    cdef tuple taps
    cdef tap_set armed
