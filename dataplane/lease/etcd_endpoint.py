"""Owns one etcd server as a client sees it: its address, its TLS, the channel to it, and why it cannot be reached.

Free of: what is said over the channel. Invariant: a channel that fails to connect is thrown away, so gRPC's own
back-off never keeps us from a server that is back.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# gRPC writes each refused connection to stderr in its own words; our errors say it once. Read when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Else gRPC starts threads anew in each forked child; on a busy machine they crash it before it has become iptables.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"

import grpc
import grpc.aio

from dataplane.errors import ConfigError, StoreUnavailable

# grpc too: whoever takes it from here gets it with the settings above
__all__ = ["RPC_SECONDS", "Endpoint", "Lost", "TlsFiles", "grpc"]

RPC_SECONDS = 5.0
"""How long one endpoint may take to connect, and again to answer."""
DIAGNOSIS_SECONDS = 1.0

_DEFAULT_PORT = 2379
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_OPTIONS = [
    # A silently cut network ends a watch after 15 s. etcd forbids pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),  # for the kernel's unacknowledged bytes
    ("grpc.http2.ping_timeout_ms", 5_000),  # for the ping's answer; 60 s by default, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),  # 0: a quiet watch may be pinged for ever
    ("grpc.use_local_subchannel_pool", 1),  # a channel made anew inherits no back-off
    ("grpc.enable_http_proxy", 0),  # as etcd's own client: the proxy variables are for the web
    ("grpc.enable_retries", 0),
]


class Lost(Exception):
    """This endpoint gave no answer; another may. The text is the server's, empty where no connection was made."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    keyfile: str
    certfile: str
    cafile: str

    def __bool__(self) -> bool:
        return bool(self.keyfile or self.certfile or self.cafile)

    def context(self) -> ssl.SSLContext:
        """What a connection of ours would show and believe. Raises ConfigError that names flag and file."""
        for flag, path in (("keyfile", self.keyfile), ("certfile", self.certfile), ("cafile", self.cafile)):
            if path:
                _read(f"--etcd-{flag}", path)
        if bool(self.keyfile) != bool(self.certfile):
            raise ConfigError("--etcd-keyfile and --etcd-certfile belong together: give both or none")
        try:
            context = ssl.create_default_context(cafile=self.cafile or None)
        except ssl.SSLError as error:
            raise ConfigError(f"--etcd-cafile {self.cafile}: no PEM certificate in it ({error.reason})") from None
        try:
            if self.certfile:
                # a password would be asked for at the terminal; an empty one makes an encrypted key an error
                context.load_cert_chain(self.certfile, self.keyfile, password="")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"--etcd-certfile {self.certfile} and --etcd-keyfile {self.keyfile}: "
                f"no PEM certificate with its own, unencrypted key ({error})"
            ) from None
        context.set_alpn_protocols(["h2"])
        return context

    def credentials(self) -> Any:
        """gRPC's form of the same, read anew each time, so renewed files are taken up with the next connection."""
        roots = self.cafile or next((path for path in _SYSTEM_ROOTS if Path(path).exists()), "")
        return grpc.ssl_channel_credentials(
            root_certificates=_read("--etcd-cafile", roots) if roots else None,
            private_key=_read("--etcd-keyfile", self.keyfile) if self.keyfile else None,
            certificate_chain=_read("--etcd-certfile", self.certfile) if self.certfile else None,
        )


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None


@dataclass(slots=True)
class Endpoint:
    """One server: its address, and the channel to it while there is one. `tls` is None for plain HTTP/2."""

    host: str
    port: int
    tls: TlsFiles | None
    _channel: Any = field(default=None, init=False)

    @classmethod
    def parse(cls, text: str, tls: TlsFiles) -> Endpoint:
        try:
            parts = urlsplit(text if "://" in text else f"{'https' if tls else 'http'}://{text}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--etcd-endpoints: {text!r} is no endpoint: {error}") from None
        superfluous = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in ("http", "https") or not host or superfluous or any(map(str.isspace, text)):
            raise ConfigError(f"--etcd-endpoints: {text!r} is not of the form http://host:2379 or https://host:2379")
        return cls(host, port or _DEFAULT_PORT, tls if parts.scheme == "https" else None)

    @property
    def target(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'' if self.tls is None else 's'}://{self.target}"

    async def connected(self) -> Any:
        """A channel whose connection stands. Raises Lost, and then the channel is gone."""
        ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
        if self._channel is not None and self._channel.get_state() is failed:
            await self.drop()  # it failed behind our back, and now waits for gRPC's back-off
        if self._channel is None:
            self._channel = self._open()
        channel = self._channel
        try:
            async with asyncio.timeout(RPC_SECONDS):
                while (state := channel.get_state(try_to_connect=True)) is not ready:
                    if state is failed:
                        raise TimeoutError
                    await channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):
            if self._channel is channel:
                await self.drop()
            raise Lost from None
        return channel

    async def drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> Any:
        if self.tls is None:
            return grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        try:
            return grpc.aio.secure_channel(self.target, self.tls.credentials(), options=_OPTIONS)
        except ConfigError as error:
            raise StoreUnavailable(str(error)) from None

    async def why_down(self) -> tuple[str, bool]:
        """Why no connection was made, and whether it is our certificate: gRPC does not say."""
        try:
            async with asyncio.timeout(DIAGNOSIS_SECONDS):
                if self.tls is not None:
                    return await self._why_tls_fails(self.tls.context())
                await self._connect(None)
                if await self._speaks_tls():
                    return f"it speaks TLS: did you mean https://{self.target}?", False
                return "connections are taken, but no etcd answers", False
        except TimeoutError:
            return f"no answer within {DIAGNOSIS_SECONDS:g} s", False
        except ConfigError as error:
            return str(error), False
        except (socket.gaierror, UnicodeError) as error:
            return f"the name {self.host!r} does not resolve: {error}", False
        except ConnectionRefusedError:
            return "connection refused: no etcd listens there", False
        except OSError as error:
            return f"no connection: {error}", False

    async def _connect(self, context: ssl.SSLContext | None) -> bytes:
        """Connect, and with TLS wait for the first byte: TLS 1.3 refuses a client only after the handshake."""
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
        try:
            return await reader.read(1) if context else b""
        finally:
            writer.transport.abort()

    async def _speaks_tls(self) -> bool:
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        try:
            async with asyncio.timeout(DIAGNOSIS_SECONDS / 2):
                await self._connect(anyone)
        except TimeoutError:
            return False
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")
        except OSError:
            return False
        return True

    async def _why_tls_fails(self, context: ssl.SSLContext) -> tuple[str, bool]:
        try:
            await self._connect(context)
        except ssl.SSLCertVerificationError as error:
            hint = "" if self.tls and self.tls.cafile else "; name its CA with --etcd-cafile"
            return f"its certificate is not to be trusted: {error.verify_message}{hint}", False
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):
                shown = f"refuses {self.tls.certfile}" if self.tls and self.tls.certfile else "demands --etcd-certfile"
                return f"it {shown}: {(error.reason or '').replace('_', ' ').lower()}", True
            return f"it does not speak TLS ({error.reason}): did you mean http://{self.target}?", False
        except ConnectionResetError:
            return f"it does not speak TLS: did you mean http://{self.target}?", False
        return "connections are taken, but no etcd answers", False
