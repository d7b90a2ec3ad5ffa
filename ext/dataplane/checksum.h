/* Owns the ones'-complement sums of the Internet checksum (RFC 1071). Free of state and of packet formats.
   Sums are taken in the machine's byte order, which the ones'-complement sum allows (RFC 1071, section 2 B):
   a folded result is stored into the packet as it is. Which way to sum long stretches is chosen at run time. */
#ifndef LODEN_CHECKSUM_H
#define LODEN_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

/* 64 bytes a step: each 32-bit word is widened to 64 bits, so no lane can overflow below 16 GiB. */
__attribute__((target("avx2"), noinline)) static uint64_t
checksum_add_avx2(const uint8_t *bytes, size_t blocks, uint64_t sum) {
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    __m256i even = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    uint64_t lanes[4];
    for (; blocks; blocks--, bytes += 64) {
        __m256i first = _mm256_loadu_si256((const __m256i *)bytes);
        __m256i second = _mm256_loadu_si256((const __m256i *)(bytes + 32));
        even = _mm256_add_epi64(even, _mm256_add_epi64(_mm256_and_si256(first, low), _mm256_and_si256(second, low)));
        odd = _mm256_add_epi64(odd, _mm256_add_epi64(_mm256_srli_epi64(first, 32), _mm256_srli_epi64(second, 32)));
    }
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(even, odd));
    return sum + lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

static inline int checksum_has_avx2(void) {
    static int known = -1;
    if (known < 0)
        known = __builtin_cpu_supports("avx2") != 0;
    return known;
}
#endif

/* Adds `length` bytes to a running sum. The sum cannot overflow for anything below 16 GiB. Only the last stretch of a
   sum may have an odd length: a byte behind it would count in the wrong half of its word. */
static inline uint64_t checksum_add(const uint8_t *bytes, size_t length, uint64_t sum) {
#if defined(__x86_64__)
    if (length >= 128 && checksum_has_avx2()) {
        sum = checksum_add_avx2(bytes, length / 64, sum);
        bytes += length & ~(size_t)63;
        length &= 63;
    }
#endif
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

/* A running sum folded to 16 bits, not complemented: what a pseudo-header leaves in an unfinished checksum. */
static inline uint16_t checksum_fold(uint64_t sum) {
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* The 16-bit ones'-complement of a running sum, ready to be stored. */
static inline uint16_t checksum_finish(uint64_t sum) {
    return (uint16_t)~checksum_fold(sum);
}

#endif
