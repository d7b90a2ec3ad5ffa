from array import array
from typing import TypedDict

class MachineTime(TypedDict):
    busy: float
    stolen: float

class TcpSeen(TypedDict):
    bytes: int
    seconds: float
    used: MachineTime

class UdpSeen(TypedDict):
    received: int
    expected: int
    duplicated: int
    reordered: int
    all_received: int
    all_duplicated: int
    seconds: float
    used: MachineTime

class UdpSent(TypedDict):
    sent: int
    refused: int
    seconds: float

class EchoSeen(TypedDict):
    sent: int
    received: int
    samples: int
    seconds: float
    used: MachineTime

def tcp_drain(connections: array[int], warmup: float, seconds: float) -> TcpSeen: ...
def tcp_flood(connections: array[int], seconds: float) -> int: ...
def udp_drain(socket: int, tag: int, patience: float, warmup: float, seconds: float) -> UdpSeen: ...
def udp_flood(socket: int, tag: int, size: int, rate: float, seconds: float) -> UdpSent: ...
def echo(
    socket: int, identifier: int, interval: float, warmup: float, seconds: float, room: int = 1_000_000
) -> tuple[EchoSeen, array[int]]: ...
def processor_time() -> tuple[float, float]: ...
