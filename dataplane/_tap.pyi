from collections.abc import Iterable

class Tap:
    def __init__(
        self,
        program: bytes,
        snaplen: int,
        ring_bytes: int,
        reasons: tuple[bytes, ...],
        names: Iterable[tuple[bytes, str]] = (),
    ) -> None: ...
    def drain(self, before: int, most: int) -> memoryview: ...
    @property
    def statistics(self) -> tuple[int, int, int]: ...
    def offer(self, direction: int, drop: int, remote: bytes, vni: int, packet: bytes) -> bool: ...

class TapSet:
    def __init__(
        self,
        taps: Iterable[Tap],
        *,
        local: bytes,
        port: int,
        peers_port: int,
        ports: tuple[int, ...],
        ttl: int,
        dont_fragment: bool,
        vni: int = 0xFFFFFFFF,
        skip: int = 0,
        path: int = 0,
    ) -> None: ...
