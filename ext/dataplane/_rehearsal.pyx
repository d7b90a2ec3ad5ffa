"""Owns the pumps' ways without pumps: what an Engine does with given packets and datagrams, from memory to memory.

The same functions as in the pumps, a module of its own so that the compiler sees them there with one caller. Free of
descriptors but the Engine's TUN, which may be any file. Invariant: nothing is sent, and the same calls on the same
tables have the same effects.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from dataplane.abi cimport *
from dataplane._deliver cimport deliver
from dataplane._engine cimport Engine
from dataplane._fib_table cimport fib_table
from dataplane._pump cimport engine_state, enter, leave, now_ms
from dataplane._rx cimport rx_state, take_message
from dataplane._tap cimport wall_ns
from dataplane._tx cimport HEADROOM, take_packet, tap_parts, tx_state
from dataplane._udpio cimport MESSAGES, add_control, write_address
from dataplane.headers cimport load_u128

MOST_MESSAGES = MESSAGES


def transmit(Engine engine not None, bytes header not None, bytes packet not None):
    """Do with one packet behind its virtio_net_hdr what the TX pump does, but send nothing: the taps see its datagrams
    as sent. Only while no pump runs, and of a superframe only with so many segments as are sent at once. Raises
    ValueError for what no TUN hands over."""
    cdef engine_state* state = engine.state
    cdef tx_state* tx = engine.tx
    cdef uint32_t i
    if len(header) != sizeof(virtio_net_hdr) or len(packet) > BUFFER_BYTES:
        raise ValueError("a wrong number of bytes")
    memcpy(&tx.header, <const uint8_t*>header, sizeof(virtio_net_hdr))
    memcpy(tx.buffers + HEADROOM, <const uint8_t*>packet, len(packet))
    take_packet(state, tx, enter(state, &state.tx), tx.buffers + HEADROOM, len(packet))
    tx.tap_ns = wall_ns()
    if state.tx.taps != NULL:
        for i in range(tx.outbox.count):
            tap_parts(state, tx, &tx.outbox.runs[i], 0, tx.outbox.runs[i].used, DROP_REASONS)
    tx.outbox.count = tx.stamped = 0
    tx.reads += 1
    leave(&state.tx)


def receive(Engine engine not None, list messages not None):
    """Do with these messages what the RX pump does with a batch: the taps see their datagrams, and what is accepted is
    written to the TUN. Only while no pump runs. Of each message: its outer source in 16 bytes, port, TOS, TTL, the size
    of the datagrams that it consists of, and their bytes. Raises ValueError for more or longer ones than a batch has."""
    cdef engine_state* state = engine.state
    cdef const fib_table* table
    cdef unsigned int i
    if len(messages) > MESSAGES:
        raise ValueError("more messages than a batch has")
    for i, (source, port, tos, ttl, size, data) in enumerate(messages):
        lay_in(engine.rx, i, source, port, tos, ttl, size, data)
    table = enter(state, &state.rx)
    for i in range(<unsigned int>len(messages)):
        take_message(state, engine.rx, table, i, now_ms())
    deliver(state, &engine.rx.outbox)
    leave(&state.rx)


cdef lay_in(rx_state* rx, unsigned int i, bytes source, uint16_t port, uint8_t tos, int ttl, int size, bytes data):
    """Put a message where recvmmsg would."""
    cdef msghdr* message = &rx.inbox.messages[i].msg_hdr
    cdef uint8_t* control = rx.inbox.control[i]
    cdef uint32_t ignored
    cdef int wide = tos
    if len(source) != 16 or len(data) > BUFFER_BYTES or not 0 <= size <= BUFFER_BYTES:
        raise ValueError("a wrong number of bytes")
    write_address(&rx.inbox.sources[i], &ignored, load_u128(<const uint8_t*>source), htons(port))
    memcpy(rx.inbox.parts[i].iov_base, <const uint8_t*>data, len(data))
    rx.inbox.messages[i].msg_len = <uint32_t>len(data)
    message.msg_controllen = 0
    add_control(message, control, SOL_UDP, UDP_GRO, &size, sizeof(size))
    if rx.inbox.sources[i].v4.sin_family == AF_INET6:
        add_control(message, control, SOL_IPV6, IPV6_TCLASS, &wide, sizeof(wide))
        add_control(message, control, SOL_IPV6, IPV6_HOPLIMIT, &ttl, sizeof(ttl))
    else:
        add_control(message, control, SOL_IP, IP_TOS, &tos, sizeof(tos))
        add_control(message, control, SOL_IP, IP_TTL, &ttl, sizeof(ttl))
