"""Owns the way from Python into the generator's C loops, which run without the GIL.

Free of: sockets' making and anything printed. Invariant: what a loop returned as -errno is raised as OSError.
"""

import os
from array import array

from cpython cimport array as c_array
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cdef extern from "<netinet/in.h>" nogil:
    enum: AF_INET
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    uint16_t htons(uint16_t)
    uint32_t htonl(uint32_t)

cdef extern from "load.h" nogil:
    struct machine_time:
        double busy
        double stolen
        double watched
    struct window:
        double warmup
        double seconds
    struct timeline:
        uint32_t* received
        uint32_t* gap_us
        size_t count
        double width
    struct tcp_seen:
        uint64_t bytes
        double seconds
        machine_time used
    struct udp_seen:
        uint64_t received
        uint64_t expected
        uint64_t duplicated
        uint64_t reordered
        uint64_t all_received
        uint64_t all_duplicated
        double started
        double longest_gap
        double seconds
        machine_time used
    struct udp_sent:
        uint64_t sent
        uint64_t refused
        double seconds
    struct connect_seen:
        uint64_t accepted
        double seconds
        machine_time used
    struct connect_made:
        uint64_t made
        uint64_t failed
    struct echo_seen:
        uint64_t sent
        uint64_t received
        size_t samples
        double seconds
        machine_time used
    int c_tcp_drain "tcp_drain"(const int*, int, window, tcp_seen*)
    int c_tcp_flood "tcp_flood"(const int*, int, double, uint64_t*)
    int c_udp_drain "udp_drain"(int, uint32_t, double, window, timeline, udp_seen*)
    int c_udp_flood "udp_flood"(
        int, uint32_t, uint32_t, double, double, const sockaddr_in*, size_t, udp_sent*)
    int c_connect_drain "connect_drain"(int, window, connect_seen*)
    int c_connect_flood "connect_flood"(sockaddr_in, int, double, connect_made*)
    int c_echo "echo"(int, uint16_t, double, window, uint32_t*, size_t, echo_seen*)
    int read_machine_time(machine_time*)
    int c_watch_processes "watch_processes"(const int*, int)


cdef int checked(int result) except -1:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return 0


def tcp_drain(c_array.array connections not None, double warmup, double seconds):
    """Receive on all descriptors (`array("i")`) until the window closes."""
    cdef tcp_seen seen
    cdef int result
    cdef int count = len(connections)
    cdef window opening = window(warmup, seconds)
    with nogil:
        result = c_tcp_drain(connections.data.as_ints, count, opening, &seen)
    checked(result)
    return seen


def tcp_flood(c_array.array connections not None, double seconds):
    """Send on all descriptors (`array("i")`) until the sink closes them, at most `seconds`; the bytes taken."""
    cdef uint64_t sent
    cdef int result
    cdef int count = len(connections)
    with nogil:
        result = c_tcp_flood(connections.data.as_ints, count, seconds, &sent)
    checked(result)
    return sent


def udp_drain(int socket, uint32_t tag, double patience, double warmup, double seconds, double width=0.0):
    """Count the datagrams of a run until it is quiet; `patience` is how long the first may take, in seconds.

    (What was seen, the window's slices of `width` seconds: [datagrams, longest silence in microseconds] each.)
    """
    cdef udp_seen seen
    cdef int result
    cdef window opening = window(warmup, seconds)
    cdef size_t count = <size_t>(seconds / width) + 1 if width > 0 else 0
    cdef c_array.array received = array("I", bytes(count * sizeof(uint32_t)))
    cdef c_array.array gaps = array("I", bytes(count * sizeof(uint32_t)))
    cdef timeline line = timeline(received.data.as_uints, gaps.data.as_uints, count, width)
    with nogil:
        result = c_udp_drain(socket, tag, patience, opening, line, &seen)
    checked(result)
    return seen, [list(pair) for pair in zip(received, gaps)]


cdef sockaddr_in address(uint32_t host, uint16_t port):
    cdef sockaddr_in found
    memset(&found, 0, sizeof(found))
    found.sin_family = AF_INET
    found.sin_port = htons(port)
    found.sin_addr.s_addr = htonl(host)
    return found


def udp_flood(
    int socket, uint32_t tag, uint32_t size, double rate, double seconds, hosts=(), uint16_t port=0
):
    """Send numbered datagrams of `size` bytes, `rate` a second; 0 is as many as go.

    `hosts`: addresses as numbers that take turns at `port`; without them the socket is connected.
    """
    cdef udp_sent sent
    cdef int result
    cdef size_t number, count = len(hosts)
    cdef sockaddr_in* to = <sockaddr_in*>malloc(max(count, 1) * sizeof(sockaddr_in))
    if to == NULL:
        raise MemoryError
    try:
        for number in range(count):
            to[number] = address(hosts[number], port)
        with nogil:
            result = c_udp_flood(socket, tag, size, rate, seconds, to, count, &sent)
    finally:
        free(to)
    checked(result)
    return sent


def connect_drain(int listener, double warmup, double seconds):
    """Accept and reset until the window closes."""
    cdef connect_seen seen
    cdef int result
    cdef window opening = window(warmup, seconds)
    with nogil:
        result = c_connect_drain(listener, opening, &seen)
    checked(result)
    return seen


def connect_flood(uint32_t host, uint16_t port, int parallel, double seconds):
    """Make TCP connections, `parallel` of them under way at a time, until `seconds` have passed."""
    cdef connect_made made
    cdef int result
    cdef sockaddr_in to = address(host, port)
    with nogil:
        result = c_connect_flood(to, parallel, seconds, &made)
    checked(result)
    return made


def echo(int socket, uint16_t identifier, double interval, double warmup, double seconds, size_t room=1_000_000):
    """Round trips of a connected raw ICMP socket: (what was seen, `array("I")` of nanoseconds)."""
    cdef echo_seen seen
    cdef int result
    cdef window opening = window(warmup, seconds)
    cdef c_array.array times = c_array.clone(array("I"), room, zero=False)
    cdef uint32_t* data = times.data.as_uints
    with nogil:
        result = c_echo(socket, identifier, interval, opening, data, room, &seen)
    checked(result)
    c_array.resize(times, seen.samples)
    return seen, times


def watch_processes(c_array.array pids not None):
    """Count what these processes (`array("i")`) use from now on as `watched`, beside the whole machine's time."""
    checked(c_watch_processes(pids.data.as_ints, len(pids)))


def processor_time():
    """(busy, stolen) seconds of all processors; only differences mean something."""
    cdef machine_time time
    checked(read_machine_time(&time))
    return time.busy, time.stolen
