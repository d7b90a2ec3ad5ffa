"""Owns forwarding tables as Python has them: made whole, looked up to be tested and measured, freed.

Free of descriptors, counters and threads. Invariant: a table is immutable; `updated` makes a new one from an old one
and a list of changes, in C and without the GIL, so that 10,000 leases cost no packet.
"""

import secrets

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from dataplane.abi cimport NO_PEER, u128
from dataplane._fib_build cimport build_table, free_table, route_change
from dataplane._fib_table cimport (
    PAGED, fib_bucket, fib_lookup_v4, fib_lookup_v6, fib_page, fib_route, fib_source, fib_table, fib_wide,
)
from dataplane.headers cimport load_be32, load_u128, store_u128

cdef extern from * nogil:
    void prefetch "__builtin_prefetch" (const void* p)

cdef enum:
    AHEAD = 8                # lookups by which a batch fetches in advance

CHANGE_BYTES = sizeof(route_change)


cdef class Fib:
    """An immutable forwarding table. `Fib()` is empty: every lookup misses."""

    def __cinit__(self, bytes changes=b"", Fib old=None):
        cdef fib_table nothing
        cdef const fib_table* base = &nothing
        cdef uint32_t count = len(changes) // sizeof(route_change)
        cdef uint64_t keys[2]
        cdef route_change* scratch
        if len(changes) % sizeof(route_change):
            raise ValueError("changes are not a whole number of records")
        nothing.count = 0
        nothing.routes = NULL
        if old is not None:
            base = old.table
            memcpy(keys, base.hash_keys, sizeof(keys))
        else:                # anew for each network
            keys[0] = secrets.randbits(64)
            keys[1] = secrets.randbits(64) | 1
        scratch = <route_change*>malloc(len(changes) + 1)
        if scratch == NULL:
            raise MemoryError
        memcpy(scratch, <const uint8_t*>changes, count * sizeof(route_change))
        with nogil:
            self.table = build_table(base, scratch, count, keys)
            free(scratch)
        if self.table == NULL:
            raise MemoryError

    def __dealloc__(self):
        free_table(self.table)

    def updated(self, bytes changes):
        """A new table with `changes` applied, each prefix at most once: records of subnet and outer address (16 bytes
        each, IPv4 as ::ffff:a.b.c.d), counter slot (32 bits), path MTU or 0 (16), prefix length out of 128, 1 to remove
        (8 each), the peer's MAC (6 bytes), 2 bytes of padding; numbers in the machine's order."""
        return Fib(changes, self)

    def __len__(self):
        return self.table.count

    @property
    def lookup_bytes(self):
        """Bytes of everything that a lookup by destination reads, but the routes themselves: of IPv4 and of IPv6."""
        cdef uint32_t bucket, pages = 0
        cdef fib_wide* wide = &self.table.wide
        for bucket in range(65536):
            pages += self.table.buckets[bucket].size >= <uint32_t>PAGED
        narrow = 65536 * sizeof(fib_bucket) + pages * sizeof(fib_page) + self.table.ranges * 6
        buckets = <uint32_t>(wide.span >> wide.shift) + 2 if wide.bounds else 0
        return narrow, wide.ranges * (sizeof(u128) + 4) + buckets * 4

    def lookup(self, bytes destination):
        """(subnet, prefix length, outer address, slot, MAC) of the longest prefix around an inner destination of 4 or
        16 bytes, or None; addresses have 16 bytes, IPv4 as ::ffff:a.b.c.d, and the length is out of 128."""
        cdef const uint8_t* wanted = destination
        if len(destination) == 4:
            return self.route(fib_lookup_v4(self.table, load_be32(wanted)))
        if len(destination) == 16:
            return self.route(fib_lookup_v6(self.table, load_u128(wanted)))
        raise ValueError("an address has 4 bytes or 16")

    def lookup_many(self, bytes destinations):
        """Look up a batch of IPv4 addresses (native 32-bit words) and return the sum of the indices found: lookups
        alone, for measuring them. What a later lookup will read is fetched while the earlier ones go on; the pumps,
        which have one packet at a time, look up without that."""
        cdef const uint32_t* words = <const uint32_t*><const uint8_t*>destinations
        cdef size_t i, count = len(destinations) // 4
        cdef uint64_t total = 0
        cdef const fib_bucket* bucket
        with nogil:
            for i in range(count):
                if i + AHEAD < count:
                    bucket = &self.table.buckets[words[i + AHEAD] >> 16]
                    if bucket.size:
                        prefetch(&self.table.starts[bucket.base])
                        prefetch(&self.table.owners[bucket.base])
                total += fib_lookup_v4(self.table, words[i])
        return total

    def lookup_many_v6(self, bytes destinations):
        """The same for IPv6 addresses of 16 bytes in network order, without fetching ahead."""
        cdef const uint8_t* addresses = destinations
        cdef size_t i, count = len(destinations) // 16
        cdef uint64_t total = 0
        with nogil:
            for i in range(count):
                total += fib_lookup_v6(self.table, load_u128(addresses + 16 * i))
        return total

    def sources(self, bytes address):
        """Every route, as `lookup` gives it, whose outer address (16 bytes) this is."""
        if len(address) != 16:
            raise ValueError("an outer address has 16 bytes")
        found = []
        cdef uint32_t at = fib_source(self.table, load_u128(address))
        while at != NO_PEER:
            found.append(self.route(at))
            at = self.table.routes[at].next_same
        return found

    cdef object route(self, uint32_t at):
        cdef uint8_t words[16]
        cdef u128 mask
        cdef int length = 0
        if at == NO_PEER:
            return None
        cdef fib_route* found = &self.table.routes[at]
        mask = found.mask
        while mask:
            mask <<= 1
            length += 1
        store_u128(words, found.subnet)
        subnet = words[:16]
        store_u128(words, found.address)
        return subnet, length, words[:16], found.slot, found.mac[:6]
