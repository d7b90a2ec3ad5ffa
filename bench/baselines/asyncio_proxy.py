"""A TUN-to-UDP proxy as one would write it in an afternoon: `asyncio_proxy.py DEVICE LOCAL REMOTE asyncio|uvloop`.

One peer, one packet for each wake-up, default buffers; flannel's udp wire (the inner packet is the whole datagram). It
is measured, never used: a floor for what Python does without a design of its own. """

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys

PORT = 8285
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LONGEST = 65_535


class FromUnderlay(asyncio.DatagramProtocol):
    def __init__(self, tun: int) -> None:
        self._tun = tun

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:  # noqa: ARG002 - one peer: any sender
        try:
            os.write(self._tun, data)
        except OSError:
            return  # not an IP packet, or the device is down: a proxy of an afternoon drops it


async def run(device: str, local: str, remote: str) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: FromUnderlay(tun), local_addr=(local, PORT))
    loop.add_reader(tun, lambda: transport.sendto(os.read(tun, LONGEST), (remote, PORT)))
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[4] == "uvloop":
        import uvloop

        uvloop.run(run(*sys.argv[1:4]))
    else:
        asyncio.run(run(*sys.argv[1:4]))
