/* Owns the ones'-complement sums of the Internet checksum (RFC 1071). Free of state and of packet formats.
   Sums are taken in the machine's byte order, which the ones'-complement sum allows (RFC 1071, section 2 B):
   a folded result is stored into the packet as it is. */
#ifndef LODEN_CHECKSUM_H
#define LODEN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Adds `length` bytes to a running sum. The sum cannot overflow for anything below 16 GiB. */
static inline uint64_t checksum_add(const uint8_t *bytes, size_t length, uint64_t sum) {
    while (length >= 4) {
        uint32_t word;
        memcpy(&word, bytes, 4);
        sum += word;
        bytes += 4;
        length -= 4;
    }
    if (length) {
        uint32_t tail = 0; /* RFC 1071: an odd last byte is padded with a zero byte behind it */
        memcpy(&tail, bytes, length);
        sum += tail;
    }
    return sum;
}

/* The 16-bit ones'-complement of a running sum, ready to be stored. */
static inline uint16_t checksum_finish(uint64_t sum) {
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

#endif
