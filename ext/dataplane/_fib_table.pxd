# Owns the forwarding table and its lookups: inner destination -> route by longest prefix, outer source -> its routes.
# Free of building (_fib_build.pxd) and of Python. Invariant: a table never changes once it is built; lookups need no lock
# and no GIL.
#
# Addresses of both families are 128 bits wide, IPv4 as ::ffff:a.b.c.d: so the outer source of a datagram finds the
# subnets of its node in both, and one masked compare checks an inner source. For lookups by destination each family
# has ranges of its own.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from dataplane.abi cimport NO_PEER, u128

cdef struct fib_route:       # one cache line
    u128 subnet
    u128 mask
    u128 address             # outer address of the peer that holds the subnet
    uint32_t slot            # which counters are the peer's
    uint32_t next_same       # next route with the same outer address, or NO_PEER
    uint16_t mtu             # longest inner packet that the path to the peer takes; 0: as long as ours
    uint8_t mac[6]           # of its VTEP

# The IPv4 space is cut into ranges of equal answer, and these into 65,536 buckets by their upper 16 bits. Most
# buckets hold one range or few: they are searched. One with many (a /16 full of /24s) has a page that says for each
# upper 24 bits where to look, which is one place unless there are prefixes longer than 24.
cdef struct fib_bucket:
    uint32_t base            # first of its ranges; with a size of 0, the route of the only one
    uint32_t size            # how many; PAGED and the number of its page

cdef struct fib_page:
    uint16_t bounds[256][2]  # by bits 16 to 23: the first and last range of the bucket that can answer

cdef enum:
    PAGED = 0x80000000
    PAGED_RANGES = 128       # a bucket with as many has a page

# The IPv6 ranges lie close together in a space without end, so their buckets divide the stretch between the first and the
# last of them evenly, into about as many buckets as ranges.
cdef struct fib_wide:
    u128* starts             # first address of each range
    uint32_t* owners         # route of each range, or NO_PEER
    uint32_t* bounds         # by bucket: the range that its first address lies in; one more at the end
    uint32_t ranges
    uint32_t shift           # from an offset in the stretch to its bucket
    u128 span                # last range's start less the second's: the first begins at ::

cdef struct fib_table:
    fib_route* routes        # sorted by subnet, then by mask, the wider first
    uint32_t count
    uint32_t v4_first        # those of IPv4 stand together
    uint32_t v4_end
    fib_bucket* buckets
    fib_page* pages
    uint16_t* starts         # lower 16 bits of the first address of each range; 0 for the first of a bucket
    uint32_t* owners         # route of each range, or NO_PEER
    uint32_t ranges
    fib_wide wide
    uint32_t* by_source      # open addressing: route indices, NO_PEER where free
    uint32_t source_mask     # its size - 1
    uint64_t hash_keys[2]


cdef inline uint32_t fib_lookup_v4(const fib_table* table, uint32_t destination) noexcept nogil:
    """Index of the route with the longest prefix that covers the address, or NO_PEER."""
    cdef const fib_bucket* bucket = &table.buckets[destination >> 16]
    cdef uint32_t wanted = destination & 0xFFFF
    cdef uint32_t low = 0, length, half
    cdef const uint16_t* starts
    cdef const fib_page* page
    if bucket.size == 0:
        return bucket.base
    starts = table.starts + bucket.base
    length = bucket.size
    if bucket.size & PAGED:
        page = &table.pages[bucket.size & ~<uint32_t>PAGED]
        low = page.bounds[wanted >> 8][0]
        length = page.bounds[wanted >> 8][1] + 1 - low
    while length > 1:        # without a branch on the data: a guess of it would be wrong every other time
        half = length >> 1
        low += half * (starts[low + half] <= wanted)
        length -= half
    return table.owners[bucket.base + low]


cdef inline uint32_t fib_lookup_v6(const fib_table* table, u128 destination) noexcept nogil:
    """The same for an IPv6 address."""
    cdef const fib_wide* wide = &table.wide
    cdef uint32_t low, length, half, bucket
    cdef u128 offset
    if wide.ranges < 2 or destination < wide.starts[1]:
        return wide.owners[0]
    offset = destination - wide.starts[1]
    if offset >= wide.span:
        return wide.owners[wide.ranges - 1]
    bucket = <uint32_t>(offset >> wide.shift)
    low = wide.bounds[bucket]
    length = wide.bounds[bucket + 1] + 1 - low
    while length > 1:
        half = length >> 1
        low += half * (wide.starts[low + half] <= destination)
        length -= half
    return wide.owners[low]


cdef inline uint32_t fib_source_slot(const fib_table* table, u128 address) noexcept nogil:
    """Keyed, so that nobody can choose addresses that collide."""
    cdef uint64_t low = <uint64_t>address ^ table.hash_keys[0]
    cdef uint64_t high = <uint64_t>(address >> 64) ^ table.hash_keys[1]
    cdef u128 product = <u128>low * high
    return (<uint32_t>(product >> 64) ^ <uint32_t>product) & table.source_mask


cdef inline uint32_t fib_source(const fib_table* table, u128 address) noexcept nogil:
    """Index of the first route whose outer address this is, or NO_PEER; `next_same` leads to the others."""
    cdef uint32_t at = fib_source_slot(table, address)
    cdef uint32_t found
    while True:
        found = table.by_source[at]
        if found == NO_PEER or table.routes[found].address == address:
            return found
        at = (at + 1) & table.source_mask
