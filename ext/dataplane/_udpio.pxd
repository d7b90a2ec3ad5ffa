# Owns what goes through the UDP socket: runs of datagrams on the way out, batches of messages on the way in; the arrays
# that sendmmsg and recvmmsg want are set up once and used for ever. Free of what the datagrams mean.
#
# A run is a stretch of datagrams for one peer that leaves by one send: all of one size, the last may be shorter. The
# kernel cuts it by UDP_SEGMENT (Documentation/networking/udp.rst, net/ipv4/udp.c: udp_send_skb).

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from dataplane.abi cimport *

cdef enum:
    RUNS = 32                # open or waiting at once
    RUN_DATAGRAMS = 128      # UDP_MAX_SEGMENTS of kernels since 6.9; older ones take 64
    RUN_BYTES = 65507        # what one UDP send takes over IPv4
    MESSAGES = 64            # received at once
    CONTROL = 64             # bytes for control messages: UDP_GRO and the outer TOS
    SEGMENT_CONTROL = 24     # CMSG_SPACE(2)

cdef struct udp_run:
    iovec parts[2 * RUN_DATAGRAMS]   # each datagram in one part, or in two: stamped header and payload
    uint8_t control[SEGMENT_CONTROL]
    sockaddr_in to
    uint32_t address         # the same, in host order
    uint32_t slot            # counters of the peer
    uint32_t size            # bytes of the first datagram
    uint32_t bytes
    uint32_t count
    uint32_t used            # parts
    bint closed

cdef struct udp_outbox:
    mmsghdr messages[RUNS]
    udp_run runs[RUNS]
    uint32_t count
    uint16_t port_be
    uint32_t most            # datagrams in one run: 1 without UDP_SEGMENT

cdef struct udp_inbox:
    mmsghdr messages[MESSAGES]
    iovec parts[MESSAGES]
    sockaddr_in sources[MESSAGES]
    uint8_t control[MESSAGES][CONTROL]


cdef inline udp_run* open_run(udp_outbox* outbox, uint32_t address, uint32_t slot) noexcept nogil:
    """The run that the next datagram for this peer may join, or a new one; NULL where the outbox is full."""
    cdef uint32_t i
    cdef udp_run* run
    for i in range(outbox.count):
        run = &outbox.runs[outbox.count - 1 - i]
        if run.address == address:
            if not run.closed:
                return run
            break            # an older run of the same peer must not be overtaken
    if outbox.count == RUNS:
        return NULL
    run = &outbox.runs[outbox.count]
    outbox.count += 1
    run.to.sin_family = AF_INET
    run.to.sin_port = outbox.port_be
    run.to.sin_addr.s_addr = htonl(address)
    run.address = address
    run.slot = slot
    run.size = run.bytes = run.count = run.used = 0
    run.closed = False
    return run


cdef inline bint fits_run(const udp_outbox* outbox, udp_run* run, uint32_t length) noexcept nogil:
    """Whether a datagram may join; where it may not, the run is closed."""
    if run.count and (length > run.size or run.count >= outbox.most or run.bytes + length > RUN_BYTES):
        run.closed = True
    return not run.closed


cdef inline void add_to_run(udp_run* run, void* head, uint32_t head_length, void* tail, uint32_t tail_length) noexcept nogil:
    """Append one datagram of one part or two. The parts are borrowed until the outbox was sent."""
    cdef iovec* part = &run.parts[run.used]
    part.iov_base = head
    part.iov_len = head_length
    run.used += 1
    if tail_length:
        part += 1
        part.iov_base = tail
        part.iov_len = tail_length
        run.used += 1
    if run.count == 0:
        run.size = head_length + tail_length
    elif head_length + tail_length < run.size:
        run.closed = True
    run.count += 1
    run.bytes += head_length + tail_length


cdef inline void seal_outbox(udp_outbox* outbox) noexcept nogil:
    """Make the messages that sendmmsg takes."""
    cdef uint32_t i
    cdef msghdr* message
    cdef udp_run* run
    cdef cmsghdr* control
    cdef uint16_t size
    for i in range(outbox.count):
        run = &outbox.runs[i]
        message = &outbox.messages[i].msg_hdr
        message.msg_name = &run.to
        message.msg_namelen = sizeof(sockaddr_in)
        message.msg_iov = run.parts
        message.msg_iovlen = run.used
        message.msg_flags = 0
        message.msg_control = NULL
        message.msg_controllen = 0
        if run.count > 1:
            message.msg_control = run.control
            message.msg_controllen = CMSG_SPACE(2)
            control = CMSG_FIRSTHDR(message)
            control.cmsg_level = SOL_UDP
            control.cmsg_type = UDP_SEGMENT
            control.cmsg_len = CMSG_LEN(2)
            size = <uint16_t>run.size
            memcpy(CMSG_DATA(control), &size, 2)


cdef inline void prepare_inbox(udp_inbox* inbox, uint8_t* buffers, size_t stride, size_t size) noexcept nogil:
    cdef uint32_t i
    for i in range(MESSAGES):
        inbox.parts[i].iov_base = buffers + i * stride
        inbox.parts[i].iov_len = size
        inbox.messages[i].msg_hdr.msg_name = &inbox.sources[i]
        inbox.messages[i].msg_hdr.msg_iov = &inbox.parts[i]
        inbox.messages[i].msg_hdr.msg_iovlen = 1
        inbox.messages[i].msg_hdr.msg_control = inbox.control[i]


cdef inline int receive(int fd, udp_inbox* inbox, unsigned int most) noexcept nogil:
    """How many messages were received, or -1 with errno."""
    cdef unsigned int i
    for i in range(most):    # the kernel has shortened them at the last call
        inbox.messages[i].msg_hdr.msg_namelen = sizeof(sockaddr_in)
        inbox.messages[i].msg_hdr.msg_controllen = CONTROL
    return recvmmsg(fd, inbox.messages, most, MSG_DONTWAIT, NULL)


cdef inline uint32_t datagram_size(const udp_inbox* inbox, unsigned int i) noexcept nogil:
    """Size of all datagrams of message i but the last: what UDP_GRO says, or the whole message."""
    cdef msghdr* message = <msghdr*>&inbox.messages[i].msg_hdr
    cdef uint32_t length = inbox.messages[i].msg_len
    cdef cmsghdr* control = CMSG_FIRSTHDR(message)
    cdef int size
    while control != NULL:
        if control.cmsg_level == SOL_UDP and control.cmsg_type == UDP_GRO and control.cmsg_len >= CMSG_LEN(sizeof(int)):
            memcpy(&size, CMSG_DATA(control), sizeof(int))
            return <uint32_t>size if 0 < size <= <int>length else length
        control = CMSG_NXTHDR(message, control)
    return length


cdef inline uint32_t source_of(const udp_inbox* inbox, unsigned int i) noexcept nogil:
    return ntohl(inbox.sources[i].sin_addr.s_addr)
