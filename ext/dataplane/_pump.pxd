# Owns what both pumps share: their state, how they enter and leave a table, how they wait, how they report.
#
# Invariant (a pump, a table, a set of taps): a pump writes the generation that it works under into a word of its own before it loads
# the table, and 0 before it waits. A table that was replaced in generation g is unused once every word is 0 or at
# least g; so publishing never waits and the pumps never lock. A counter has one writer at a time, which adds by `tally`;
# any other thread reads it by `load_relaxed`.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from dataplane.abi cimport *
from dataplane._fib_table cimport fib_route, fib_table
from dataplane._tap cimport tap_record, tap_set
from dataplane.headers cimport is_mapped, store_be32, store_u128, vxlan_link

cdef enum:
    EVENTS = 256
    SENDERS = 64             # sockets at most
    RETRY_MS = 10            # how long a pump rests where the kernel gives an error instead of readiness

cdef enum batch_end:         # of what a pump found: nothing, all that was there, or as much as a batch takes
    NOTHING
    EMPTIED
    MORE_WAITS

cdef struct pump_state:
    uint64_t generation      # alone on its cache line: publish reads it
    uint64_t padding[7]
    const tap_set* taps      # those of the generation; NULL where nobody looks
    const fib_table* table   # and its table
    uint64_t packets
    uint64_t bytes
    uint64_t superframes     # TX: read from the TUN; RX: written to it
    uint64_t messages        # TX: runs sent; RX: messages received
    uint64_t calls           # sends or receives asked of the kernel
    uint64_t wakeups
    uint64_t moderations     # how often it let packets gather
    uint64_t partings        # TX: how often it went to the TX thread
    uint64_t icmp_errors
    uint64_t wrong_checksums # RX: of inner packets, where merging looked at them
    uint64_t drops[DROP_REASONS]
    uint64_t paced_ns        # when its pace was measured, and what it had carried by then
    uint64_t paced_packets
    uint64_t busy_until      # by that measurement; each pump reads the other's
    uint64_t events_written  # ring of events: written by the pump ...
    uint64_t events_read     # ... and read by the event loop
    uint64_t events_lost
    path_event events[EVENTS]

cdef struct engine_state:
    void* table              # fib_table*
    void* taps               # tap_set*, or NULL
    uint64_t generation
    uint64_t stopping
    int tun
    int udp                  # receives
    int senders[SENDERS]     # sockets; udp itself where a datagram's source port is said by the wire format
    uint32_t senders_count
    uint64_t flow_keys[2]    # nobody shall choose flows that leave by one port
    int icmp_v4              # raw sockets, -1 where no errors are sent
    int icmp_v6
    int stop_fd
    int event_fd
    uint64_t apart           # the TX thread carries TX, else the RX thread does
    int tx_bell              # eventfds: look whose TX is
    int rx_bell
    uint8_t icmp_source_v4[4]
    uint8_t icmp_source_v6[16]
    bint vxlan               # packets travel in frames
    vxlan_link link
    uint32_t segment_mtu     # of pods: a longer TCP packet is a superframe of a kernel VTEP, and cut into such packets
    int check
    bint merge_tcp           # what the TUN takes as superframes
    bint merge_udp
    uint64_t spin_ns
    uint64_t moderation_ns
    uint32_t slots
    peer_counters* sent      # by slot; written by TX only
    peer_counters* received  # by slot; written by RX only
    pump_state tx
    pump_state rx


cdef inline uint64_t now_ms() noexcept nogil:
    cdef clock_time now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>(now.tv_nsec // 1000000)


cdef inline uint64_t now_ns() noexcept nogil:
    cdef clock_time now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef inline bint stopping(engine_state* engine) noexcept nogil:
    return load_u64(&engine.stopping) != 0


cdef inline void post_event(engine_state* engine, pump_state* pump, event_kind kind, u128 address,
                            uint64_t value) noexcept nogil:
    cdef uint64_t at = pump.events_written
    cdef path_event* event = &pump.events[at % EVENTS]
    if at - load_u64(&pump.events_read) >= EVENTS:
        tally(&pump.events_lost, 1)
        return
    event.kind = kind
    event.address = address
    event.value = value
    store_u64(&pump.events_written, at + 1)
    eventfd_write(engine.event_fd, 1)


cdef inline const fib_table* enter(engine_state* engine, pump_state* pump) noexcept nogil:
    store_u64(&pump.generation, load_u64(&engine.generation))
    pump.taps = <const tap_set*>load_pointer(&engine.taps)
    pump.table = <const fib_table*>load_pointer(&engine.table)
    return pump.table


cdef inline void leave(pump_state* pump) noexcept nogil:
    store_u64(&pump.generation, 0)


cdef inline void name_lease(tap_record* about, const fib_table* table, uint32_t at) noexcept nogil:
    """The lease is that of route `at`, or none."""
    cdef const fib_route* route
    cdef u128 mask
    about.lease = 0
    if at == NO_PEER:
        return
    route = &table.routes[at]
    mask = route.mask
    about.lease_bits = 0
    while mask:
        about.lease_bits += 1
        mask <<= 1
    if is_mapped(route.subnet):
        about.lease = 4
        about.lease_bits -= 96
        store_be32(about.subnet, <uint32_t>route.subnet)
    else:
        about.lease = 6
        store_u128(about.subnet, route.subnet)


cdef inline void rest(engine_state* engine) noexcept nogil:
    cdef pollfd stop
    stop.fd = engine.stop_fd
    stop.events = POLLIN
    poll(&stop, 1, RETRY_MS)


cdef inline int sleep_on(engine_state* engine, pump_state* pump, pollfd* watched, int count, int most_ms) noexcept nogil:
    """Sleep until a descriptor is ready; 0 where none was for `most_ms` (-1: ever). One that reports only an error would
    wake us for ever: rest instead, the next read or write says what is wrong."""
    cdef int ready, i
    tally(&pump.wakeups, 1)
    ready = poll(watched, count, most_ms)
    for i in range(count if ready > 0 else 0):
        if watched[i].revents & (POLLERR | POLLHUP | POLLNVAL) and not watched[i].revents & watched[i].events:
            rest(engine)
    return ready


cdef inline void part(engine_state* engine) noexcept nogil:
    """Leave TX to the TX thread; only by the RX thread, between two batches of TX."""
    if not load_u64(&engine.apart):
        tally(&engine.tx.partings, 1)
        store_u64(&engine.apart, 1)
        eventfd_write(engine.tx_bell, 1)


cdef inline void wait_for_room(engine_state* engine, pump_state* pump, int fd, int bell) noexcept nogil:
    """Sleep until `fd` takes more, the engine stops, or the bell rings (-1: none)."""
    cdef pollfd watched[3]
    watched[0].fd = fd
    watched[0].events = POLLOUT
    watched[1].fd = engine.stop_fd
    watched[1].events = POLLIN
    watched[2].fd = bell
    watched[2].events = POLLIN
    sleep_on(engine, pump, watched, 3, -1)


cdef inline void park(engine_state* engine, pump_state* pump, int error) noexcept nogil:
    """The device is gone: say so once, and wait for the engine to be stopped."""
    cdef pollfd stop
    post_event(engine, pump, EVENT_DEVICE_GONE, 0, error)
    leave(pump)
    stop.fd = engine.stop_fd
    stop.events = POLLIN
    while not stopping(engine):
        poll(&stop, 1, -1)
