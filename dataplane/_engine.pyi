from typing import TypedDict

from dataplane._fib import Fib

class PumpCounters(TypedDict):
    packets: int
    bytes: int
    superframes: int
    messages: int
    calls: int
    wakeups: int
    icmp_errors: int
    events_lost: int
    drops: tuple[int, ...]

class Counters(TypedDict):
    tx: PumpCounters
    rx: PumpCounters

class Engine:
    def __init__(
        self,
        tun: int,
        udp: int,
        icmp: int,
        *,
        port: int,
        icmp_source: int,
        source_check: int,
        slots: int,
        run_datagrams: int,
        merge_tcp: bool,
        merge_udp: bool,
        spin_ns: int,
    ) -> None: ...
    @property
    def event_fd(self) -> int: ...
    def transmit(self) -> None: ...
    def receive(self) -> None: ...
    def stop(self) -> None: ...
    def publish(self, fib: Fib) -> int: ...
    def oldest_generation(self) -> int: ...
    def events(self) -> list[tuple[int, int, int]]: ...
    def counters(self) -> Counters: ...
    def peer_counters(self, slot: int) -> tuple[int, int, int, int, int, int]: ...
    def clear_slot(self, slot: int) -> None: ...

def inspect_ipv4(packet: bytes) -> tuple[int | None, int | None, int | None, int | None]: ...
def icmp_unreachable(source: int, packet: bytes) -> bytes | None: ...
