"""Owns every exception that crosses a folder, and the reasons for which a packet is dropped.

Free of: everything else. Invariant: `str(error)` is a sentence that an operator can act on: what
happened, where, and what to do.
"""

from __future__ import annotations

from enum import IntEnum


class LodenError(Exception):
    """Root of all errors that Loden raises on purpose."""


class ConfigError(LodenError):
    """Flags, environment or net-conf ask for something that cannot be; the operator must change them."""


class StoreError(LodenError):
    """The lease store answered, and the answer is no."""


class StoreUnavailable(StoreError):
    """The lease store cannot be reached now; the same call may succeed later. Names endpoint and reason."""


class StoreDenied(StoreError):
    """The lease store refuses this user, password, certificate or key prefix."""


class HistoryGone(StoreError):
    """A watch asked for revisions that the store has compacted: take a snapshot instead."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"the lease store no longer holds the history before revision {revision}")
        self.revision = revision


class LeaseError(LodenError):
    """No lease is to be had, or ours is lost."""


class LeaseInvalid(LeaseError):
    """A key or value in the store is no lease that can be obeyed. Says which part is wrong."""


class LeaseForeign(LeaseInvalid):
    """A lease that is right, of a node that we cannot talk to: it carries by another backend, or another VNI."""


class KernelError(LodenError):
    """The kernel refused an operation. Says which, on what object, why, and who holds it where that is known."""


class CaptureError(LodenError):
    """A capture cannot be made, written or read. Says which file or daemon, where in it, and why."""


class DropReason(IntEnum):
    """Why a packet was not carried. Mirrors the DROP_ constants of ext/dataplane/abi.pxd, value for value."""

    NO_ROUTE = 0
    """TX: no lease covers the inner destination."""
    NOT_IP = 1
    """The first nibble is no IP version that is carried, or the header is shorter than its version's least."""
    LENGTH = 2
    """The inner header or total length is longer than what came, or a header is cut off."""
    UNKNOWN_PEER = 3
    """RX: the outer source is no node that holds a lease."""
    SPOOFED_SOURCE = 4
    """RX: the inner source lies outside what the sending peer may use."""
    SEND_FAILED = 5
    """TX: the kernel refused the datagram (no way to the peer, a firewall, too long)."""
    TUN_WRITE = 6
    """RX: the kernel refused the packet at the TUN device."""
    SUPERFRAME = 7
    """The kernel handed over a superframe (TX, or RX from its VTEP), or an unfinished checksum, that cannot be what it
    says."""
    PATH_MTU = 8
    """TX: the packet forbids fragmentation and is longer than the path to the peer takes; its sender is told."""
    NO_VNI = 9
    """RX, VXLAN: the flag that says that there is a VNI is not set (RFC 7348 section 5)."""
    FOREIGN_VNI = 10
    """RX, VXLAN: the datagram belongs to another virtual network."""
    RESERVED_BITS = 11
    """RX, VXLAN: a reserved bit is set, so it may be another protocol's; the kernel's device drops it too."""
    OWN_MAC = 12
    """RX, VXLAN: the frame bears our own MAC as its source: a loop."""
    OTHER_MAC = 13
    """RX, VXLAN: the frame is for another MAC; a peer has an old VtepMAC of ours, or floods."""
    PEER_MAC = 14
    """RX, VXLAN: the frame's source is not the VtepMAC in the lease of the sending node."""
    VLAN = 15
    """RX, VXLAN: the frame has a VLAN tag."""
    ETHERTYPE = 16
    """RX, VXLAN: the frame carries something else than the IP version of this device, such as ARP."""
    ECN = 17
    """RX, VXLAN: the underlay marked congestion on a packet whose ends do not understand that (RFC 6040 section
    4.2)."""
