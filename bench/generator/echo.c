/* Owns the round trips: ICMP echo through a raw socket, one under way at a time, so that a trip never waits behind
   another. An interval of 0 sends the next one as soon as the answer is there. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "load.h"

enum { PAYLOAD = 56, LOST_MS = 1000 }; /* what ping sends, and how long it waits here */

static uint16_t checksum(const uint8_t *bytes, size_t length) {
    uint32_t sum = 0;
    for (size_t i = 0; i < length; i += 2) {
        uint16_t word;
        memcpy(&word, bytes + i, 2);
        sum += word;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~(sum + (sum >> 16));
}

static int ask(int socket, uint16_t id, uint16_t number) {
    uint8_t packet[sizeof(struct icmphdr) + PAYLOAD] = {0};
    struct icmphdr header = {.type = ICMP_ECHO, .un.echo = {.id = htons(id), .sequence = htons(number)}};
    memcpy(packet, &header, sizeof header);
    header.checksum = checksum(packet, sizeof packet);
    memcpy(packet, &header, sizeof header);
    return send(socket, packet, sizeof packet, 0) < 0 ? -errno : 0;
}

static int is_answer(const uint8_t *packet, ssize_t length, uint16_t id, uint16_t number) {
    struct icmphdr header;
    size_t start = length < 1 ? 0 : (size_t)(packet[0] & 15) * 4;
    if (length < (ssize_t)(start + sizeof header))
        return 0;
    memcpy(&header, packet + start, sizeof header);
    return header.type == ICMP_ECHOREPLY && ntohs(header.un.echo.id) == id && ntohs(header.un.echo.sequence) == number;
}

/* 1 answered, 0 lost. */
static int answered(int socket, uint16_t id, uint16_t number) {
    double end = now() + LOST_MS / 1000.0;
    uint8_t packet[256];
    do {
        ssize_t got = recv(socket, packet, sizeof packet, 0); /* SO_RCVTIMEO bounds the wait */
        if (got > 0 && is_answer(packet, got, id, number))
            return 1;
    } while (now() < end);
    return 0;
}

static void sleep_until(double when) {
    struct timespec time = {.tv_sec = (time_t)when, .tv_nsec = (long)((when - (double)(time_t)when) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR) {
    }
}

int echo(int socket, uint16_t id, double interval, struct window window, uint32_t *nanoseconds, size_t room,
         struct echo_seen *seen) {
    struct timeval wait = {.tv_sec = LOST_MS / 1000};
    struct machine_time opened = {0};
    double next = now(), open = next + window.warmup, end = open + window.seconds, start = 0;
    uint16_t number = 0;
    *seen = (struct echo_seen){0};
    if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) < 0 || read_machine_time(&opened) < 0)
        return -errno;
    while (next < end && seen->samples < room) {
        double at = now(), took;
        int counts = at >= open, failed = 0, got;
        if (counts && start == 0) {
            failed = read_machine_time(&opened);
            start = at = now();
        }
        if (!failed)
            failed = ask(socket, id, ++number);
        if (failed && failed != -ENOBUFS && failed != -EHOSTUNREACH && failed != -ENETUNREACH)
            return failed;
        got = !failed && answered(socket, id, number);
        took = now() - at;
        if (counts) {
            seen->sent++;
            seen->received += (uint64_t)got;
            if (got)
                nanoseconds[seen->samples++] = (uint32_t)(took * 1e9);
        }
        if (interval > 0) {
            next = next + interval > at + took ? next + interval : at + took;
            sleep_until(next);
        } else {
            next = at + took;
        }
    }
    if (start > 0) {
        seen->seconds = now() - start;
        seen->used = since(opened);
    }
    return 0;
}
