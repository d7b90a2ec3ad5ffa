"""Owns certificates for a real etcd and its clients: a CA of the test's own, and what it has signed.

Invariant: none of them is good for longer than a day, and nobody outside the test trusts their CA.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.etcd_server import TlsFiles


def make_certificates(directory: Path, address: str = "127.0.0.1") -> TlsFiles:
    """A CA, a server certificate for `address`, and a client certificate, as PEM files."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = certificate("test CA", ca_key, None, ca_key, x509.BasicConstraints(ca=True, path_length=0))
    write(directory / "ca.pem", ca)
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(address)), x509.DNSName(f"{name}.test")])
        write(directory / f"{name}.pem", certificate(name, key, ca, ca_key, alternative))
        write(directory / f"{name}.key", key)
    return TlsFiles(
        ca=directory / "ca.pem",
        cert=directory / "server.pem",
        key=directory / "server.key",
        client_cert=directory / "client.pem",
        client_key=directory / "client.key",
    )


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Certificate | None, issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:  # fmt: skip
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(extension, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def write(path: Path, item: Any) -> None:
    pem = serialization.Encoding.PEM
    if isinstance(item, x509.Certificate):
        path.write_bytes(item.public_bytes(pem))
    else:
        path.write_bytes(item.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
