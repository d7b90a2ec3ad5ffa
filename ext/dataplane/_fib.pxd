# Owns the forwarding table: inner destination -> route by longest prefix, outer source -> its routes.
# A table never changes once it is built; lookups need no lock and no GIL.

from libc.stdint cimport uint32_t

from dataplane.abi cimport NO_PEER

cdef struct fib_route:
    uint32_t subnet          # all addresses in host order
    uint32_t mask
    uint32_t address         # outer address of the peer that holds the subnet
    uint32_t slot            # which counters are the peer's
    uint32_t mtu             # longest inner packet that the path to the peer takes; 0: as long as ours
    uint32_t next_same       # next route with the same outer address, or NO_PEER

cdef struct fib_table:
    fib_route* routes        # sorted by subnet, then by mask, the wider first
    uint32_t count
    uint32_t* starts         # ranges of equal answer, sorted: range i is starts[i] up to starts[i + 1]
    uint32_t* owners         # route of each range, or NO_PEER
    uint32_t ranges
    uint32_t* index          # 65,537 entries: last range that starts at or below (i << 16)
    uint32_t* by_source      # open addressing: route indices, NO_PEER where free
    uint32_t source_mask     # its size - 1
    uint32_t hash_key


cdef inline uint32_t fib_lookup(const fib_table* table, uint32_t destination) noexcept nogil:
    """Index of the route with the longest prefix that covers the address, or NO_PEER."""
    cdef uint32_t low = table.index[destination >> 16]
    cdef uint32_t high = table.index[(destination >> 16) + 1]
    cdef uint32_t middle
    while low < high:
        middle = (low + high + 1) >> 1
        if table.starts[middle] <= destination:
            low = middle
        else:
            high = middle - 1
    return table.owners[low]


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
