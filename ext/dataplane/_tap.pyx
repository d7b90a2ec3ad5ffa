"""Owns a tap as Python sees it: its filter, its rings, and the pcapng blocks that are made of what the rings hold.

A Tap is armed by the engine and drained by one thread, without the GIL while it formats. Free of files and
sockets. dataplane/debug/pcapng.py is the oracle of the blocks. Invariant: each record becomes one or two
enhanced packet blocks that share a packet id: the inner packet on interface 0, the outer datagram on interface 1.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset, strlen

from dataplane.abi cimport *
from dataplane.headers cimport checksum_add, checksum_finish, store_be16

cdef enum:
    OUT_BYTES = 1 << 20      # blocks of one drain
    MOST_BLOCKS = 1 << 18    # more than the two blocks of one record take
    EPB = 6
    OPT_COMMENT = 1
    EPB_FLAGS = 2
    EPB_DROPCOUNT = 4
    EPB_PACKETID = 5
    OVERLAY = 0
    UNDERLAY = 1


cdef class Tap:
    """What one capture wants to see, and what it has seen so far."""

    def __cinit__(self, bytes program not None, uint32_t snaplen, size_t ring_bytes, tuple reasons not None, names=()):
        """`program`: tests as dataplane.debug.expression makes them. `snaplen`: bytes kept of an inner packet.
        `ring_bytes`: of each ring, a power of two; each engine has one for each direction. `reasons`: the name of each DropReason, as bytes. `names`:
        (packed address, name) of nodes.
        Raises ValueError and MemoryError."""
        if ring_bytes < MOST_BLOCKS or ring_bytes & (ring_bytes - 1):
            raise ValueError(f"a ring has a power of two bytes, at least {MOST_BLOCKS}")
        self.state.snaplen = min(snaplen, <uint32_t>BUFFER_BYTES)
        self.take_program(program)
        self.take_names(sorted((bytes([4 if len(address) == 4 else 6]) + address.ljust(16, b"\0"), name)
                               for address, name in names))
        self.out = <uint8_t*>map_pages(OUT_BYTES)
        self.ring_bytes = ring_bytes
        cdef int i
        if self.out == NULL:
            raise MemoryError
        self.reasons = reasons
        for i in range(DROP_REASONS):
            self.drops[i] = reasons[i]   # borrowed from self.reasons

    def __dealloc__(self):
        for i in range(2 * PATHS):
            if self.state.rings[i].bytes != NULL:
                munmap(self.state.rings[i].bytes, self.state.rings[i].size)
        if self.out != NULL:
            munmap(self.out, OUT_BYTES)
        free(self.state.tests)
        free(self.names)

    cdef open_rings(self, uint8_t path):
        """Before the path's pumps hear of the tap; `drain` may run meanwhile."""
        cdef tap_ring* ring
        for direction in range(2):
            ring = &self.state.rings[2 * path + direction]
            if ring.bytes == NULL:
                ring.size = self.ring_bytes
                ring.bytes = <uint8_t*>map_pages(self.ring_bytes)
                if ring.bytes == NULL:
                    raise MemoryError
        if self.rings < 2 * <uint64_t>path + 2:
            store_u64(&self.rings, 2 * <uint64_t>path + 2)

    cdef take_program(self, bytes program):
        cdef uint32_t count = <uint32_t>(len(program) // sizeof(tap_test)), i
        cdef tap_test* test
        if len(program) % sizeof(tap_test):
            raise ValueError("a filter is a whole number of tests")
        self.state.tests = <tap_test*>calloc(count + 1, sizeof(tap_test))
        if self.state.tests == NULL:
            raise MemoryError
        memcpy(self.state.tests, <const char*>program, len(program))
        self.state.count = count
        for i in range(count):
            test = &self.state.tests[i]
            for leads in (test.yes, test.no):
                if not (i < leads < count or leads in (TAP_ACCEPT, TAP_REJECT)):
                    raise ValueError(f"test {i} leads back or nowhere")
            if test.kind in (TEST_PEER, TEST_NET) and test.version not in (4, 6):
                raise ValueError(f"test {i} has no address")
            if test.bits > (32 if test.version == 4 else 128):
                raise ValueError(f"test {i} has a prefix of {test.bits} bits")

    cdef take_names(self, list names):
        cdef name_entry* entry
        self.name_count = <uint32_t>len(names)
        self.names = <name_entry*>calloc(self.name_count + 1, sizeof(name_entry))
        if self.names == NULL:
            raise MemoryError
        for i, (address, name) in enumerate(names):
            entry = &self.names[i]
            memcpy(entry.address, <const char*>address, 17)
            name = name.encode("ascii", "replace")[:60]
            memcpy(entry.text, <const char*>name, len(name))
            entry.length = <uint8_t>len(name)

    def drain(self, uint64_t before, uint64_t most):
        """Enhanced packet blocks of at most `most` records older than `before` (ns of the wall clock), both
        directions merged by time. The view is valid until the next call; empty where nothing waits."""
        cdef uint64_t done = 0
        cdef size_t filled = 0
        cdef tap_ring* ring
        with nogil:
            while done < most and filled + MOST_BLOCKS <= OUT_BYTES:
                ring = self.oldest(before)
                if ring == NULL:
                    break
                filled += self.format(self.out + filled, <const tap_record*>(ring.bytes + (ring.read & (ring.size - 1))))
                store_u64(&ring.read, ring.read + (<tap_record*>(ring.bytes + (ring.read & (ring.size - 1)))).size)
                done += 1
        self.delivered += done
        return PyMemoryView_FromMemory(<char*>self.out, filled, PyBUF_READ)

    cdef tap_ring* oldest(self, uint64_t before) noexcept nogil:
        """The ring whose next record is the oldest; NULL where none is older than `before`."""
        cdef tap_ring* found = NULL
        cdef tap_ring* ring
        cdef const tap_record* record
        cdef uint64_t i
        for i in range(load_u64(&self.rings)):
            ring = &self.state.rings[i]
            record = next_record(ring)
            if record != NULL and record.ns < before:
                before = record.ns
                found = ring
        return found

    @property
    def statistics(self):
        """(matched, lost, delivered): packets the filter let through, those for which a ring had no room, those that
        `drain` has handed over."""
        cdef uint64_t matched = 0, lost = 0
        cdef int i
        for i in range(2 * PATHS):
            matched += load_relaxed(&self.state.rings[i].matched)
            lost += load_relaxed(&self.state.rings[i].lost)
        return matched, lost, self.delivered

    def offer(self, int direction, int drop, bytes remote not None, uint32_t vni, bytes packet not None):
        """Show an inner packet to the filter alone: whether it is let through. For packets that no pump carries, and
        for holding the filter against others."""
        cdef tap_view view
        cdef tap_record about
        memset(&about, 0, sizeof(about))
        about.direction = direction
        about.drop = DROP_REASONS if drop < 0 else drop
        about.outer = 0 if not remote else 4 if len(remote) == 4 else 6
        memcpy(about.remote, <const char*>remote, min(<size_t>len(remote), <size_t>16))
        about.vni = vni
        look(&view, packet, len(packet))
        return bool(lets_through(self.state.tests, self.state.count, &view, &about))

    # ------------------------------------------------------------------------------------------------- formatting

    cdef size_t format(self, uint8_t* out, const tap_record* record) noexcept nogil:
        """The blocks of one record: inner and outer in the order in which the node saw them."""
        cdef const uint8_t* data = <const uint8_t*>record + sizeof(tap_record)
        cdef uint8_t comment[512]
        cdef uint64_t number = self.numbered
        cdef bint inner = is_packet(data, record)
        cdef uint32_t length = self.describe(comment, record, inner)
        cdef size_t filled = 0
        self.numbered += 1
        if inner and record.direction == TAP_TX:
            filled += inner_block(out, record, data, comment, length, number, record.lost)
        if record.outer:
            filled += outer_block(out + filled, record, data, self.state.snaplen, comment, length, number,
                                  0 if filled else record.lost)
        if (inner and record.direction == TAP_RX) or filled == 0:
            filled += inner_block(out + filled, record, data, comment, length, number, 0 if filled else record.lost)
        return filled

    cdef uint32_t describe(self, uint8_t* out, const tap_record* record, bint inner) noexcept nogil:
        """The comment: peer, lease, direction, and what else is known."""
        cdef uint8_t* at = out
        if record.outer:
            at = put_text(at, b"peer=")
            at = self.put_node(at, record)
        if record.lease:
            at = put_text(at, b" lease=" if at != out else b"lease=")
            at = put_address(at, record.lease, record.subnet)
            at = put_text(at, b"/")
            at = put_number(at, record.lease_bits)
        if at != out:
            at = put_text(at, b" ")
        at = put_text(at, b"dir=tx" if record.direction == TAP_TX else b"dir=rx")
        if record.vni != NO_VNI:
            at = put_text(at, b" vni=")
            at = put_number(at, record.vni)
        if record.superframe:
            at = put_text(at, b" superframe=")
            at = put_number(at, record.superframe)
            at = put_text(at, b"/")
            at = put_number(at, record.superframe_bytes)
        if record.drop != DROP_REASONS:
            at = put_text(at, b" drop=")
            at = put_text(at, self.drops[record.drop])
        if not inner and record.outer:
            at = put_text(at, b" inner=none")
        return <uint32_t>(at - out)

    cdef uint8_t* put_node(self, uint8_t* at, const tap_record* record) noexcept nogil:
        """The name of the other node, or its address."""
        cdef uint8_t wanted[17]
        cdef uint32_t low = 0, high = self.name_count, middle
        cdef int order
        wanted[0] = record.outer
        memcpy(wanted + 1, record.remote, 16)
        while low < high:
            middle = (low + high) // 2
            order = memcmp(self.names[middle].address, wanted, 17)
            if order == 0:
                memcpy(at, self.names[middle].text, self.names[middle].length)
                return at + self.names[middle].length
            if order < 0:
                low = middle + 1
            else:
                high = middle
        return put_address(at, record.outer, record.remote)


cdef class TapSet:
    """Taps that are armed together, and what their pumps' outer headers have in common; never changes."""

    def __cinit__(self, taps, *, bytes local not None, uint16_t port, uint16_t peers_port, tuple ports not None,
                  uint8_t ttl, bint dont_fragment, uint32_t vni=NO_VNI, uint8_t skip=0, uint8_t path=0):
        """`local`: our outer address, packed. `port`, `peers_port`: where we and peers listen; `ports`: by which
        datagrams leave, by number of the sender. `ttl`, `dont_fragment`: of what we send. `skip`: bytes of a datagram
        before its inner packet. `path`: number of the engine among those that the taps are armed in. Raises ValueError
        where there are more than TAPS."""
        cdef tap_record* about = &self.armed.about
        about.outer = 4 if len(local) == 4 else 6
        memcpy(about.local, <const char*>local, len(local))
        about.remote_port = peers_port
        about.path = path
        about.ttl = ttl
        about.dont_fragment = dont_fragment
        about.vni = vni
        about.skip = skip
        about.drop = DROP_REASONS
        self.taps = tuple(taps)
        if len(self.taps) > TAPS or len(ports) > MOST_PORTS or path >= PATHS:
            raise ValueError(f"at most {TAPS} captures at once, {MOST_PORTS} ports and {PATHS} paths")
        self.armed.port = port
        for i, each in enumerate(ports):
            self.armed.ports[i] = each
        for i, tap in enumerate(self.taps):
            (<Tap?>tap).open_rings(path)
            self.armed.taps[i] = &(<Tap?>tap).state
        self.armed.count = <uint32_t>len(self.taps)


cdef void* map_pages(size_t size) noexcept:
    """Pages that nothing has touched cost no memory."""
    cdef void* memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if memory == MAP_FAILED else memory


cdef const tap_record* next_record(tap_ring* ring) noexcept nogil:
    cdef const tap_record* record
    cdef uint64_t at
    while True:
        if ring.read == load_u64(&ring.written):
            return NULL
        at = ring.read & (ring.size - 1)
        record = <const tap_record*>(ring.bytes + at)
        if record.size:
            return record
        store_u64(&ring.read, ring.read + ring.size - at)


cdef bint is_packet(const uint8_t* data, const tap_record* record) noexcept nogil:
    if record.drop in (DROP_NOT_IP, DROP_NO_VNI, DROP_RESERVED_BITS, DROP_VLAN, DROP_ETHERTYPE):
        return False
    return record.captured > record.skip and data[record.skip] >> 4 in (4, 6)


cdef size_t inner_block(uint8_t* out, const tap_record* record, const uint8_t* data, const uint8_t* comment,
                        uint32_t comment_length, uint64_t number, uint32_t lost) noexcept nogil:
    cdef uint32_t captured = record.captured - record.skip if record.captured > record.skip else 0
    cdef uint32_t length = record.length - record.skip if record.length > record.skip else 0
    cdef uint8_t* at = open_block(out, OVERLAY, record.ns, captured, length)
    memcpy(at, data + record.skip, captured)
    return close_block(out, at, captured, record.direction, comment, comment_length, number, lost)


cdef size_t outer_block(uint8_t* out, const tap_record* record, const uint8_t* data, uint32_t snaplen,
                        const uint8_t* comment, uint32_t comment_length, uint64_t number, uint32_t lost) noexcept nogil:
    """The outer datagram, its headers rebuilt; of its payload what `snaplen` leaves."""
    cdef uint8_t header[48]
    cdef uint32_t head = build_outer(header, record)
    cdef uint32_t captured = min(head + record.captured, max(snaplen, head))
    cdef uint8_t* at = open_block(out, UNDERLAY, record.ns, captured, head + record.length)
    memcpy(at, header, head)
    memcpy(at + head, data, captured - head)
    return close_block(out, at, captured, record.direction, comment, comment_length, number, lost)


cdef uint32_t build_outer(uint8_t* out, const tap_record* record) noexcept nogil:
    """IP and UDP header as they were on the wire, as far as a UDP socket lets one know. Returns their length."""
    cdef bint sent = record.direction == TAP_TX
    cdef const uint8_t* source = <const uint8_t*>record.local
    cdef const uint8_t* destination = <const uint8_t*>record.remote
    cdef uint32_t length = 8 + record.length, head = 20 if record.outer == 4 else 40
    cdef uint8_t* udp = out + head
    cdef uint16_t checksum
    if not sent:
        source, destination = destination, source
    memset(out, 0, 48)
    store_be16(udp, record.local_port if sent else record.remote_port)
    store_be16(udp + 2, record.remote_port if sent else record.local_port)
    store_be16(udp + 4, <uint16_t>length)
    if record.outer == 4:
        out[0] = 0x45
        out[1] = record.tos
        store_be16(out + 2, <uint16_t>(head + length))
        out[6] = 0x40 if record.dont_fragment else 0
        out[8] = record.ttl
        out[9] = 17
        memcpy(out + 12, source, 4)
        memcpy(out + 16, destination, 4)
        checksum = checksum_finish(checksum_add(out, 20, 0))
        memcpy(out + 10, &checksum, 2)
        return head + 8
    out[0] = 0x60 | record.tos >> 4
    out[1] = <uint8_t>(record.tos << 4)
    store_be16(out + 4, <uint16_t>length)
    out[6] = 17
    out[7] = record.ttl
    memcpy(out + 8, source, 16)
    memcpy(out + 24, destination, 16)
    # pseudo-header (RFC 8200 section 8.1): addresses, length, next header; then the UDP header, then the payload
    checksum = checksum_finish(checksum_add(out + 8, 40, <uint64_t>record.sum + htons(17) + htons(<uint16_t>length)))
    if checksum == 0:
        checksum = 0xFFFF
    memcpy(udp + 6, &checksum, 2)
    return head + 8


cdef uint8_t* open_block(uint8_t* out, uint32_t interface, uint64_t ns, uint32_t captured, uint32_t length) noexcept nogil:
    """Write the fixed part of an enhanced packet block but its length; returns where the packet goes."""
    cdef uint32_t* words = <uint32_t*>out
    words[0] = EPB
    words[2] = interface
    words[3] = <uint32_t>(ns >> 32)
    words[4] = <uint32_t>ns
    words[5] = captured
    words[6] = length
    return out + 28


cdef uint8_t* put_option(uint8_t* at, uint16_t code, const void* value, uint32_t length) noexcept nogil:
    (<uint16_t*>at)[0] = code
    (<uint16_t*>at)[1] = <uint16_t>length
    memset(at + 4 + (length & ~<uint32_t>3), 0, 4 if length & 3 else 0)
    memcpy(at + 4, value, length)
    return at + 4 + ((length + 3) & ~<uint32_t>3)


cdef size_t close_block(uint8_t* out, uint8_t* at, uint32_t captured, uint8_t direction, const uint8_t* comment,
                        uint32_t comment_length, uint64_t number, uint32_t lost) noexcept nogil:
    """Pad the packet, add options and both lengths; returns the length of the block."""
    cdef uint32_t padding = (4 - (captured & 3)) & 3, flags = 2 if direction == TAP_TX else 1, length
    cdef uint64_t missing = lost
    memset(at + captured, 0, padding)
    at += captured + padding
    at = put_option(at, OPT_COMMENT, comment, comment_length)
    at = put_option(at, EPB_FLAGS, &flags, 4)
    if missing:
        at = put_option(at, EPB_DROPCOUNT, &missing, 8)
    at = put_option(at, EPB_PACKETID, &number, 8)
    memset(at, 0, 4)
    length = <uint32_t>(at + 8 - out)
    (<uint32_t*>out)[1] = length
    memcpy(at + 4, &length, 4)
    return length


cdef uint8_t* put_text(uint8_t* at, const char* text) noexcept nogil:
    cdef size_t length = strlen(text)
    memcpy(at, text, length)
    return at + length


cdef uint8_t* put_number(uint8_t* at, uint64_t number) noexcept nogil:
    cdef uint8_t digits[20]
    cdef int count = 0
    while True:
        digits[count] = <uint8_t>(48 + number % 10)
        number //= 10
        count += 1
        if number == 0:
            break
    while count:
        count -= 1
        at[0] = digits[count]
        at += 1
    return at


cdef uint8_t* put_address(uint8_t* at, uint8_t version, const uint8_t* address) noexcept nogil:
    cdef int i
    if version == 6:
        inet_ntop(AF_INET6, address, <char*>at, 46)
        return at + strlen(<char*>at)
    for i in range(4):
        if i:
            at = put_text(at, b".")
        at = put_number(at, address[i])
    return at
