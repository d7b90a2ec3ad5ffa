/* The baseline: a proxy between a TUN and UDP that moves one packet with each system call, in the design of flannel's udp
   backend, so that every measurement has a fixed point to be compared with. One thread, poll, one buffer of the TUN's MTU,
   no blocking; after a wake-up it takes one packet each way in turn until neither side has one; no buffer sizes
   set, no offload. Routes: a linear table, first match, a hit changes places with the front. Beside it the thread that
   flannel has without meaning to: its language's runtime opened the socket, so that its poller is woken by each datagram.

   one_packet DEVICE LOCAL PORT OVERLAY-ADDRESS {NETWORK/LENGTH NEXT-HOP}...

   Makes DEVICE with an MTU of 1472, an underlay's 1500 less 28; the caller sets it up and gives it address and route.
   The harness compiles it when it needs it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/if_tun.h>

enum { MOST_ROUTES = 65536, MTU = 1472, LEAST_HEADER = 20, ICMP = 1, ICMP_ROOM = 20 + 8 + 60 + 8 };

struct route {
    uint32_t network, mask; /* network order, as everything here */
    struct sockaddr_in next_hop;
};

static struct route routes[MOST_ROUTES];
static int route_count;
static uint8_t packet[MTU];
static int tun, udp;
static uint32_t own_address; /* of the overlay: where ICMP errors come from */

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static const struct sockaddr_in *find_route(uint32_t destination) {
    for (int i = 0; i < route_count; i++) {
        if ((destination & routes[i].mask) == routes[i].network) {
            struct route hit = routes[i];
            routes[i] = routes[0];
            routes[0] = hit;
            return &routes[0].next_hop;
        }
    }
    return NULL;
}

/* Takes one from the TTL and mends the checksum in place (RFC 1624): 0 where the packet's life is over. */
static int age(uint8_t *header) {
    uint16_t checksum;
    uint32_t sum;
    if (header[8] <= 1)
        return 0;
    header[8]--;
    memcpy(&checksum, header + 10, 2);
    sum = ntohs(checksum) + 0x100u;
    checksum = htons((uint16_t)(sum + (sum >> 16)));
    memcpy(header + 10, &checksum, 2);
    return 1;
}

static uint16_t internet_checksum(const uint8_t *bytes, size_t length) {
    uint32_t sum = 0;
    for (size_t i = 0; i < length; i += 2)
        sum += (uint32_t)(bytes[i] << 8 | (i + 1 < length ? bytes[i + 1] : 0));
    sum = (sum & 0xffff) + (sum >> 16);
    return htons((uint16_t) ~(sum + (sum >> 16)));
}

/* Tells the sender that there is no route: never about ICMP, never about later fragments (RFC 1122, 3.2.2). */
static void answer_unreachable(size_t length) {
    uint8_t out[ICMP_ROOM] = {0x45};
    size_t quoted = (size_t)(packet[0] & 15) * 4 + 8;
    uint16_t value;
    if (packet[9] == ICMP || (packet[6] & 0x1f) || packet[7])
        return;
    if (quoted > length)
        quoted = length;
    value = htons((uint16_t)(28 + quoted));
    memcpy(out + 2, &value, 2);
    out[8] = 8;
    out[9] = ICMP;
    memcpy(out + 12, &own_address, 4);
    memcpy(out + 16, packet + 12, 4);
    value = internet_checksum(out, 20);
    memcpy(out + 10, &value, 2);
    out[20] = 3; /* destination unreachable, code 0: network */
    memcpy(out + 28, packet, quoted);
    value = internet_checksum(out + 20, 8 + quoted);
    memcpy(out + 22, &value, 2);
    if (write(tun, out, 28 + quoted) < 0)
        perror("ICMP into the TUN");
}

static int tun_to_udp(void) {
    uint32_t destination;
    const struct sockaddr_in *next_hop;
    ssize_t length = read(tun, packet, sizeof packet);
    if (length < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            perror("read from the TUN");
        return 0;
    }
    if (length < LEAST_HEADER)
        return 1;
    memcpy(&destination, packet + 16, 4);
    next_hop = find_route(destination);
    if (!next_hop) {
        answer_unreachable((size_t)length);
        return 1;
    }
    if (age(packet) &&
        sendto(udp, packet, (size_t)length, 0, (const struct sockaddr *)next_hop, sizeof *next_hop) < 0 &&
        errno != EAGAIN)
        perror("sendto");
    return 1;
}

static int udp_to_tun(void) {
    ssize_t length = recv(udp, packet, sizeof packet, 0);
    if (length < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            perror("recv");
        return 0;
    }
    if (length < LEAST_HEADER || !age(packet))
        return 1;
    while (write(tun, packet, (size_t)length) < 0) {
        if (errno != EAGAIN) {
            perror("write to the TUN");
            break;
        }
    }
    return 1;
}

/* What Go's network poller does with a socket of net.ListenUDP that C reads (runtime/netpoll_epoll.go): it is registered for
   both directions, edge by edge, so that each datagram that comes or has left wakes the poller; nobody waits in Go, and it
   looks once more without waiting before it waits again. docs/benchmarks.md tells what that costs flannel. */
static _Noreturn void *poll_as_the_runtime(void *nothing) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET};
    int poller = epoll_create1(EPOLL_CLOEXEC);
    (void)nothing;
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, udp, &event) < 0)
        fail("poller");
    for (;;) {
        epoll_wait(poller, &event, 1, -1);
        epoll_wait(poller, &event, 1, 0);
    }
}

static void open_tun(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tun < 0 || ioctl(tun, TUNSETIFF, &request) < 0)
        fail("TUN");
    request.ifr_mtu = MTU;
    if (ioctl(control, SIOCSIFMTU, &request) < 0)
        fail("MTU of the TUN");
    close(control);
}

static void open_udp(const char *address, int port) {
    struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, address, &local.sin_addr) != 1)
        fail(address);
    udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (udp < 0 || bind(udp, (struct sockaddr *)&local, sizeof local) < 0)
        fail("bind");
}

static void add_route(char *prefix, const char *next_hop, int port) {
    struct route *route = &routes[route_count++];
    char *slash = strchr(prefix, '/');
    int length = slash ? atoi(slash + 1) : 32;
    if (slash)
        *slash = 0;
    route->mask = length ? htonl(~0u << (32 - length)) : 0;
    route->next_hop = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, prefix, &route->network) != 1 || inet_pton(AF_INET, next_hop, &route->next_hop.sin_addr) != 1)
        fail(prefix);
}

int main(int count, char **words) {
    struct pollfd polled[2];
    pthread_t poller;
    if (count < 7 || count % 2 == 0 || (count - 5) / 2 > MOST_ROUTES) {
        fprintf(stderr, "usage: one_packet DEVICE LOCAL PORT OVERLAY-ADDRESS {NETWORK/LENGTH NEXT-HOP}...\n");
        return 2;
    }
    if (inet_pton(AF_INET, words[4], &own_address) != 1)
        fail(words[4]);
    for (int i = 5; i + 1 < count; i += 2)
        add_route(words[i], words[i + 1], atoi(words[3]));
    open_udp(words[2], atoi(words[3]));
    open_tun(words[1]);
    if (pthread_create(&poller, NULL, poll_as_the_runtime, NULL))
        fail("thread");
    polled[0] = (struct pollfd){.fd = tun, .events = POLLIN};
    polled[1] = (struct pollfd){.fd = udp, .events = POLLIN};
    for (;;) {
        int more;
        if (poll(polled, 2, -1) < 0 && errno != EINTR)
            fail("poll");
        do {
            more = tun_to_udp();
            more |= udp_to_tun();
        } while (more);
    }
}
