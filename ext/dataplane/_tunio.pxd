# Owns reading packets from and writing packets to a TUN device that was opened with IFF_VNET_HDR.
# Free of what the packets mean. Descriptors are non-blocking; errors come back as -errno.

from libc.errno cimport errno
from libc.stdint cimport uint8_t

from dataplane.abi cimport iovec, readv, virtio_net_hdr, writev


cdef inline ssize_t tun_read(int fd, virtio_net_hdr* header, uint8_t* packet, size_t size) noexcept nogil:
    """Length of the next packet, which may be 0; -EAGAIN where none waits; -EBADFD where the device is gone."""
    cdef iovec parts[2]
    cdef ssize_t got
    parts[0].iov_base = header
    parts[0].iov_len = sizeof(virtio_net_hdr)
    parts[1].iov_base = packet
    parts[1].iov_len = size
    got = readv(fd, parts, 2)
    if got < 0:
        return -errno
    return got - <ssize_t>sizeof(virtio_net_hdr) if got > <ssize_t>sizeof(virtio_net_hdr) else 0


cdef inline int tun_write_parts(int fd, virtio_net_hdr* header, iovec* parts, int count) noexcept nogil:
    """Hand one packet or superframe to the kernel, gathered from parts[1] to parts[count - 1]; parts[0] is filled in
    here. 0 or -errno."""
    parts[0].iov_base = header
    parts[0].iov_len = sizeof(virtio_net_hdr)
    return 0 if writev(fd, parts, count) >= 0 else -errno
