"""Owns a tunnel's open sockets to the other nodes, over every change of the underlay.

Free of: how one is opened (`kernel.underlay`), and which ones a backend wants. Invariant: a socket is closed once, and
not while those that came in its place still share it.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dataplane.backend.base import Underlay
from dataplane.errors import KernelError
from dataplane.kernel import underlay
from dataplane.path.facts import Outer


@dataclass(frozen=True, slots=True)
class Sockets:
    """Open sockets to the other nodes; without `senders` those that receive send too. `further`: what the receiver was
    widened by, for further queues of the device."""

    receiver: underlay.UdpSocket
    port: int
    senders: tuple[socket.socket, ...] = ()
    further: tuple[underlay.UdpSocket, ...] = ()

    @property
    def outer(self) -> Outer:
        senders = tuple(sender.fileno() for sender in self.senders)
        return Outer(self.receiver.fd, self.port, senders, tuple(each.fd for each in self.further))

    def widened(self, queues: int) -> Sockets:
        """With as many receivers as the device has queues. Raises KernelError."""
        if len(self.further) == queues - 1:
            return self
        for each in self.further:
            each.close()
        further = underlay.widen(self.receiver, queues - 1) if queues > 1 else ()
        return dataclasses.replace(self, further=further)

    def as_wide_as(self, former: Sockets | None) -> Sockets:
        """With as many receivers as those in whose place they come. Raises KernelError, and then closes what is new."""
        if former is None or former is self:
            return self
        if former.receiver is self.receiver:
            return dataclasses.replace(self, further=former.further)
        try:
            return self.widened(len(former.further) + 1)
        except KernelError:
            self.close(kept=former)
            raise

    def close(self, *, kept: Sockets | None = None) -> None:
        """Close what `kept` does not share."""
        if kept is None or kept.receiver is not self.receiver:
            for each in (self.receiver, *self.further):
                each.close()
        for sender in self.senders:
            if kept is None or sender not in kept.senders:
                sender.close()


OpenSockets = Callable[[Underlay, "Sockets | None"], Awaitable[Sockets]]
"""For an underlay, given what is open for the former one, which may be used on."""
