/* Owns the rate of new TCP connections. The acceptor counts, and ends each connection by a reset as soon as it has it: no
   port waits in TIME_WAIT, and a connection costs a handshake and one packet more. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "load.h"

enum { MOST_PARALLEL = 256, PATIENCE_MS = 100 };
static const double QUIET = 0.25; /* seconds without a connection that end a run */

static int accept_one(int listener) {
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (connection < 0)
        return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED ? 0 : -errno;
    setsockopt(connection, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(connection);
    return 1;
}

/* The listener must not block. */
int connect_drain(int listener, struct window window, struct connect_seen *seen) {
    struct machine_time opened = {0};
    double first = 0, start = 0, at = now(), last = at + window.warmup + 10;
    uint64_t accepted = 0, former = 0, before = 0;
    int failed = 0;
    *seen = (struct connect_seen){0};
    while (!failed && at < last) { /* until the source has ended: to close before would refuse what is under way */
        struct pollfd polled = {.fd = listener, .events = POLLIN};
        int got = poll(&polled, 1, PATIENCE_MS) > 0, most = MOST_PARALLEL;
        while (got > 0 && most-- > 0 && (got = accept_one(listener)) > 0)
            accepted++;
        failed = got < 0 ? got : 0;
        at = now();
        if (accepted > former) {
            last = at + QUIET;
            if (first == 0)
                first = at;
        }
        former = accepted;
        if (first > 0 && start == 0 && at >= first + window.warmup) {
            failed = read_machine_time(&opened);
            before = accepted;
            start = now();
        } else if (start > 0 && seen->seconds == 0 && (at >= start + window.seconds || at >= last)) {
            seen->accepted = accepted - before;
            seen->seconds = at - start;
            seen->used = since(opened);
        }
    }
    return failed;
}

/* A socket on its way; -1 where none could be made. */
static int begin(const struct sockaddr_in *to) {
    int connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connection >= 0 && connect(connection, (const struct sockaddr *)to, sizeof *to) < 0 && errno != EINPROGRESS) {
        close(connection);
        return -1;
    }
    return connection;
}

/* The reset is what a connection ends with; anything else is a failure. */
static int was_made(int connection) {
    int error = 0;
    socklen_t length = sizeof error;
    char byte;
    if (getsockopt(connection, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
        return 0;
    if (error == 0 && recv(connection, &byte, 1, MSG_DONTWAIT) < 0)
        error = errno;
    return error == 0 || error == ECONNRESET;
}

int connect_flood(struct sockaddr_in to, int parallel, double seconds, struct connect_made *made) {
    struct pollfd polled[MOST_PARALLEL];
    double end = now() + seconds;
    *made = (struct connect_made){0};
    if (parallel < 1 || parallel > MOST_PARALLEL)
        return -EINVAL;
    for (int i = 0; i < parallel; i++)
        polled[i] = (struct pollfd){.fd = begin(&to), .events = POLLIN};
    while (now() < end) {
        if (poll(polled, (nfds_t)parallel, PATIENCE_MS) < 0 && errno != EINTR)
            break;
        for (int i = 0; i < parallel; i++) {
            if (polled[i].fd >= 0 && !polled[i].revents)
                continue;
            if (polled[i].fd >= 0 && was_made(polled[i].fd))
                made->made++;
            else
                made->failed++;
            if (polled[i].fd >= 0)
                close(polled[i].fd);
            polled[i].fd = begin(&to);
        }
    }
    for (int i = 0; i < parallel; i++)
        if (polled[i].fd >= 0)
            close(polled[i].fd);
    return 0;
}
