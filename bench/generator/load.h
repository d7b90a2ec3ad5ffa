/* Owns the inner loops of the load generator: plain C over sockets that the caller has made and connected.
   Free of: addresses, options, output. Invariant: whatever is called a rate is counted by the receiver, in a window
   that the receiver opens `warmup` seconds after the first arrival and closes `seconds` later; the machine's processor
   time is read at these two moments, so that numerator and denominator cover the same stretch.
   Every function returns 0, or a negative errno. */
#ifndef LODEN_BENCH_LOAD_H
#define LODEN_BENCH_LOAD_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

/* Seconds of all processors. */
struct machine_time {
    double busy;    /* neither idle nor stolen; only differences mean something */
    double stolen;  /* what the hypervisor took */
    double watched; /* what the processes given to watch_processes have used, by their own clocks */
};

struct window {
    double warmup, seconds;
};

struct tcp_seen {
    uint64_t bytes; /* inside the window */
    double seconds; /* the window's true length; 0 where it never opened */
    struct machine_time used;
};

/* The window in slices of `width` seconds: what came in each, and the longest silence that ended in it. Without slices
   (`count` 0) only the totals are kept. */
struct timeline {
    uint32_t *received, *gap_us;
    size_t count;
    double width;
};

/* `all_*` are of the whole run, the others of the window. */
struct udp_seen {
    uint64_t received, expected, duplicated, reordered;
    uint64_t all_received, all_duplicated;
    double started;     /* CLOCK_MONOTONIC of the window's begin */
    double longest_gap; /* seconds between two batches inside the window */
    double seconds;
    struct machine_time used;
};

struct udp_sent {
    uint64_t sent, refused; /* refused: the kernel said ENOBUFS or reported an ICMP error */
    double seconds;
};

struct connect_seen {
    uint64_t accepted; /* inside the window */
    double seconds;
    struct machine_time used;
};

struct connect_made {
    uint64_t made, failed; /* of the whole run */
};

struct echo_seen {
    uint64_t sent, received; /* after the warm-up */
    size_t samples;
    double seconds;
    struct machine_time used;
};

int tcp_drain(const int *connections, int count, struct window window, struct tcp_seen *seen);
int tcp_flood(const int *connections, int count, double seconds, uint64_t *sent);
int udp_drain(int socket, uint32_t tag, double patience, struct window window, struct timeline line,
              struct udp_seen *seen);
int udp_flood(int socket, uint32_t tag, uint32_t size, double rate, double seconds, const struct sockaddr_in *to,
              size_t targets, struct udp_sent *sent);
int connect_drain(int listener, struct window window, struct connect_seen *seen);
int connect_flood(struct sockaddr_in to, int parallel, double seconds, struct connect_made *made);
int echo(int socket, uint16_t id, double interval, struct window window, uint32_t *nanoseconds, size_t room,
         struct echo_seen *seen);

double now(void); /* CLOCK_MONOTONIC */
int watch_processes(const int *pids, int count);
int read_machine_time(struct machine_time *time);
struct machine_time since(struct machine_time former);

#endif
