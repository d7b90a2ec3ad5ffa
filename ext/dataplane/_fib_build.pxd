# Owns building a forwarding table: an old one and sorted changes become routes, ranges of one answer, and what leads to
# them. Read it from the bottom up: build_table is the way of a table.
#
# Free of Python, descriptors and counters; all of it runs without the GIL. Invariants: the old table is only read; a table
# that is handed out is whole, and where memory is short there is none.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy

from dataplane.abi cimport MADV_HUGEPAGE, NO_PEER, madvise, u128
from dataplane._fib_table cimport (
    PAGED, PAGED_RANGES, fib_bucket, fib_page, fib_route, fib_source_slot, fib_table, fib_wide,
)
from dataplane.headers cimport load_u128, mapped

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size)

cdef enum:
    LARGE_PAGE = 1 << 21
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


cdef inline u128 mask_of(uint32_t length) noexcept nogil:
    return ~<u128>0 << (128 - length) if length else 0


cdef inline int by_prefix(const void* left, const void* right) noexcept nogil:
    cdef const route_change* a = <const route_change*>left
    cdef const route_change* b = <const route_change*>right
    cdef int order = memcmp(a.subnet, b.subnet, 16)
    return order if order else <int>a.length - b.length


cdef inline void free_table(fib_table* table) noexcept nogil:
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


cdef inline bint copy_change(const route_change* change, fib_route* out) noexcept nogil:
    if change.remove:
        return False
    out.subnet = load_u128(change.subnet)
    out.mask = mask_of(change.length)
    out.address = load_u128(change.address)
    out.slot = change.slot
    out.mtu = change.mtu
    memcpy(out.mac, change.mac, 6)
    return True


cdef inline void merge_routes(fib_table* table, const fib_table* old, const route_change* changes, uint32_t count) noexcept nogil:
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


cdef inline void find_v4(fib_table* table) noexcept nogil:
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


cdef inline void flatten(const route_view* view, flat_ranges* flat) noexcept nogil:
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


cdef inline void build_page(fib_page* page, const uint16_t* starts, uint32_t size) noexcept nogil:
    cdef uint32_t at = 0, part
    for part in range(256):
        while at + 1 < size and starts[at + 1] <= part << 8:
            at += 1
        page.bounds[part][0] = <uint16_t>at
        while at + 1 < size and starts[at + 1] <= (part << 8 | 255):
            at += 1
        page.bounds[part][1] = <uint16_t>at


cdef inline void* large(size_t bytes) noexcept nogil:
    """Memory that random lookups read: in large pages, or each lookup would also miss in the TLB."""
    cdef void* memory
    if bytes < LARGE_PAGE:
        return malloc(bytes)
    bytes = (bytes + LARGE_PAGE - 1) & ~<size_t>(LARGE_PAGE - 1)
    memory = aligned_alloc(LARGE_PAGE, bytes)
    if memory != NULL:
        madvise(memory, bytes, MADV_HUGEPAGE)
    return memory


cdef inline bint build_buckets(fib_table* table, const flat_ranges* flat) noexcept nogil:
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


cdef inline void fill_bucket(fib_table* table, const flat_ranges* flat, uint32_t bucket, uint32_t first, uint32_t size,
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


cdef inline bint build_wide(fib_wide* wide, const flat_ranges* flat) noexcept nogil:
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


cdef inline bint build_lookup(fib_table* table) noexcept nogil:
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


cdef inline void build_sources(fib_table* table) noexcept nogil:
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


cdef inline fib_table* build_table(const fib_table* old, route_change* changes, uint32_t count,
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
