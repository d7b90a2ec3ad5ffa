"""Owns the way from Python into the generator's C loops, which run without the GIL.

Free of: sockets' making and anything printed. Invariant: what a loop returned as -errno is raised as OSError.
"""

import os
from array import array

from cpython cimport array as c_array
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "load.h" nogil:
    struct machine_time:
        double busy
        double stolen
    struct window:
        double warmup
        double seconds
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
        double seconds
        machine_time used
    struct udp_sent:
        uint64_t sent
        uint64_t refused
        double seconds
    struct echo_seen:
        uint64_t sent
        uint64_t received
        size_t samples
        double seconds
        machine_time used
    int c_tcp_drain "tcp_drain"(const int*, int, window, tcp_seen*)
    int c_tcp_flood "tcp_flood"(const int*, int, double, uint64_t*)
    int c_udp_drain "udp_drain"(int, uint32_t, double, window, udp_seen*)
    int c_udp_flood "udp_flood"(int, uint32_t, uint32_t, double, double, udp_sent*)
    int c_echo "echo"(int, uint16_t, double, window, uint32_t*, size_t, echo_seen*)
    int read_machine_time(machine_time*)


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


def udp_drain(int socket, uint32_t tag, double patience, double warmup, double seconds):
    """Count the datagrams of a run until it is quiet; `patience` is how long the first may take, in seconds."""
    cdef udp_seen seen
    cdef int result
    cdef window opening = window(warmup, seconds)
    with nogil:
        result = c_udp_drain(socket, tag, patience, opening, &seen)
    checked(result)
    return seen


def udp_flood(int socket, uint32_t tag, uint32_t size, double rate, double seconds):
    """Send numbered datagrams of `size` bytes, `rate` a second; 0 is as many as go."""
    cdef udp_sent sent
    cdef int result
    with nogil:
        result = c_udp_flood(socket, tag, size, rate, seconds, &sent)
    checked(result)
    return sent


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


def processor_time():
    """(busy, stolen) seconds of all processors since boot."""
    cdef machine_time time
    checked(read_machine_time(&time))
    return time.busy, time.stolen
