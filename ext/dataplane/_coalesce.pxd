# Owns what packets for a TUN need before they are written: those of one flow become a superframe, and a virtio_net_hdr says
# how it, or a packet that came so, is to be finished or cut. Bytes only: no descriptor, no table, no memory of its own.
# dataplane/path/superframe.py is the oracle.
#
# Words. A superframe is one large TCP or UDP packet that stands for many. A chain is a stretch of packets of one flow
# that leave as one superframe; their payloads stay where they are.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from dataplane.abi cimport virtio_net_hdr
from dataplane.headers cimport ip_view

cdef enum:
    MOST_CHAIN_HEADER = 100  # IPv6 without extensions, and TCP with all its options: the most that is merged
    CHAIN_PACKETS = 64       # in one chain: longer ones gain nothing and delay the first packet
    FLOWS = 64               # open chains that are looked at; a power of two

cdef struct packet_ref:
    uint8_t* data
    uint32_t length
    uint32_t next            # next packet of its chain, or NO_PEER
    uint32_t sequence        # TCP
    uint16_t header          # bytes of all headers; 0: not to be merged
    uint16_t l4
    uint16_t payload
    uint16_t check_start     # of an unfinished checksum: what it covers; 0: it is finished
    uint16_t check_offset    # and where it is from there
    uint16_t segment         # of a superframe that came as such: payload bytes of each segment; 0: it is none
    uint8_t protocol
    uint8_t flags            # TCP

cdef struct packet_chain:
    uint32_t first
    uint32_t last
    uint32_t count
    uint32_t payload         # of all packets together
    bint open                # may take another packet
    bint verified            # the first packet's checksums were found right

cdef uint32_t chain_packets(packet_ref* packets, uint32_t count, packet_chain* chains, bint tcp, bint udp,
                            uint64_t* wrong) noexcept nogil
cdef void stamp_superframe(const packet_ref* packets, const packet_chain* chain, virtio_net_hdr* header,
                           uint8_t* out) noexcept nogil
cdef void mark_unfinished(packet_ref* packet, const ip_view* view) noexcept nogil
cdef bint mark_superframe(packet_ref* packet, const ip_view* view, uint32_t segment, uint32_t most) noexcept nogil
cdef void describe_single(const packet_ref* packet, virtio_net_hdr* header) noexcept nogil
