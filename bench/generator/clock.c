/* Owns the two clocks of the generator: the time, and the processors' time. */
#include <errno.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "load.h"

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int read_machine_time(struct machine_time *time) {
    unsigned long long user, nice, system, idle, iowait, irq, softirq, steal;
    double tick = 1.0 / (double)sysconf(_SC_CLK_TCK);
    FILE *file = fopen("/proc/stat", "r");
    int found;
    if (!file)
        return -errno;
    found = fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq,
                   &softirq, &steal);
    fclose(file);
    if (found != 8)
        return -EPROTO;
    time->busy = (double)(user + nice + system + irq + softirq) * tick;
    time->stolen = (double)steal * tick;
    return 0;
}

struct machine_time since(struct machine_time former) {
    struct machine_time time = former;
    read_machine_time(&time);
    time.busy -= former.busy;
    time.stolen -= former.stolen;
    return time;
}
