# Owns what one packet from a TUN needs before it can go out: a superframe is cut into the packets that it stands for, an
# unfinished checksum is finished. Bytes only: no descriptor, no table, no memory of its own.
# dataplane/path/superframe.py is the oracle.
#
# Words. A superframe is one large TCP or UDP packet behind a virtio_net_hdr that says how it is to be cut. Segments are
# stamped: their headers are made in scratch memory, their payload stays where it is.

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from dataplane.abi cimport virtio_net_hdr

cdef struct split_plan:
    const uint8_t* packet
    uint32_t payload         # bytes behind the headers
    uint32_t segments
    uint32_t sequence        # TCP
    uint16_t header          # bytes of all headers
    uint16_t l4              # where TCP or UDP begins
    uint16_t size            # payload bytes of every segment but the last
    uint16_t identification  # IPv4
    uint16_t partial         # pseudo-header sum as the kernel left it, without the length
    uint8_t version
    uint8_t protocol
    uint8_t flags            # TCP

cdef bint finish_checksum(const virtio_net_hdr* header, uint8_t* packet, size_t length) noexcept nogil
cdef bint plan_split(const virtio_net_hdr* header, const uint8_t* packet, size_t length, split_plan* plan) noexcept nogil
cdef uint32_t stamp_segment(const split_plan* plan, uint32_t index, uint8_t* out) noexcept nogil
