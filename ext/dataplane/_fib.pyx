"""Owns building forwarding tables. Free of descriptors, counters and threads.

Invariant: a table is immutable; `updated` makes a new one from an old one and a list of changes, in C and without
the GIL, so that 10,000 leases cost no packet.
"""

import secrets

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy

from dataplane.abi cimport NO_PEER

cdef struct route_change:
    uint32_t subnet
    uint32_t mask
    uint32_t address
    uint32_t slot
    uint32_t mtu
    uint32_t remove

CHANGE_BYTES = sizeof(route_change)


cdef int by_prefix(const void* left, const void* right) noexcept nogil:
    cdef const route_change* a = <const route_change*>left
    cdef const route_change* b = <const route_change*>right
    if a.subnet != b.subnet:
        return -1 if a.subnet < b.subnet else 1
    if a.mask != b.mask:
        return -1 if a.mask < b.mask else 1
    return 0


cdef void free_table(fib_table* table) noexcept nogil:
    if table == NULL:
        return
    free(table.routes)
    free(table.starts)
    free(table.owners)
    free(table.index)
    free(table.by_source)
    free(table)


cdef bint copy_change(const route_change* change, fib_route* out) noexcept nogil:
    if change.remove:
        return False
    out.subnet = change.subnet
    out.mask = change.mask
    out.address = change.address
    out.slot = change.slot
    out.mtu = change.mtu
    return True


cdef void merge_routes(fib_table* table, const fib_table* old, const route_change* changes, uint32_t count) noexcept nogil:
    """Both inputs are sorted; a change takes the place of the old route with its prefix."""
    cdef uint32_t i = 0, j = 0, n = 0
    cdef const fib_route* route
    while i < old.count or j < count:
        if i == old.count:
            n += copy_change(&changes[j], &table.routes[n])
            j += 1
            continue
        route = &old.routes[i]
        if j == count or route.subnet < changes[j].subnet or (
            route.subnet == changes[j].subnet and route.mask < changes[j].mask
        ):
            table.routes[n] = route[0]
            n += 1
            i += 1
            continue
        if route.subnet == changes[j].subnet and route.mask == changes[j].mask:
            i += 1
        n += copy_change(&changes[j], &table.routes[n])
        j += 1
    table.count = n


cdef inline void add_range(fib_table* table, uint32_t start, uint32_t owner) noexcept nogil:
    if table.ranges and table.starts[table.ranges - 1] == start:
        table.owners[table.ranges - 1] = owner
    elif table.ranges == 0 or table.owners[table.ranges - 1] != owner:
        table.starts[table.ranges] = start
        table.owners[table.ranges] = owner
        table.ranges += 1


cdef void build_ranges(fib_table* table) noexcept nogil:
    """Flatten nested prefixes: `open_routes` holds the routes around the current address, innermost last."""
    cdef uint32_t open_routes[33]
    cdef uint32_t depth = 0, i, last, bucket, at = 0
    add_range(table, 0, NO_PEER)
    for i in range(table.count + 1):
        while depth:
            last = table.routes[open_routes[depth - 1]].subnet | ~table.routes[open_routes[depth - 1]].mask
            if i < table.count and last >= table.routes[i].subnet:
                break
            depth -= 1
            if last != <uint32_t>0xFFFFFFFF:
                add_range(table, last + 1, open_routes[depth - 1] if depth else <uint32_t>NO_PEER)
        if i < table.count:
            add_range(table, table.routes[i].subnet, i)
            open_routes[depth] = i
            depth += 1
    for bucket in range(65536):
        while at + 1 < table.ranges and table.starts[at + 1] <= bucket << 16:
            at += 1
        table.index[bucket] = at
    table.index[65536] = table.ranges - 1


cdef void build_sources(fib_table* table) noexcept nogil:
    cdef uint32_t i, at, found
    for i in range(table.source_mask + 1):
        table.by_source[i] = NO_PEER
    for i in range(table.count):
        at = fib_source_slot(table, table.routes[i].address)
        table.routes[i].next_same = NO_PEER
        while True:
            found = table.by_source[at]
            if found == NO_PEER:
                break
            if table.routes[found].address == table.routes[i].address:
                table.routes[i].next_same = found
                break
            at = (at + 1) & table.source_mask
        table.by_source[at] = i


cdef fib_table* build_table(const fib_table* old, route_change* changes, uint32_t count, uint32_t key) noexcept nogil:
    """NULL where memory is short."""
    cdef fib_table* table = <fib_table*>calloc(1, sizeof(fib_table))
    cdef uint32_t most = old.count + count
    cdef uint32_t size = 16
    if table == NULL:
        return NULL
    qsort(changes, count, sizeof(route_change), by_prefix)
    while size < 2 * most:
        size *= 2
    table.hash_key = key
    table.source_mask = size - 1
    table.routes = <fib_route*>malloc((most + 1) * sizeof(fib_route))
    table.starts = <uint32_t*>malloc((2 * <size_t>most + 2) * sizeof(uint32_t))
    table.owners = <uint32_t*>malloc((2 * <size_t>most + 2) * sizeof(uint32_t))
    table.index = <uint32_t*>malloc(65537 * sizeof(uint32_t))
    table.by_source = <uint32_t*>malloc(size * sizeof(uint32_t))
    if not (table.routes and table.starts and table.owners and table.index and table.by_source):
        free_table(table)
        return NULL
    merge_routes(table, old, changes, count)
    build_ranges(table)
    build_sources(table)
    return table


cdef class Fib:
    """An immutable forwarding table. `Fib()` is empty: every lookup misses."""

    def __cinit__(self, bytes changes=b"", Fib old=None):
        cdef fib_table nothing
        cdef const fib_table* base = &nothing
        cdef uint32_t count = len(changes) // sizeof(route_change)
        cdef uint32_t key
        cdef route_change* scratch
        if len(changes) % sizeof(route_change):
            raise ValueError("changes are not a whole number of records")
        nothing.count = 0
        nothing.routes = NULL
        if old is not None:
            base = old.table
        # keyed anew for each network, so that nobody can choose addresses that collide
        key = secrets.randbits(32) if old is None else old.table.hash_key
        scratch = <route_change*>malloc(len(changes) + 1)
        if scratch == NULL:
            raise MemoryError
        memcpy(scratch, <const uint8_t*>changes, count * sizeof(route_change))
        with nogil:
            self.table = build_table(base, scratch, count, key)
            free(scratch)
        if self.table == NULL:
            raise MemoryError

    def __dealloc__(self):
        free_table(self.table)

    def updated(self, bytes changes):
        """A new table with `changes` applied: records of six native 32-bit words (subnet, mask, outer address,
        counter slot, path MTU or 0, 1 to remove), each prefix at most once."""
        return Fib(changes, self)

    def __len__(self):
        return self.table.count

    def lookup(self, uint32_t destination):
        """(subnet, mask, outer address, slot) of the longest prefix around an inner destination, or None."""
        return self.route(fib_lookup(self.table, destination))

    def lookup_many(self, bytes destinations):
        """Look up native 32-bit words and return the sum of their slots: lookups alone, for measuring them."""
        cdef const uint32_t* words = <const uint32_t*><const uint8_t*>destinations
        cdef size_t i, count = len(destinations) // 4
        cdef uint64_t total = 0
        cdef uint32_t at
        with nogil:
            for i in range(count):
                at = fib_lookup(self.table, words[i])
                if at != NO_PEER:
                    total += self.table.routes[at].slot
        return total

    def sources(self, uint32_t address):
        """Every (subnet, mask, outer address, slot) whose outer address this is."""
        found = []
        cdef uint32_t at = fib_source(self.table, address)
        while at != NO_PEER:
            found.append(self.route(at))
            at = self.table.routes[at].next_same
        return found

    cdef object route(self, uint32_t at):
        if at == NO_PEER:
            return None
        cdef fib_route* found = &self.table.routes[at]
        return found.subnet, found.mask, found.address, found.slot
