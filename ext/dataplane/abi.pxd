# Owns every kernel and libc declaration that the packet path uses, and the constants that both sides of
# the boundary share. Free of logic.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec* iov, int iovcnt)
    ssize_t writev(int fd, const iovec* iov, int iovcnt)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    struct timespec:
        pass
    cmsghdr* CMSG_FIRSTHDR(msghdr* message)
    cmsghdr* CMSG_NXTHDR(msghdr* message, cmsghdr* control)
    unsigned char* CMSG_DATA(cmsghdr* control)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)
    int sendmmsg(int fd, mmsghdr* messages, unsigned int count, int flags)
    int recvmmsg(int fd, mmsghdr* messages, unsigned int count, int flags, timespec* timeout)
    struct sockaddr:
        pass
    ssize_t sendto(int fd, const void* data, size_t length, int flags, const sockaddr* to, unsigned int to_length)
    int MSG_DONTWAIT
    int AF_INET
    int AF_INET6

cdef extern from "<linux/udp.h>" nogil:
    int UDP_SEGMENT
    int UDP_GRO

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<netinet/in.h>" nogil:
    int SOL_UDP "IPPROTO_UDP"
    int SOL_IP "IPPROTO_IP"
    int SOL_IPV6 "IPPROTO_IPV6"
    int IP_TOS
    int IP_TTL
    int IPV6_TCLASS
    int IPV6_HOPLIMIT
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    uint32_t htonl(uint32_t value)
    uint32_t ntohl(uint32_t value)
    uint16_t htons(uint16_t value)
    uint16_t ntohs(uint16_t value)

cdef extern from "<arpa/inet.h>" nogil:
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout)
    short POLLIN
    short POLLOUT
    short POLLERR
    short POLLHUP
    short POLLNVAL

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int eventfd_write(int fd, uint64_t value)
    int eventfd_read(int fd, uint64_t* value)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t length)
    int madvise(void* address, size_t length, int advice)
    int MADV_HUGEPAGE
    void* MAP_FAILED
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_TIMERSLACK

cdef extern from "<time.h>" nogil:
    struct clock_time "timespec":
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, clock_time* now)
    int nanosleep(const clock_time* time, clock_time* left)
    int CLOCK_MONOTONIC
    int CLOCK_MONOTONIC_COARSE
    int CLOCK_REALTIME

cdef extern from "<linux/virtio_net.h>" nogil:
    # include/uapi/linux/virtio_net.h; a TUN with IFF_VNET_HDR puts it before every packet
    struct virtio_net_hdr:
        uint8_t flags
        uint8_t gso_type
        uint16_t hdr_len
        uint16_t gso_size
        uint16_t csum_start
        uint16_t csum_offset

cdef enum:                   # of its flags and its gso_type; a header file of an older kernel lacks some
    NEEDS_CSUM = 1
    RSC_INFO = 4             # then csum_start and csum_offset would count what a device has merged
    GSO_TCPV4 = 1
    GSO_TCPV6 = 4
    GSO_UDP_L4 = 5
    GSO_ECN = 0x80

cdef extern from * nogil:
    """
    typedef unsigned __int128 loden_u128;
    """
    # an address of either family in host order, IPv4 as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2). Cython believes that it
    # is shorter: it may be computed with, and must never be given to Python.
    ctypedef unsigned long long u128 "loden_u128"

cdef extern from * nogil:
    """
    #define loden_load(pointer) __atomic_load_n((pointer), __ATOMIC_SEQ_CST)
    #define loden_store(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_SEQ_CST)
    """
    uint64_t load_u64 "loden_load" (uint64_t* pointer)
    void store_u64 "loden_store" (uint64_t* pointer, uint64_t value)
    void* load_pointer "loden_load" (void** pointer)
    void store_pointer "loden_store" (void** pointer, void* value)

cdef extern from * nogil:
    """
    #define loden_load_relaxed(pointer) __atomic_load_n((pointer), __ATOMIC_RELAXED)
    #define loden_store_relaxed(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELAXED)
    #define loden_tally(counter, n) loden_store_relaxed(counter, loden_load_relaxed(counter) + (n))
    """
    # for a word that one thread writes, others read, and nothing else depends on: never torn, and as quick as any other
    uint64_t load_relaxed "loden_load_relaxed" (const uint64_t* pointer)
    void store_relaxed "loden_store_relaxed" (uint64_t* pointer, uint64_t value)
    void tally "loden_tally" (uint64_t* counter, uint64_t n)
    uint32_t load_relaxed_u32 "loden_load_relaxed" (const uint32_t* pointer)
    void store_relaxed_u32 "loden_store_relaxed" (uint32_t* pointer, uint32_t value)

cdef enum:
    NO_PEER = 0xFFFFFFFF     # "none" for an index of a route in a table
    BUFFER_BYTES = 65536     # more than any UDP payload and than any packet a TUN hands over
    # buffers lie a little more than 64 KiB apart, or all of them would share the same sets of the caches
    BUFFER_STRIDE = BUFFER_BYTES + 67 * 64

cdef enum:                   # mirrors dataplane.errors.DropReason, value for value
    DROP_NO_ROUTE = 0
    DROP_NOT_IP = 1
    DROP_LENGTH = 2
    DROP_UNKNOWN_PEER = 3
    DROP_SPOOFED_SOURCE = 4
    DROP_SEND_FAILED = 5
    DROP_TUN_WRITE = 6
    DROP_SUPERFRAME = 7
    DROP_PATH_MTU = 8
    DROP_NO_VNI = 9
    DROP_FOREIGN_VNI = 10
    DROP_RESERVED_BITS = 11
    DROP_OWN_MAC = 12
    DROP_OTHER_MAC = 13
    DROP_PEER_MAC = 14
    DROP_VLAN = 15
    DROP_ETHERTYPE = 16
    DROP_ECN = 17
    DROP_REASONS = 18        # how many there are; also "not dropped"

cdef enum source_check:
    CHECK_OFF = 0            # anything from anybody, as flannel's udp backend
    CHECK_NODE = 1           # known peer; inner source in its subnet or its public IP
    CHECK_STRICT = 2         # known peer; inner source in its subnet

cdef enum event_kind:
    EVENT_DEVICE_GONE = 0    # value: errno of the TUN
    EVENT_UNKNOWN_SOURCE = 1  # address: outer source; value: datagrams so far
    EVENT_SEND_FAILED = 2    # address: outer destination; value: errno
    EVENT_TOO_LONG = 3       # address: outer destination; value: bytes of a datagram that its path did not take
    EVENT_CAPABILITY_LOST = 4  # value: which
    EVENT_SUPERFRAME = 5     # address: outer source of a TCP superframe, which we cut to the pods' MTU; value: its bytes

cdef enum capability:        # mirrors dataplane.path.capability.Capability
    CAPABILITY_UDP_SEGMENT = 0
    CAPABILITY_TUN_TSO = 1
    CAPABILITY_TUN_USO = 2

cdef struct path_event:
    u128 address
    uint64_t value
    uint32_t kind

cdef struct peer_counters:
    uint64_t packets
    uint64_t bytes
    uint64_t last_ms         # CLOCK_MONOTONIC, milliseconds
    uint64_t padding
