"""Owns building forwarding tables. Free of descriptors, counters and threads.

Invariant: a table is immutable; `updated` makes a new one from an old one and a list of changes, in C and without
the GIL, so that 10,000 leases cost no packet.
"""

import secrets

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy

from dataplane.abi cimport MADV_HUGEPAGE, NO_PEER, madvise, u128
from dataplane.headers cimport load_be32, load_u128, mapped, store_u128

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size)

cdef extern from * nogil:
    void prefetch "__builtin_prefetch" (const void* p)

cdef enum:
    LARGE_PAGE = 1 << 21
    AHEAD = 8                # lookups by which a batch fetches in advance
    MAPPED_BITS = 96         # prefix length of ::ffff:0:0/96, in which IPv4 lies

cdef struct route_change:
    uint8_t subnet[16]       # network order
    uint8_t address[16]
    uint32_t slot
    uint16_t mtu
    uint8_t length           # of the prefix, 0 to 128
    uint8_t remove
    uint8_t mac[6]
    uint8_t padding[2]

CHANGE_BYTES = sizeof(route_change)


cdef inline u128 mask_of(uint32_t length) noexcept nogil:
    return ~<u128>0 << (128 - length) if length else 0


cdef int by_prefix(const void* left, const void* right) noexcept nogil:
    cdef const route_change* a = <const route_change*>left
    cdef const route_change* b = <const route_change*>right
    cdef int order = memcmp(a.subnet, b.subnet, 16)
    return order if order else <int>a.length - b.length


cdef void free_table(fib_table* table) noexcept nogil:
    if table == NULL:
        return
    free(table.routes)
    free(table.starts)
    free(table.owners)
    free(table.buckets)
    free(table.pages)
    free(table.wide.starts)
    free(table.wide.owners)
    free(table.wide.bounds)
    free(table.by_source)
    free(table)


cdef bint copy_change(const route_change* change, fib_route* out) noexcept nogil:
    if change.remove:
        return False
    out.subnet = load_u128(change.subnet)
    out.mask = mask_of(change.length)
    out.address = load_u128(change.address)
    out.slot = change.slot
    out.mtu = change.mtu
    memcpy(out.mac, change.mac, 6)
    return True


cdef void merge_routes(fib_table* table, const fib_table* old, const route_change* changes, uint32_t count) noexcept nogil:
    """Both inputs are sorted; a change takes the place of the old route with its prefix."""
    cdef uint32_t i = 0, j = 0, n = 0
    cdef const fib_route* route
    cdef u128 subnet = 0, mask = 0
    while i < old.count or j < count:
        if i == old.count:
            n += copy_change(&changes[j], &table.routes[n])
            j += 1
            continue
        route = &old.routes[i]
        if j < count:
            subnet = load_u128(changes[j].subnet)
            mask = mask_of(changes[j].length)
        if j == count or route.subnet < subnet or (route.subnet == subnet and route.mask < mask):
            table.routes[n] = route[0]
            n += 1
            i += 1
            continue
        if route.subnet == subnet and route.mask == mask:
            i += 1
        n += copy_change(&changes[j], &table.routes[n])
        j += 1
    table.count = n


cdef void find_v4(fib_table* table) noexcept nogil:
    cdef u128 mask = mask_of(MAPPED_BITS)
    cdef fib_route* route
    table.v4_first = 0
    while table.v4_first < table.count:
        route = &table.routes[table.v4_first]
        if route.subnet >= mapped(0) and (route.mask & mask) == mask:
            break
        table.v4_first += 1
    table.v4_end = table.v4_first
    while table.v4_end < table.count and (table.routes[table.v4_end].subnet & mask) == mapped(0):
        table.v4_end += 1


cdef struct flat_ranges:
    u128* starts
    uint32_t* owners
    uint32_t count


cdef inline void add_range(flat_ranges* flat, u128 start, uint32_t owner) noexcept nogil:
    if flat.count and flat.starts[flat.count - 1] == start:
        flat.owners[flat.count - 1] = owner
    elif flat.count == 0 or flat.owners[flat.count - 1] != owner:
        flat.starts[flat.count] = start
        flat.owners[flat.count] = owner
        flat.count += 1


cdef struct route_view:
    const fib_route* routes
    uint32_t count           # how many of one family ...
    uint32_t gap_at          # ... of which those from here on stand ...
    uint32_t gap             # ... so many routes further on
    u128 lowest
    u128 highest             # addresses of the family


cdef inline uint32_t route_number(const route_view* view, uint32_t i) noexcept nogil:
    return i + view.gap if i >= view.gap_at else i


cdef void flatten(const route_view* view, flat_ranges* flat) noexcept nogil:
    """Cut nested prefixes into ranges: `open_routes` holds the routes around the current address, innermost last."""
    cdef uint32_t open_routes[129]
    cdef uint32_t depth = 0, i
    cdef const fib_route* route
    cdef u128 last
    flat.count = 0
    add_range(flat, view.lowest, NO_PEER)
    for i in range(view.count + 1):
        while depth:
            route = &view.routes[open_routes[depth - 1]]
            last = route.subnet | ~route.mask
            if i < view.count and last >= view.routes[route_number(view, i)].subnet:
                break
            depth -= 1
            if last != view.highest:
                add_range(flat, last + 1, open_routes[depth - 1] if depth else <uint32_t>NO_PEER)
        if i < view.count:
            open_routes[depth] = route_number(view, i)
            add_range(flat, view.routes[open_routes[depth]].subnet, open_routes[depth])
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
            while at + 1 < flat.count and <uint32_t>flat.starts[at + 1] <= bucket << 16:
                at += 1
            first = at
            while at + 1 < flat.count and <uint32_t>flat.starts[at + 1] >> 16 == bucket:
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


cdef bint build_wide(fib_wide* wide, const flat_ranges* flat) noexcept nogil:
    """False where memory is short."""
    cdef uint32_t buckets = 1, bucket, at = 1
    cdef u128 first
    wide.ranges = flat.count
    wide.starts = <u128*>large((flat.count + 1) * sizeof(u128))
    wide.owners = <uint32_t*>large((flat.count + 1) * sizeof(uint32_t))
    if not (wide.starts and wide.owners):
        return False
    memcpy(wide.starts, flat.starts, flat.count * sizeof(u128))
    memcpy(wide.owners, flat.owners, flat.count * sizeof(uint32_t))
    if flat.count < 3:
        return True
    first = flat.starts[1]
    wide.span = flat.starts[flat.count - 1] - first
    while wide.span >> wide.shift >= flat.count:
        wide.shift += 1
    buckets = <uint32_t>(wide.span >> wide.shift) + 1
    wide.bounds = <uint32_t*>large((buckets + 1) * sizeof(uint32_t))
    if wide.bounds == NULL:
        return False
    for bucket in range(buckets):
        while at + 1 < flat.count and flat.starts[at + 1] - first <= <u128>bucket << wide.shift:
            at += 1
        wide.bounds[bucket] = at
    wide.bounds[buckets] = flat.count - 1
    return True


cdef bint build_lookup(fib_table* table) noexcept nogil:
    cdef flat_ranges flat
    cdef route_view view
    cdef size_t most = 2 * <size_t>table.count + 2
    cdef bint built = False
    flat.starts = <u128*>malloc(most * sizeof(u128))
    flat.owners = <uint32_t*>malloc(most * sizeof(uint32_t))
    find_v4(table)
    if flat.starts and flat.owners:
        view.routes = table.routes
        view.count = table.v4_end - table.v4_first
        view.gap_at = 0
        view.gap = table.v4_first
        view.lowest = mapped(0)
        view.highest = mapped(<uint32_t>0xFFFFFFFF)
        flatten(&view, &flat)
        built = build_buckets(table, &flat)
        view.gap_at = table.v4_first
        view.gap = table.v4_end - table.v4_first
        view.count = table.count - view.gap
        view.lowest = 0
        view.highest = ~<u128>0
        flatten(&view, &flat)
        built = built and build_wide(&table.wide, &flat)
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


cdef fib_table* build_table(const fib_table* old, route_change* changes, uint32_t count,
                            const uint64_t* keys) noexcept nogil:
    """NULL where memory is short."""
    cdef fib_table* table = <fib_table*>calloc(1, sizeof(fib_table))
    cdef uint32_t most = old.count + count
    cdef uint32_t size = 16
    if table == NULL:
        return NULL
    qsort(changes, count, sizeof(route_change), by_prefix)
    while size < 2 * most:
        size *= 2
    memcpy(table.hash_keys, keys, sizeof(table.hash_keys))
    table.source_mask = size - 1
    table.routes = <fib_route*>aligned_alloc(sizeof(fib_route), (most + 1) * sizeof(fib_route))
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
