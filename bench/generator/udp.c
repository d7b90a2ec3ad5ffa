/* Owns the UDP source and sink: numbered datagrams, so that the sink knows what is missing.
   A datagram begins with its number and the run's tag (what is left over from an earlier run does not count). */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

#include "load.h"

enum { BATCH = 64, MOST_PAYLOAD = 65507, MEMORY = 1 << 20 };
static const double QUIET = 0.25; /* seconds without a datagram that end a run */

struct mark {
    uint64_t number;
    uint32_t tag;
} __attribute__((packed));

struct tally {
    uint64_t next; /* highest number that came, plus 1 */
    uint64_t unique, duplicated, reordered;
    uint64_t seen[MEMORY / 64]; /* one bit for each of the last MEMORY numbers */
};

static void take(struct tally *tally, uint64_t number) {
    uint64_t bit = UINT64_C(1) << (number % 64);
    uint64_t *word = &tally->seen[number / 64 % (MEMORY / 64)];
    if (number >= tally->next) {
        uint64_t from = number - tally->next < MEMORY ? tally->next : number + 1 - MEMORY;
        for (uint64_t i = from; i <= number; i++)
            tally->seen[i / 64 % (MEMORY / 64)] &= ~(UINT64_C(1) << (i % 64));
        tally->next = number + 1;
    } else if (tally->next - number > MEMORY || *word & bit) {
        tally->duplicated++; /* older than the memory: it cannot be told, and must not count as arrived */
        return;
    } else {
        tally->reordered++;
    }
    *word |= bit;
    tally->unique++;
}

static void take_batch(struct tally *tally, uint32_t tag, const struct mark *marks, const struct mmsghdr *messages,
                       int count) {
    for (int i = 0; i < count; i++)
        if (messages[i].msg_len >= sizeof(struct mark) && marks[i].tag == tag)
            take(tally, marks[i].number);
}

/* A batch of `count` that came at `at`, `silence` after the one before it. */
static void note(struct timeline *line, struct udp_seen *seen, double at, uint64_t count, double silence) {
    double since_start = at - seen->started;
    if (silence > since_start)
        silence = since_start; /* what was silent before the window is not the window's */
    if (silence > seen->longest_gap)
        seen->longest_gap = silence;
    if (line->count > 0 && since_start >= 0) {
        size_t slice = (size_t)(since_start / line->width);
        if (slice < line->count) {
            uint32_t gap = (uint32_t)(silence * 1e6);
            line->received[slice] += (uint32_t)count;
            if (gap > line->gap_us[slice])
                line->gap_us[slice] = gap;
        }
    }
}

int udp_drain(int socket, uint32_t tag, double patience, struct window window, struct timeline line,
              struct udp_seen *seen) {
    struct timeval wait = {.tv_usec = 50000};
    struct mmsghdr messages[BATCH];
    struct iovec pieces[BATCH][2];
    struct mark marks[BATCH];
    struct machine_time opened = {0};
    double first = 0, start = 0, at = now(), last = at + patience, batch = at;
    struct tally *tally = calloc(1, sizeof *tally);
    char *rest = malloc(MOST_PAYLOAD); /* all datagrams are copied, none is looked at behind its mark */
    struct tally *before = calloc(1, sizeof *before);
    int failed = tally && rest && before ? 0 : -ENOMEM;
    *seen = (struct udp_seen){0};
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) {
        pieces[i][0] = (struct iovec){&marks[i], sizeof marks[i]};
        pieces[i][1] = (struct iovec){rest, MOST_PAYLOAD - sizeof marks[i]};
        messages[i].msg_hdr.msg_iov = pieces[i];
        messages[i].msg_hdr.msg_iovlen = 2;
    }
    if (!failed && setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) < 0)
        failed = -errno;
    while (!failed && at < last) {
        uint64_t former = tally->unique;
        int count = recvmmsg(socket, messages, BATCH, MSG_WAITFORONE, NULL);
        if (count < 0 && errno != EAGAIN && errno != EINTR)
            failed = -errno;
        take_batch(tally, tag, marks, messages, count);
        at = now();
        if (tally->unique > former) {
            if (first == 0)
                first = at;
            if (start > 0 && seen->seconds == 0)
                note(&line, seen, at, tally->unique - former, at - batch);
            batch = at;
            last = at + QUIET;
        }
        if (first > 0 && start == 0 && at >= first + window.warmup) {
            failed = read_machine_time(&opened);
            *before = *tally;
            start = seen->started = now();
        } else if (start > 0 && seen->seconds == 0 && (at >= start + window.seconds || at >= last)) {
            note(&line, seen, at, 0, at - batch);
            seen->seconds = at - start;
            seen->used = since(opened);
            seen->received = tally->unique - before->unique;
            seen->expected = tally->next - before->next;
            seen->duplicated = tally->duplicated - before->duplicated;
            seen->reordered = tally->reordered - before->reordered;
        }
    }
    if (!failed) {
        seen->all_received = tally->unique;
        seen->all_duplicated = tally->duplicated;
    }
    free(tally);
    free(before);
    free(rest);
    return failed;
}

static void pause_microseconds(long microseconds) {
    nanosleep(&(struct timespec){.tv_nsec = microseconds * 1000}, NULL);
}

/* What the next datagram's failure means: 1 goes on, 0 ends the run. */
static int passing(int error) {
    return error == EAGAIN || error == EINTR || error == ENOBUFS || error == ECONNREFUSED || error == EHOSTUNREACH ||
           error == ENETUNREACH;
}

/* `to`: addresses that take turns; without them (`targets` 0) the socket is connected. */
int udp_flood(int socket, uint32_t tag, uint32_t size, double rate, double seconds, const struct sockaddr_in *to,
              size_t targets, struct udp_sent *sent) {
    struct mmsghdr messages[BATCH];
    struct iovec pieces[BATCH];
    char *block;
    double begin, at;
    int failed = 0;
    *sent = (struct udp_sent){0};
    if (size < sizeof(struct mark) || size > MOST_PAYLOAD)
        return -EINVAL;
    if (!(block = calloc(BATCH, size)))
        return -ENOMEM;
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){block + (size_t)i * size, size};
        messages[i].msg_hdr.msg_iov = &pieces[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    begin = now();
    while ((at = now()) < begin + seconds && !failed) {
        double due = rate > 0 ? (at - begin) * rate - (double)sent->sent : BATCH;
        int count = due < BATCH ? (int)due : BATCH;
        if (count < 1) {
            pause_microseconds(50);
            continue;
        }
        for (int i = 0; i < count; i++) {
            uint64_t number = sent->sent + (uint64_t)i;
            memcpy(block + (size_t)i * size, &(struct mark){number, tag}, sizeof(struct mark));
            if (targets > 0) {
                messages[i].msg_hdr.msg_name = (void *)&to[number % targets];
                messages[i].msg_hdr.msg_namelen = sizeof *to;
            }
        }
        count = sendmmsg(socket, messages, (unsigned)count, 0);
        if (count > 0) {
            sent->sent += (uint64_t)count;
        } else if (passing(errno)) {
            sent->refused++;
            sched_yield();
        } else {
            failed = -errno;
        }
    }
    sent->seconds = at - begin;
    free(block);
    return failed;
}
