# Owns what goes through the UDP sockets: runs of datagrams on the way out, batches of messages on the way in; the arrays
# that sendmmsg and recvmmsg want are set up once and used for ever. Free of what the datagrams mean.
#
# A run is a stretch of datagrams for one route that leaves one socket by one send: all of one size, the last may be shorter,
# all with one ECN field. The kernel cuts it by UDP_SEGMENT (Documentation/networking/udp.rst, net/ipv4/udp.c: udp_send_skb).

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from dataplane.abi cimport *
from dataplane.headers cimport is_mapped, load_u128, mapped, store_u128

cdef enum:
    RUNS = 32                # open or waiting at once
    RUN_DATAGRAMS = 128      # UDP_MAX_SEGMENTS of kernels since 6.9; older ones take 64
    RUN_BYTES = 65507        # what one UDP send takes over IPv4
    MESSAGES = 64            # received at once
    CONTROL = 96             # bytes for control messages: UDP_GRO, the outer TOS, and its TTL while a tap is armed
    SEND_CONTROL = 48        # CMSG_SPACE(2) and CMSG_SPACE(4)

cdef union outer_address:
    sockaddr_in v4
    sockaddr_in6 v6

cdef struct udp_run:
    iovec parts[2 * RUN_DATAGRAMS]   # each datagram in one part, or in two: stamped header and payload
    uint8_t control[SEND_CONTROL]
    outer_address to
    uint32_t to_length
    u128 address             # the same, in host order
    uint32_t slot            # counters of the route
    uint32_t socket          # number of the one it leaves by
    uint32_t size            # bytes of the first datagram
    uint32_t bytes
    uint32_t count
    uint32_t used            # parts
    uint8_t ecn              # of the outer header
    bint closed

cdef struct udp_outbox:
    mmsghdr messages[RUNS]
    uint8_t order[RUNS]      # runs by message: those of a socket stand together
    udp_run runs[RUNS]
    uint32_t count
    uint16_t port_be
    uint32_t most            # datagrams in one run: 1 without UDP_SEGMENT

cdef struct udp_inbox:
    mmsghdr messages[MESSAGES]
    iovec parts[MESSAGES]
    outer_address sources[MESSAGES]
    uint8_t control[MESSAGES][CONTROL]

cdef struct message_facts:
    uint32_t size            # of all datagrams but the last: what UDP_GRO says, or the whole message
    uint8_t ecn              # of the outer header


cdef inline void write_address(outer_address* out, uint32_t* length, u128 address, uint16_t port_be) noexcept nogil:
    memset(out, 0, sizeof(outer_address))
    if is_mapped(address):
        out.v4.sin_family = AF_INET
        out.v4.sin_port = port_be
        out.v4.sin_addr.s_addr = htonl(<uint32_t>address)
        length[0] = sizeof(sockaddr_in)
    else:
        out.v6.sin6_family = AF_INET6
        out.v6.sin6_port = port_be
        store_u128(out.v6.sin6_addr.s6_addr, address)
        length[0] = sizeof(sockaddr_in6)


cdef inline udp_run* open_run(udp_outbox* outbox, u128 address, uint32_t slot, uint32_t socket, uint8_t ecn) noexcept nogil:
    """The run that the next datagram for this route may join, or a new one; NULL where the outbox is full."""
    cdef uint32_t i
    cdef udp_run* run
    for i in range(outbox.count):
        run = &outbox.runs[outbox.count - 1 - i]
        if run.slot == slot and run.socket == socket:
            if not run.closed and run.ecn == ecn:
                return run
            break            # an older run must not be overtaken
    if outbox.count == RUNS:
        return NULL
    run = &outbox.runs[outbox.count]
    outbox.count += 1
    write_address(&run.to, &run.to_length, address, outbox.port_be)
    run.address = address
    run.slot = slot
    run.socket = socket
    run.ecn = ecn
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


cdef inline void add_control(msghdr* message, uint8_t* control, int level, int kind, const void* data,
                             size_t length) noexcept nogil:
    cdef cmsghdr* made = <cmsghdr*>(control + message.msg_controllen)
    message.msg_control = control
    message.msg_controllen += CMSG_SPACE(length)
    made.cmsg_level = level
    made.cmsg_type = kind
    made.cmsg_len = CMSG_LEN(length)
    memcpy(CMSG_DATA(made), data, length)


cdef inline void describe_run(udp_run* run, msghdr* message, bint cut) noexcept nogil:
    """Fill in all of a message but its parts; `cut`: the kernel shall cut it into the run's datagrams."""
    cdef uint16_t size = <uint16_t>run.size
    cdef int ecn = run.ecn
    message.msg_name = &run.to
    message.msg_namelen = run.to_length
    message.msg_flags = 0
    message.msg_control = NULL
    message.msg_controllen = 0
    if cut:
        add_control(message, run.control, SOL_UDP, UDP_SEGMENT, &size, sizeof(size))
    if ecn and run.to.v4.sin_family == AF_INET:
        add_control(message, run.control, SOL_IP, IP_TOS, &ecn, sizeof(ecn))
    elif ecn:
        add_control(message, run.control, SOL_IPV6, IPV6_TCLASS, &ecn, sizeof(ecn))


cdef inline void seal_outbox(udp_outbox* outbox) noexcept nogil:
    """Make the messages that sendmmsg takes, socket by socket, and of each in order."""
    cdef uint32_t i, j, made = 0
    cdef uint64_t placed = 0
    for i in range(outbox.count):
        if placed >> i & 1:
            continue
        for j in range(i, outbox.count):
            if outbox.runs[j].socket == outbox.runs[i].socket:
                placed |= <uint64_t>1 << j
                outbox.order[made] = <uint8_t>j
                made += 1
    for i in range(made):
        describe_run(&outbox.runs[outbox.order[i]], &outbox.messages[i].msg_hdr, outbox.runs[outbox.order[i]].count > 1)
        outbox.messages[i].msg_hdr.msg_iov = outbox.runs[outbox.order[i]].parts
        outbox.messages[i].msg_hdr.msg_iovlen = outbox.runs[outbox.order[i]].used


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
        inbox.messages[i].msg_hdr.msg_namelen = sizeof(outer_address)
        inbox.messages[i].msg_hdr.msg_controllen = CONTROL
    return recvmmsg(fd, inbox.messages, most, MSG_DONTWAIT, NULL)


cdef inline message_facts facts_of(const udp_inbox* inbox, unsigned int i) noexcept nogil:
    """What the control messages of message i say."""
    cdef msghdr* message = <msghdr*>&inbox.messages[i].msg_hdr
    cdef uint32_t length = inbox.messages[i].msg_len
    cdef cmsghdr* control = CMSG_FIRSTHDR(message)
    cdef message_facts facts
    cdef int size
    facts.size = length
    facts.ecn = 0
    while control != NULL:
        if control.cmsg_level == SOL_UDP and control.cmsg_type == UDP_GRO and control.cmsg_len >= CMSG_LEN(sizeof(int)):
            memcpy(&size, CMSG_DATA(control), sizeof(int))
            if 0 < size <= <int>length:
                facts.size = <uint32_t>size
        elif control.cmsg_level == SOL_IP and control.cmsg_type == IP_TOS and control.cmsg_len >= CMSG_LEN(1):
            facts.ecn = CMSG_DATA(control)[0] & 3
        elif (control.cmsg_level == SOL_IPV6 and control.cmsg_type == IPV6_TCLASS
              and control.cmsg_len >= CMSG_LEN(sizeof(int))):
            memcpy(&size, CMSG_DATA(control), sizeof(int))
            facts.ecn = size & 3
        control = CMSG_NXTHDR(message, control)
    return facts


cdef inline u128 source_of(const udp_inbox* inbox, unsigned int i) noexcept nogil:
    if inbox.sources[i].v4.sin_family == AF_INET:
        return mapped(ntohl(inbox.sources[i].v4.sin_addr.s_addr))
    return load_u128(inbox.sources[i].v6.sin6_addr.s6_addr)
