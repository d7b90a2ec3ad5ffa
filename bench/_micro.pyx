"""Owns the micro-benchmarks' way into the packet path: one kind of operation many times over, no Python in between.

Each operation is the function that the pumps call, out of the same .pxd files, over packets that lie in buffers as the
pumps' do. Free of descriptors, threads and time: the caller measures. Invariant: many rounds leave what one round
leaves, but for counters and for a plain packet whose checksum is unfinished, which the first round finishes.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from dataplane._coalesce cimport chain_packets, describe_single, packet_chain, packet_ref, stamp_superframe
from dataplane._deliver cimport PACKETS, tun_outbox
from dataplane._fib cimport Fib
from dataplane._pump cimport engine_state, now_ms
from dataplane._rx cimport rx_state, take_message
from dataplane._segment cimport plan_split, split_plan, stamp_segment
from dataplane._tx cimport (
    HEADROOM, READS, STAMP_BYTES, count_sent, find_route, push_packet, take_packet, tx_state, tx_way, way_of,
)
from dataplane._udpio cimport (
    MESSAGES, RUN_DATAGRAMS, add_control, prepare_inbox, seal_outbox, udp_run, write_address,
)
from dataplane.abi cimport *
from dataplane.headers cimport (
    FRAME_HEAD, VXLAN_HEADER, checksum_add, checksum_finish, ip_view, is_mapped, load_be16, load_u128, parse_ip,
    store_u128,
)

MOST_PACKETS = READS
MOST_MESSAGES = MESSAGES


cdef class PathBench:
    """Both pumps' states around `fib`, without descriptors: what would be sent or written stays in memory. `head`: that
    of a frame that we send, as `_engine.frame_head` makes it; empty where datagrams are packets."""

    cdef engine_state* engine
    cdef tx_state* tx
    cdef rx_state* rx
    cdef uint8_t* inbox
    cdef Fib fib
    cdef virtio_net_hdr headers[READS]
    cdef uint32_t lengths[READS]
    cdef uint32_t packets
    cdef uint32_t messages
    cdef uint32_t chains

    def __cinit__(self, Fib fib not None, *, uint32_t slots, bytes head=b""):
        cdef engine_state* engine = <engine_state*>calloc(1, sizeof(engine_state))
        cdef const uint8_t* link = head
        if len(head) not in (0, FRAME_HEAD):
            raise ValueError("not the head of a frame")
        self.fib = fib
        self.engine = engine
        self.tx = <tx_state*>calloc(1, sizeof(tx_state))
        self.rx = <rx_state*>calloc(1, sizeof(rx_state))
        self.inbox = <uint8_t*>calloc(MESSAGES, BUFFER_STRIDE)
        if not (engine and self.tx and self.rx and self.inbox):
            raise MemoryError
        self.tx.buffers = <uint8_t*>calloc(READS, BUFFER_STRIDE)
        engine.sent = <peer_counters*>calloc(slots, sizeof(peer_counters))
        engine.received = <peer_counters*>calloc(slots, sizeof(peer_counters))
        if not (self.tx.buffers and engine.sent and engine.received):
            raise MemoryError
        engine.table = fib.table
        engine.tun = engine.udp = engine.icmp_v4 = engine.icmp_v6 = engine.stop_fd = engine.event_fd = -1
        engine.senders[0] = -1
        engine.senders_count = 1
        engine.slots = slots
        engine.check = CHECK_NODE
        engine.merge_tcp = engine.merge_udp = True
        engine.segment_mtu = BUFFER_BYTES
        engine.vxlan = len(head) > 0
        if engine.vxlan:
            memcpy(engine.link.head, link, FRAME_HEAD)
            memcpy(engine.link.mac, link + VXLAN_HEADER + 6, 6)
            engine.link.ethertype = load_be16(link + FRAME_HEAD - 2)
        self.tx.outbox.most = RUN_DATAGRAMS
        prepare_inbox(&self.rx.inbox, self.inbox, BUFFER_STRIDE, BUFFER_BYTES)

    def __dealloc__(self):
        if self.engine != NULL:
            free(self.engine.sent)
            free(self.engine.received)
        if self.tx != NULL:
            free(self.tx.buffers)
        free(self.inbox)
        free(self.rx)
        free(self.tx)
        free(self.engine)

    # ------------------------------------------------------------------------------------------ what is carried

    def load(self, list packets):
        """Put (virtio_net_hdr, packet) pairs where TX reads them: at most MOST_PACKETS."""
        cdef bytes header, packet
        if len(packets) > READS:
            raise ValueError("more packets than a batch has")
        for i, (header, packet) in enumerate(packets):
            if len(header) != sizeof(virtio_net_hdr) or len(packet) > BUFFER_BYTES:
                raise ValueError("not what a TUN hands over")
            memcpy(&self.headers[i], <const uint8_t*>header, sizeof(virtio_net_hdr))
            memcpy(self.packet(i), <const uint8_t*>packet, len(packet))
            self.lengths[i] = len(packet)
        self.packets = len(packets)

    def load_messages(self, list messages):
        """Put (outer source of 16 bytes, size of each datagram, datagrams) where RX receives them: at most
        MOST_MESSAGES, and no more datagrams than are looked at together."""
        cdef bytes source, data
        cdef msghdr* message
        cdef int size, ecn = 0
        cdef uint8_t tos = 0
        cdef u128 address
        if len(messages) > MESSAGES or sum([-(-len(data) // size) for _, size, data in messages]) > PACKETS:
            raise ValueError("more than a batch has")
        for i, (source, size, data) in enumerate(messages):
            if len(source) != 16 or len(data) > BUFFER_BYTES:
                raise ValueError("not what a socket hands over")
            message = &self.rx.inbox.messages[i].msg_hdr
            address = load_u128(source)
            write_address(&self.rx.inbox.sources[i], &message.msg_namelen, address, 0)
            memcpy(self.rx.inbox.parts[i].iov_base, <const uint8_t*>data, len(data))
            self.rx.inbox.messages[i].msg_len = len(data)
            message.msg_controllen = 0
            add_control(message, self.rx.inbox.control[i], SOL_UDP, UDP_GRO, &size, sizeof(int))
            if is_mapped(address):
                add_control(message, self.rx.inbox.control[i], SOL_IP, IP_TOS, &tos, 1)
            else:
                add_control(message, self.rx.inbox.control[i], SOL_IPV6, IPV6_TCLASS, &ecn, sizeof(int))
        self.messages = len(messages)

    cdef inline uint8_t* packet(self, uint32_t i) noexcept nogil:
        return self.tx.buffers + <size_t>i * BUFFER_STRIDE + HEADROOM

    # ------------------------------------------------------------------------------------------------ operations

    def parse(self, uint64_t rounds):
        """Read each packet's IP header. Returns how many can be carried, and the sum of their lengths and of both
        addresses' lower 64 bits, modulo 2^64."""
        cdef uint64_t carried = 0, total = 0, n
        cdef uint32_t i
        cdef ip_view view
        with nogil:
            for n in range(rounds):
                carried = total = 0
                for i in range(self.packets):
                    if parse_ip(self.packet(i), self.lengths[i], &view) == DROP_REASONS:
                        carried += 1
                        total += view.length + <uint64_t>view.source + <uint64_t>view.destination
        return carried, total

    def checksum(self, uint64_t rounds):
        """Sum up each packet from its first byte to its last. Returns the total of all sums, as `wire.checksum` gives
        them."""
        cdef uint64_t total = 0, n
        cdef uint32_t i
        with nogil:
            for n in range(rounds):
                total = 0
                for i in range(self.packets):
                    total += ntohs(checksum_finish(checksum_add(self.packet(i), self.lengths[i], 0)))
        return total

    def encap(self, uint64_t rounds):
        """Put each packet, parsed and looked up before, into its run with what goes in front of it, and make the
        messages. `datagrams` shows them. Raises ValueError where a packet has no route."""
        cdef ip_view views[READS]
        cdef uint32_t routes[READS]
        cdef uint64_t n
        cdef uint32_t i
        cdef tx_way way
        for i in range(self.packets):
            routes[i] = NO_PEER
            if parse_ip(self.packet(i), self.lengths[i], &views[i]) == DROP_REASONS:
                routes[i] = find_route(self.fib.table, &views[i])
            if routes[i] == NO_PEER:
                raise ValueError("a packet without a route")
        with nogil:
            for n in range(rounds):
                self.empty_outbox()
                for i in range(self.packets):
                    way = way_of(self.engine, &self.fib.table.routes[routes[i]], self.packet(i), &views[i])
                    push_packet(self.engine, self.tx, &way, self.packet(i), <uint32_t>views[i].length)
                seal_outbox(&self.tx.outbox)

    def segment(self, uint64_t rounds):
        """Cut each superframe: its packets' headers are stamped, the payload lies still. Returns the headers that are
        in the stamps' memory at the end, one behind the other. Raises ValueError where something is no superframe."""
        cdef split_plan plan
        cdef uint64_t n
        cdef uint32_t i, index, at = 0
        cdef bint cut = True
        with nogil:
            for n in range(rounds):
                at = 0
                for i in range(self.packets):
                    if not plan_split(&self.headers[i], self.packet(i), self.lengths[i], &plan):
                        cut = False
                        continue
                    for index in range(plan.segments):
                        if at + plan.header > STAMP_BYTES:
                            at = 0
                        stamp_segment(&plan, index, self.tx.stamps + at)
                        at += plan.header
        if not cut:
            raise ValueError("not a superframe")
        return self.tx.stamps[:at]

    def coalesce(self, uint64_t rounds):
        """Verify and merge the packets, and stamp the superframes' headers. `superframes` shows them."""
        cdef uint64_t n
        cdef uint32_t i
        cdef tun_outbox* outbox = &self.rx.outbox
        with nogil:
            for n in range(rounds):
                for i in range(self.packets):
                    outbox.packets[i].data = self.packet(i)
                    outbox.packets[i].length = self.lengths[i]
                    outbox.packets[i].check_start = outbox.packets[i].segment = 0
                outbox.count = self.packets
                self.merge()

    def transmit(self, uint64_t rounds):
        """The whole of TX but its system calls: each packet as the pump takes it, and the messages that it would send.
        `datagrams` shows them."""
        cdef uint64_t n
        cdef uint32_t i
        cdef udp_run* run
        with nogil:
            for n in range(rounds):
                self.empty_outbox()
                for i in range(self.packets):
                    self.tx.header = self.headers[i]
                    take_packet(self.engine, self.tx, self.fib.table, self.packet(i), self.lengths[i])
                seal_outbox(&self.tx.outbox)
                for i in range(self.tx.outbox.count):
                    run = &self.tx.outbox.runs[self.tx.outbox.order[i]]
                    count_sent(self.engine, run, run.count, run.bytes)

    def receive(self, uint64_t rounds):
        """The whole of RX but its system calls: each message as the pump takes it, and the superframes that it would
        write. `superframes` shows them."""
        cdef uint64_t n
        cdef uint32_t i
        with nogil:
            for n in range(rounds):
                self.rx.outbox.count = 0
                for i in range(self.messages):
                    take_message(self.engine, self.rx, self.fib.table, i, now_ms())
                self.merge()

    cdef inline void empty_outbox(self) noexcept nogil:
        self.tx.outbox.count = 0
        self.tx.stamped = 0

    cdef inline void merge(self) noexcept nogil:
        cdef uint32_t i
        cdef tun_outbox* outbox = &self.rx.outbox
        self.chains = chain_packets(outbox.packets, outbox.count, outbox.chains, self.engine.merge_tcp,
                                    self.engine.merge_udp, &self.engine.rx.wrong_checksums)
        for i in range(self.chains):
            self.describe(&outbox.chains[i], &self.tx.header)

    cdef inline void describe(self, const packet_chain* chain, virtio_net_hdr* header) noexcept nogil:
        cdef tun_outbox* outbox = &self.rx.outbox
        if chain.count > 1:
            stamp_superframe(outbox.packets, chain, header, outbox.header)
        else:
            describe_single(&outbox.packets[chain.first], header)

    # --------------------------------------------------------------------------------------------------- results

    @property
    def drops(self):
        """Packets dropped in both directions since the beginning, of any reason."""
        return sum([self.engine.tx.drops[i] + self.engine.rx.drops[i] for i in range(DROP_REASONS)])

    def datagrams(self):
        """(outer address of 16 bytes, datagram) each, as the messages in the outbox say."""
        cdef uint8_t address[16]
        cdef udp_run* run
        cdef uint32_t i, part
        found = []
        for i in range(self.tx.outbox.count):
            run = &self.tx.outbox.runs[self.tx.outbox.order[i]]
            store_u128(address, run.address)
            bytes_ = b"".join([
                (<uint8_t*>run.parts[part].iov_base)[:run.parts[part].iov_len] for part in range(run.used)
            ])
            found += [(address[:16], bytes_[at:at + run.size]) for at in range(0, run.bytes, run.size)]
        return found

    def superframes(self):
        """(virtio_net_hdr, packet) each, in the order in which they would be written."""
        cdef virtio_net_hdr header
        cdef packet_chain* chain
        cdef packet_ref* packet
        cdef uint32_t i, at
        cdef tun_outbox* outbox = &self.rx.outbox
        found = []
        for i in range(self.chains):
            memset(&header, 0, sizeof(header))
            chain = &outbox.chains[i]
            packet = &outbox.packets[chain.first]
            self.describe(chain, &header)
            whole = outbox.header[:packet.header] if chain.count > 1 else packet.data[:packet.length]
            at = chain.first if chain.count > 1 else NO_PEER
            while at != NO_PEER:
                packet = &outbox.packets[at]
                whole += packet.data[packet.header:packet.header + packet.payload]
                at = packet.next
            found.append(((<uint8_t*>&header)[:sizeof(header)], whole))
        return found
