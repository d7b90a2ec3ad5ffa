# Owns the threads' bodies: which thread carries which direction, and when it sleeps.
#
# While little is carried, the RX thread carries both directions and the TX thread sleeps: an answer to what came in is
# sent by the thread that is awake already, and no second one looks for it. As soon as both directions have something
# round after round, TX goes to its own thread, until that had nothing to send for a while.
#
# Invariant: `apart` says whose the TX direction is. Only its holder gives it away, with a batch ended, and rings the
# other's bell afterwards; so each direction's state is touched by one thread at a time, and nobody locks.

from libc.stdint cimport uint64_t

from dataplane.abi cimport *
from dataplane._pump cimport EMPTIED, NOTHING, batch_end, engine_state, now_ns, part, pump_state, sleep_on, stopping
from dataplane._rx cimport receive_batch, rx_state
from dataplane._tx cimport transmit_batch, tx_state

cdef enum:
    CROWDED_ROUNDS = 4       # with something in both directions and no look in vain between them: TX goes apart
    QUIET_MS = 10            # without a packet: TX comes back
    MOST_IN_VAIN = 8         # bounds in a row to whose end nothing came: what comes is slower than that
    PACE_NS = 1000000        # a pump's pace is measured over that long at least ...
    BUSY_PACKETS = 128       # ... and so many in it make the pump a busy one ...
    BUSY_NS = 10000000       # ... for so long, unless it is measured anew before


cdef struct patience:
    uint64_t end             # of looking again; 0 before the first look in vain
    uint64_t in_vain         # bounds in a row
    bint slept               # what is found next has ended a sleep


cdef inline void watch(pollfd* watched, int fd) noexcept nogil:
    watched.fd = fd
    watched.events = POLLIN
    watched.revents = 0


cdef inline bint is_busy(engine_state* engine, uint64_t now) noexcept nogil:
    """Whether packets come at a high rate in either direction."""
    return now < load_u64(&engine.tx.busy_until) or now < load_u64(&engine.rx.busy_until)


cdef inline bint looks_again(engine_state* engine, patience* spin) noexcept nogil:
    """After a look in vain: whether the bound `spin_ns`, which begins with the first of them, is not reached yet. Never at a
    high rate in either direction: the processor is wanted then, and what came next would be carried with what follows."""
    cdef uint64_t now = now_ns()
    if engine.spin_ns == 0 or spin.in_vain == MOST_IN_VAIN or is_busy(engine, now):
        spin.end = 0
        return False
    if spin.end == 0:
        spin.end = now + engine.spin_ns
    elif now >= spin.end:
        spin.end = 0
        spin.in_vain += 1
        return False
    sched_yield()
    return True


cdef inline void found(patience* spin) noexcept nogil:
    """Something was carried: by looking or without a pause, which says that looking is worth it, or after a sleep."""
    if not spin.slept:
        spin.in_vain = 0
    spin.end = 0
    spin.slept = False


cdef inline int sleep(engine_state* engine, pump_state* pump, patience* spin, pollfd* watched, int count,
                      int most_ms) noexcept nogil:
    """As `sleep_on`; a sleep that is shorter than the bound says that looking again is worth it."""
    cdef uint64_t began = now_ns()
    cdef int ready = sleep_on(engine, pump, watched, count, most_ms)
    spin.slept = True
    if now_ns() - began < engine.spin_ns:
        spin.in_vain = 0
    return ready


cdef inline void be_punctual() noexcept nogil:
    """A thread's timers may be as late as its moderation is long (man 2 prctl): not this one's."""
    prctl(PR_SET_TIMERSLACK, <unsigned long>1)


cdef inline void measure_pace(pump_state* pump) noexcept nogil:
    """Of a pump that has just carried something: whether it does so at a high rate."""
    cdef uint64_t now = now_ns(), elapsed = now - pump.paced_ns
    cdef bint fast
    if elapsed >= PACE_NS:
        fast = (pump.packets - pump.paced_packets) * PACE_NS >= BUSY_PACKETS * elapsed
        store_u64(&pump.busy_until, now + BUSY_NS if fast else 0)
        pump.paced_ns = now
        pump.paced_packets = pump.packets


cdef inline void moderate(engine_state* engine, pump_state* pump) noexcept nogil:
    """Of a pump whose pace was just measured. What comes at a high rate is left alone for a moment once all was carried,
    and carried together then: neither looks in vain nor a send for every few packets take the processor from whoever
    sends and receives them."""
    cdef clock_time time
    if engine.moderation_ns and pump.busy_until:
        tally(&pump.moderations, 1)
        time.tv_sec = 0
        time.tv_nsec = <long>engine.moderation_ns
        nanosleep(&time, NULL)


cdef inline void pump_tx(engine_state* engine, tx_state* tx) noexcept nogil:
    """The TX thread: sleeps until TX is its own."""
    cdef pollfd watched[3]
    cdef uint64_t ignored
    cdef patience spin = patience(0, 0, False)
    cdef batch_end sent
    be_punctual()
    watch(&watched[0], engine.tun)
    watch(&watched[1], engine.stop_fd)
    watch(&watched[2], engine.tx_bell)
    while not stopping(engine):
        if not load_u64(&engine.apart):
            poll(&watched[1], 2, -1)                 # counted nowhere: TX's counters are the other thread's now
            eventfd_read(engine.tx_bell, &ignored)
            continue
        sent = transmit_batch(engine, tx)
        if sent != NOTHING:
            found(&spin)
            measure_pace(&engine.tx)
            if sent == EMPTIED:
                moderate(engine, &engine.tx)
        elif not looks_again(engine, &spin):
            if sleep(engine, &engine.tx, &spin, watched, 2, QUIET_MS) == 0:
                store_u64(&engine.apart, 0)
                eventfd_write(engine.rx_bell, 1)


cdef inline void pump_rx(engine_state* engine, tx_state* tx, rx_state* rx) noexcept nogil:
    """The RX thread: carries TX as well while that is not apart."""
    cdef pollfd watched[4]
    cdef uint64_t ignored
    cdef patience spin = patience(0, 0, False)
    cdef bint both
    cdef batch_end received, sent
    cdef bint look = True                            # not after a sleep that something else has ended
    cdef int crowded = 0
    be_punctual()
    watch(&watched[0], engine.udp)
    watch(&watched[1], engine.stop_fd)
    watch(&watched[2], engine.rx_bell)
    watch(&watched[3], engine.tun)
    while not stopping(engine):
        received = receive_batch(engine, rx) if look else NOTHING
        look = True
        both = not load_u64(&engine.apart)
        sent = transmit_batch(engine, tx) if both else NOTHING
        if received != NOTHING or sent != NOTHING:
            found(&spin)
            if received != NOTHING:
                measure_pace(&engine.rx)
            if sent != NOTHING:
                measure_pace(&engine.tx)
            crowded += received != NOTHING and sent != NOTHING
            if crowded == CROWDED_ROUNDS:
                crowded = 0
                part(engine)
            elif max(received, sent) == EMPTIED:
                moderate(engine, &engine.rx if received == EMPTIED else &engine.tx)
            continue
        crowded = 0
        if not looks_again(engine, &spin):
            sleep(engine, &engine.rx, &spin, watched, 4 if both else 3, -1)
            look = watched[0].revents != 0
            if watched[2].revents:
                eventfd_read(engine.rx_bell, &ignored)
