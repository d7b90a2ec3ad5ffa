"""Owns building forwarding tables. Free of descriptors, counters and threads.

Invariant: a table is immutable; `updated` makes a new one from an old one and a list of changes, in C and without
the GIL, so that 10,000 leases cost no packet.
"""

import secrets

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcpy

from dataplane.abi cimport MADV_HUGEPAGE, NO_PEER, madvise

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size)

cdef extern from * nogil:
    void prefetch "__builtin_prefetch" (const void* p)

cdef enum:
    LARGE_PAGE = 1 << 21
    AHEAD = 8                # lookups by which a batch fetches in advance

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
    free(table.buckets)
    free(table.pages)
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


cdef struct flat_ranges:
    uint32_t* starts         # whole addresses
    uint32_t* owners
    uint32_t count


cdef inline void add_range(flat_ranges* flat, uint32_t start, uint32_t owner) noexcept nogil:
    if flat.count and flat.starts[flat.count - 1] == start:
        flat.owners[flat.count - 1] = owner
    elif flat.count == 0 or flat.owners[flat.count - 1] != owner:
        flat.starts[flat.count] = start
        flat.owners[flat.count] = owner
        flat.count += 1


cdef void flatten(const fib_table* table, flat_ranges* flat) noexcept nogil:
    """Cut nested prefixes into ranges: `open_routes` holds the routes around the current address, innermost last."""
    cdef uint32_t open_routes[33]
    cdef uint32_t depth = 0, i, last
    add_range(flat, 0, NO_PEER)
    for i in range(table.count + 1):
        while depth:
            last = table.routes[open_routes[depth - 1]].subnet | ~table.routes[open_routes[depth - 1]].mask
            if i < table.count and last >= table.routes[i].subnet:
                break
            depth -= 1
            if last != <uint32_t>0xFFFFFFFF:
                add_range(flat, last + 1, open_routes[depth - 1] if depth else <uint32_t>NO_PEER)
        if i < table.count:
            add_range(flat, table.routes[i].subnet, i)
            open_routes[depth] = i
            depth += 1


cdef void build_page(fib_page* page, const uint16_t* starts, uint32_t size) noexcept nogil:
    cdef uint32_t at = 0, part
    for part in range(256):
        while at + 1 < size and starts[at + 1] <= part << 8:
            at += 1
        page.bounds[part][0] = <uint16_t>at
        while at + 1 < size and starts[at + 1] <= (part << 8 | 255):
            at += 1
        page.bounds[part][1] = <uint16_t>at


cdef void* large(size_t bytes) noexcept nogil:
    """Memory that random lookups read: in large pages, or each lookup would also miss in the TLB."""
    cdef void* memory
    if bytes < LARGE_PAGE:
        return malloc(bytes)
    bytes = (bytes + LARGE_PAGE - 1) & ~<size_t>(LARGE_PAGE - 1)
    memory = aligned_alloc(LARGE_PAGE, bytes)
    if memory != NULL:
        madvise(memory, bytes, MADV_HUGEPAGE)
    return memory


cdef bint build_buckets(fib_table* table, const flat_ranges* flat) noexcept nogil:
    """Sort the ranges into buckets; False where memory is short."""
    cdef uint32_t bucket, at = 0, first, size, pages = 0, round_
    # once to count, once to fill: a bucket whose only range began before it holds none
    for round_ in range(2):
        at = 0
        table.ranges = 0
        pages = 0
        for bucket in range(65536):
            while at + 1 < flat.count and flat.starts[at + 1] <= bucket << 16:
                at += 1
            first = at
            while at + 1 < flat.count and flat.starts[at + 1] >> 16 == bucket:
                at += 1
            size = at - first + 1
            if size == 1:
                if round_:
                    table.buckets[bucket].base = flat.owners[at]
                    table.buckets[bucket].size = 0
                continue
            if round_:
                fill_bucket(table, flat, bucket, first, size, pages)
            table.ranges += size
            pages += size >= PAGED_RANGES
        if round_ == 0:
            table.starts = <uint16_t*>large((table.ranges + 1) * sizeof(uint16_t))
            table.owners = <uint32_t*>large((table.ranges + 1) * sizeof(uint32_t))
            table.pages = <fib_page*>malloc((pages + 1) * sizeof(fib_page))
            if not (table.starts and table.owners and table.pages):
                return False
    return True


cdef void fill_bucket(fib_table* table, const flat_ranges* flat, uint32_t bucket, uint32_t first, uint32_t size,
                      uint32_t page) noexcept nogil:
    cdef uint32_t base = table.ranges, i
    table.buckets[bucket].base = base
    table.buckets[bucket].size = size
    for i in range(size):
        table.starts[base + i] = <uint16_t>flat.starts[first + i] if i else 0
        table.owners[base + i] = flat.owners[first + i]
    if size >= PAGED_RANGES:
        table.buckets[bucket].size = <uint32_t>PAGED | page
        build_page(&table.pages[page], table.starts + base, size)


cdef bint build_lookup(fib_table* table) noexcept nogil:
    cdef flat_ranges flat
    cdef size_t most = 2 * <size_t>table.count + 2
    cdef bint built = False
    flat.count = 0
    flat.starts = <uint32_t*>malloc(most * sizeof(uint32_t))
    flat.owners = <uint32_t*>malloc(most * sizeof(uint32_t))
    if flat.starts and flat.owners:
        flatten(table, &flat)
        built = build_buckets(table, &flat)
    free(flat.starts)
    free(flat.owners)
    return built


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
    table.buckets = <fib_bucket*>malloc(65536 * sizeof(fib_bucket))
    table.by_source = <uint32_t*>malloc(size * sizeof(uint32_t))
    if not (table.routes and table.buckets and table.by_source):
        free_table(table)
        return NULL
    merge_routes(table, old, changes, count)
    build_sources(table)
    if not build_lookup(table):
        free_table(table)
        return NULL
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

    @property
    def lookup_bytes(self):
        """Bytes of everything that a lookup by destination reads, but the routes themselves."""
        cdef uint32_t bucket, pages = 0
        for bucket in range(65536):
            pages += self.table.buckets[bucket].size >= <uint32_t>PAGED
        return 65536 * sizeof(fib_bucket) + pages * sizeof(fib_page) + self.table.ranges * 6

    def lookup(self, uint32_t destination):
        """(subnet, mask, outer address, slot) of the longest prefix around an inner destination, or None."""
        return self.route(fib_lookup(self.table, destination))

    def lookup_many(self, bytes destinations):
        """Look up a batch of native 32-bit words and return the sum of the indices found: lookups alone, for
        measuring them. What a later lookup will read is fetched while the earlier ones go on; the pumps, which
        have one packet at a time, look up without that."""
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
                total += fib_lookup(self.table, words[i])
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
