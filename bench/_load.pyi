from array import array
from collections.abc import Sequence
from typing import TypedDict

class MachineTime(TypedDict):
    busy: float
    stolen: float
    watched: float

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
    started: float
    longest_gap: float
    seconds: float
    used: MachineTime

class UdpSent(TypedDict):
    sent: int
    refused: int
    seconds: float

class ConnectSeen(TypedDict):
    accepted: int
    seconds: float
    used: MachineTime

class ConnectMade(TypedDict):
    made: int
    failed: int

class EchoSeen(TypedDict):
    sent: int
    received: int
    samples: int
    seconds: float
    used: MachineTime

def tcp_drain(connections: array[int], warmup: float, seconds: float) -> TcpSeen: ...
def tcp_flood(connections: array[int], seconds: float) -> int: ...
def udp_drain(
    socket: int, tag: int, patience: float, warmup: float, seconds: float, width: float = 0.0
) -> tuple[UdpSeen, list[list[int]]]: ...
def udp_flood(
    socket: int, tag: int, size: int, rate: float, seconds: float, hosts: Sequence[int] = (), port: int = 0
) -> UdpSent: ...
def connect_drain(listener: int, warmup: float, seconds: float) -> ConnectSeen: ...
def connect_flood(host: int, port: int, parallel: int, seconds: float) -> ConnectMade: ...
def echo(
    socket: int, identifier: int, interval: float, warmup: float, seconds: float, room: int = 1_000_000
) -> tuple[EchoSeen, array[int]]: ...
def watch_processes(pids: array[int]) -> None: ...
def processor_time() -> tuple[float, float]: ...
