/* Owns the clocks of the generator: the time, the processors' time, and that of the processes which are measured. */
#include <errno.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

enum { MOST_WATCHED = 64 };
static clockid_t watched[MOST_WATCHED];
static int watching;

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* The clock of a process is the scheduler's, in nanoseconds; /proc/PID/stat would count ticks of 10 ms. */
int watch_processes(const int *pids, int count) {
    if (count < 0 || count > MOST_WATCHED)
        return -EINVAL;
    watching = 0;
    for (int i = 0; i < count; i++) {
        int failed = clock_getcpuclockid(pids[i], &watched[i]);
        if (failed)
            return -failed;
    }
    watching = count;
    return 0;
}

static double read_watched(void) {
    double sum = 0;
    for (int i = 0; i < watching; i++) {
        struct timespec time;
        if (clock_gettime(watched[i], &time) == 0) /* else it has ended; what it used is lost */
            sum += (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
    }
    return sum;
}

/* Busy is what is not idle: the kernel measures idle time by its clock (NO_HZ), but only counts ticks of what runs, which
   miss the short bursts of a path that sleeps between packets. */
int read_machine_time(struct machine_time *time) {
    unsigned long long user, nice, system, idle, iowait, irq, softirq, steal;
    double tick = 1.0 / (double)sysconf(_SC_CLK_TCK), processors = (double)sysconf(_SC_NPROCESSORS_ONLN);
    struct timespec boot;
    FILE *file = fopen("/proc/stat", "r");
    int found;
    if (!file)
        return -errno;
    clock_gettime(CLOCK_BOOTTIME, &boot);
    found = fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq,
                   &softirq, &steal);
    fclose(file);
    if (found != 8)
        return -EPROTO;
    time->stolen = (double)steal * tick;
    time->busy = ((double)boot.tv_sec + (double)boot.tv_nsec * 1e-9) * processors - (double)(idle + iowait) * tick -
                 time->stolen;
    time->watched = read_watched();
    return 0;
}

struct machine_time since(struct machine_time former) {
    struct machine_time time = former;
    read_machine_time(&time);
    time.busy -= former.busy;
    time.stolen -= former.stolen;
    time.watched = time.watched > former.watched ? time.watched - former.watched : 0;
    return time;
}
