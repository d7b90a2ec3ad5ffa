/* Owns the TCP bulk source and sink: one thread for all flows of a side, poll, and one copy per call. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "load.h"

enum { BLOCK = 128 * 1024, MOST_FLOWS = 256, PATIENCE_MS = 100 };

static int watch(struct pollfd *polled, const int *connections, int count, short events) {
    if (count < 1 || count > MOST_FLOWS)
        return -EINVAL;
    for (int i = 0; i < count; i++)
        polled[i] = (struct pollfd){.fd = connections[i], .events = events};
    return 0;
}

/* A negative descriptor is passed over by poll. */
static void forget(struct pollfd *polled, int *left) {
    polled->fd = -1;
    --*left;
}

int tcp_drain(const int *connections, int count, struct window window, struct tcp_seen *seen) {
    struct pollfd polled[MOST_FLOWS];
    struct machine_time opened = {0};
    double first = 0, start = 0, at = now(), patience = at + window.warmup + window.seconds + 10;
    uint64_t bytes = 0;
    int left = count, failed = watch(polled, connections, count, POLLIN);
    char *block = failed ? NULL : malloc(BLOCK);
    *seen = (struct tcp_seen){0};
    if (!block)
        return failed ? failed : -ENOMEM;
    while (left && at < patience && !(start > 0 && at >= start + window.seconds)) {
        if (poll(polled, (nfds_t)count, PATIENCE_MS) < 0 && errno != EINTR) {
            failed = -errno;
            break;
        }
        at = now();
        if (first > 0 && start == 0 && at >= first + window.warmup) {
            failed = read_machine_time(&opened);
            bytes = 0;
            start = at = now();
        }
        for (int i = 0; i < count && !failed; i++) {
            ssize_t got;
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            got = recv(polled[i].fd, block, BLOCK, MSG_DONTWAIT);
            if (got > 0) {
                bytes += (uint64_t)got;
                if (first == 0)
                    first = at;
            } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
                forget(&polled[i], &left);
            }
        }
        if (failed)
            break;
        at = now();
    }
    if (start > 0) {
        seen->bytes = bytes;
        seen->seconds = at - start;
        seen->used = since(opened);
    }
    free(block);
    return failed;
}

int tcp_flood(const int *connections, int count, double seconds, uint64_t *sent) {
    struct pollfd polled[MOST_FLOWS];
    double end = now() + seconds;
    int left = count, failed = watch(polled, connections, count, POLLOUT);
    char *block = failed ? NULL : calloc(1, BLOCK);
    *sent = 0;
    if (!block)
        return failed ? failed : -ENOMEM;
    for (size_t i = 0; i < BLOCK; i++)
        block[i] = (char)(i * 167 >> 3); /* not one repeated byte: the checksum of that is too kind */
    while (left && now() < end) { /* the sink ends the run by closing */
        if (poll(polled, (nfds_t)count, PATIENCE_MS) < 0 && errno != EINTR) {
            failed = -errno;
            break;
        }
        for (int i = 0; i < count; i++) {
            ssize_t put;
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            put = send(polled[i].fd, block, BLOCK, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (put > 0)
                *sent += (uint64_t)put;
            else if (errno != EAGAIN && errno != EINTR)
                forget(&polled[i], &left);
        }
    }
    free(block);
    return failed;
}
