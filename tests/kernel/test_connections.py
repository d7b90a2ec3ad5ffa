"""Connections from an address that is gone: ended for their holder, and no others."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest

from dataplane.kernel.connections import hang_up

OURS, OTHER = "127.99.0.7", "127.99.0.8"


def connected(address: str, server: socket.socket) -> socket.socket:
    client = socket.create_connection(server.getsockname()[:2], timeout=5, source_address=(address, 0))
    client.settimeout(5)
    return client


def test_the_holder_learns_that_its_connection_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, connected(OURS, server) as ours:
        far, _ = server.accept()
        with far:
            assert hang_up(IPv4Address(OURS)) == 1
            assert ours.recv(1) == b""
            assert far.recv(1) == b""


def test_connections_from_other_addresses_listeners_and_datagram_sockets_stay() -> None:
    with (
        socket.create_server((OURS, 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as server,
        connected(OTHER, server) as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind((OURS, 0))
        far, _ = server.accept()
        with far:
            assert hang_up(IPv4Address(OURS)) == 0
            far.send(b"x")
            assert other.recv(1) == b"x"
        assert listener.getsockname()[0] == OURS


@pytest.mark.parametrize("gone", [IPv4Address("127.0.0.1"), IPv6Address("::ffff:127.0.0.1")])
def test_an_ipv4_address_on_an_ipv6_socket_is_the_same_address(gone: IPv4Address | IPv6Address) -> None:
    with (
        socket.create_server(("127.99.0.9", 0)) as server,
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as client,
    ):
        client.bind(("::ffff:127.0.0.1", 0))
        client.connect(("::ffff:127.99.0.9", server.getsockname()[1]))
        assert hang_up(gone) == 1
        assert client.recv(1) == b""
