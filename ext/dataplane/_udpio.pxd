# Owns batches of datagrams: the arrays that sendmmsg and recvmmsg want, set up once and used for ever.
# Free of what the datagrams mean. The caller owns the payload buffers.

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free

from dataplane.abi cimport AF_INET, htonl, iovec, mmsghdr, ntohl, sockaddr_in

cdef struct udp_batch:
    mmsghdr* messages
    iovec* vectors
    sockaddr_in* addresses
    unsigned int size        # how many datagrams fit
    unsigned int count       # how many stand in it


cdef inline bint udp_batch_init(udp_batch* batch, unsigned int size) noexcept nogil:
    cdef unsigned int i
    batch.messages = <mmsghdr*>calloc(size, sizeof(mmsghdr))
    batch.vectors = <iovec*>calloc(size, sizeof(iovec))
    batch.addresses = <sockaddr_in*>calloc(size, sizeof(sockaddr_in))
    batch.size = size
    batch.count = 0
    if batch.messages == NULL or batch.vectors == NULL or batch.addresses == NULL:
        return False
    for i in range(size):
        batch.messages[i].msg_hdr.msg_name = &batch.addresses[i]
        batch.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in)
        batch.messages[i].msg_hdr.msg_iov = &batch.vectors[i]
        batch.messages[i].msg_hdr.msg_iovlen = 1
    return True


cdef inline void udp_batch_free(udp_batch* batch) noexcept nogil:
    free(batch.messages)
    free(batch.vectors)
    free(batch.addresses)


cdef inline void udp_batch_add(udp_batch* batch, uint32_t address, uint16_t port_be,
                               uint8_t* payload, size_t length) noexcept nogil:
    """Append one datagram to `address` (host order). The payload is borrowed until the batch was sent."""
    cdef unsigned int i = batch.count
    batch.addresses[i].sin_family = AF_INET
    batch.addresses[i].sin_port = port_be
    batch.addresses[i].sin_addr.s_addr = htonl(address)
    batch.vectors[i].iov_base = payload
    batch.vectors[i].iov_len = length
    batch.count = i + 1


cdef inline uint32_t udp_batch_address(const udp_batch* batch, unsigned int i) noexcept nogil:
    return ntohl(batch.addresses[i].sin_addr.s_addr)
