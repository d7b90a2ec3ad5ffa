"""Owns a real etcd for tests: Debian's server on free ports, with a directory of its own, ended by its own pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

START_SECONDS = 30
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the server shows (`cert`, `key`), whom it believes (`ca`), and what etcdctl shows (`client_*`).

    `require_client`: clients without a certificate are turned away.
    """

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    require_client: bool = True


class EtcdServer:
    """One etcd member. Use as a context manager, or call start() and stop().

    `netns`: run inside that network namespace, at `address` and etcd's own ports unless `port` says otherwise.
    """

    def __init__(
        self, *, tls: TlsFiles | None = None, netns: str | None = None, address: str = "127.0.0.1", port: int = 0
    ) -> None:
        for tool in ("etcd", "etcdctl"):
            if shutil.which(tool) is None:
                raise RuntimeError(f"{tool} is missing: apt-get install etcd-server etcd-client (`make setup` does it)")
        self.tls = tls
        self.address = address
        self._enter = ["ip", "netns", "exec", netns] if netns else []
        self._wanted_port = port or (2379 if netns else 0)
        self._peer_port_wanted = 2380 if netns else 0
        self._directory = Path(tempfile.mkdtemp(prefix="loden-etcd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._peer_port = 0

    @property
    def url(self) -> str:
        """The one client endpoint, with its scheme."""
        return f"{'https' if self.tls else 'http'}://{self.address}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers. A free port can be taken before etcd binds it, so new ones are tried."""
        for attempt in range(_ATTEMPTS):
            self.port = self._wanted_port or _free_port()
            self._peer_port = self._peer_port_wanted or _free_port()
            try:
                self._run()
            except RuntimeError as error:
                if "address already in use" not in str(error) or attempt == _ATTEMPTS - 1:
                    self.stop()
                    raise
                shutil.rmtree(self._directory / "data", ignore_errors=True)
            else:
                return

    def kill(self) -> None:
        """End it at once, as a crash would; the data stay for restart()."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop every thread of it: it holds its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start again on the same ports with the same data."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._run()

    def stop(self) -> None:
        """End it and remove its directory. Safe to call twice."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def etcdctl(self, *arguments: str, text: str | None = None) -> str:
        """Run etcdctl against this server, with `text` as its input; its standard output. Raises RuntimeError."""
        done = self._etcdctl(*arguments, text=text)
        if done.returncode != 0:
            raise RuntimeError(f"etcdctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _etcdctl(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        flags = [f"--endpoints={self.url}"]
        if self.tls:
            flags += [f"--cacert={self.tls.ca}", f"--cert={self.tls.client_cert}", f"--key={self.tls.client_key}"]
        return subprocess.run(
            [*self._enter, "etcdctl", *flags, *arguments],
            input=text, capture_output=True, text=True, timeout=20, check=False, env=_environment(),
        )  # fmt: skip

    def _run(self) -> None:
        peer = f"http://{self.address}:{self._peer_port}"
        command = [
            "etcd", "--name=test", f"--data-dir={self._directory / 'data'}", "--log-level=warn",
            f"--listen-client-urls={self.url}", f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}",
            # the least TTL is one and a half elections: short ones let tests see leases expire soon
            "--heartbeat-interval=50", "--election-timeout=500",
        ]  # fmt: skip
        if self.tls:
            command += [f"--cert-file={self.tls.cert}", f"--key-file={self.tls.key}"]
            # either of the two flags makes etcd demand a certificate
            command += ["--client-cert-auth", f"--trusted-ca-file={self.tls.ca}"] if self.tls.require_client else []
        log = self._directory / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*self._enter, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment()
            )
        deadline = time.monotonic() + START_SECONDS
        # without a password only the health of a member is to be had, and that is all that is asked
        while self._process.poll() is None and time.monotonic() < deadline:
            answer = self._etcdctl("endpoint", "health", "--command-timeout=2s")
            if answer.returncode == 0 or "user name is empty" in answer.stderr:
                return
            time.sleep(0.05)
        if self._process.poll() is None:
            self.kill()
        raise RuntimeError(f"etcd did not start at {self.url}:\n{log.read_text(errors='replace')[-2000:]}")


def _environment() -> dict[str, str]:
    """Ours without what would configure etcd or etcdctl behind the test's back."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("ETCD_", "ETCDCTL_"))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
