# Owns the forwarding table: inner destination -> route by longest prefix, outer source -> its routes.
# A table never changes once it is built; lookups need no lock and no GIL.

from libc.stdint cimport uint16_t, uint32_t

from dataplane.abi cimport NO_PEER

cdef struct fib_route:
    uint32_t subnet          # all addresses in host order
    uint32_t mask
    uint32_t address         # outer address of the peer that holds the subnet
    uint32_t slot            # which counters are the peer's
    uint32_t mtu             # longest inner packet that the path to the peer takes; 0: as long as ours
    uint32_t next_same       # next route with the same outer address, or NO_PEER

# The address space is cut into ranges of equal answer, and these into 65,536 buckets by their upper 16 bits. Most
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

cdef struct fib_table:
    fib_route* routes        # sorted by subnet, then by mask, the wider first
    uint32_t count
    fib_bucket* buckets
    fib_page* pages
    uint16_t* starts         # lower 16 bits of the first address of each range; 0 for the first of a bucket
    uint32_t* owners         # route of each range, or NO_PEER
    uint32_t ranges
    uint32_t* by_source      # open addressing: route indices, NO_PEER where free
    uint32_t source_mask     # its size - 1
    uint32_t hash_key


cdef inline uint32_t fib_lookup(const fib_table* table, uint32_t destination) noexcept nogil:
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


cdef inline uint32_t fib_source_slot(const fib_table* table, uint32_t address) noexcept nogil:
    return ((address ^ table.hash_key) * <uint32_t>2654435769) >> 7 & table.source_mask


cdef inline uint32_t fib_source(const fib_table* table, uint32_t address) noexcept nogil:
    """Index of the first route whose outer address this is, or NO_PEER; `next_same` leads to the others."""
    cdef uint32_t at = fib_source_slot(table, address)
    cdef uint32_t found
    while True:
        found = table.by_source[at]
        if found == NO_PEER or table.routes[found].address == address:
            return found
        at = (at + 1) & table.source_mask


cdef class Fib:
    cdef fib_table* table
    cdef object route(self, uint32_t at)
