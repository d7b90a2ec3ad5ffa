"""Owns the composition of the daemon: what is started in which order, what a signal does, what is closed again.

It decides nothing: which class stands for a flag or a net-conf is for `parts` to say. Invariant: whatever start
reached, stop undoes in the opposite order, and every way out has one exit code: 0 for an ordered stop, -help and
-version, 2 for flags that cannot be, 1 for everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dataplane import __version__, collecting, klog, netconf, parts, systemd
from dataplane import options as flags
from dataplane.backend.base import Backend, Underlay
from dataplane.cleanup import cleanup
from dataplane.debug.answers import Answers
from dataplane.debug.control import ControlServer
from dataplane.errors import ConfigError, LodenError, StoreError
from dataplane.following import Following, Surveyor
from dataplane.health import HealthServer
from dataplane.kernel import subnetfile
from dataplane.lease import texts
from dataplane.lease.allocate import Claim
from dataplane.lease.config import fetch_config
from dataplane.lease.keeper import MOST_REST, LeaseKeeper
from dataplane.lease.model import Lease, LeaseEvent
from dataplane.lease.store import LeaseStore
from dataplane.memory import Memory, Past
from dataplane.netconf import NetworkConfig
from dataplane.options import Options
from dataplane.upkeep import Upkeep

log = logging.getLogger(__name__)

PROGRAM = "flanneld"

STOPPING = (signal.SIGTERM, signal.SIGINT)

SWITCH_SECONDS = 0.0005
"""After which a thread that waits for the GIL gets it. A client's thread takes it for each message of the store: with
Python's 5 ms, lease changes come in drops while the loop follows others, and what waits grows."""

HEAD_START = 0.3
"""Seconds that a store has to answer before a daemon that remembers its lease begins without it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `flanneld` command. Returns the exit code."""
    try:
        options = flags.parse(sys.argv[1:] if argv is None else argv, os.environ)
        if options.help:
            sys.stderr.write(flags.usage(PROGRAM))
            return 0
        if options.version:
            sys.stderr.write(f"Loden {__version__}\n")
            return 0
        flags.check(options)
    except ConfigError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\nSee {PROGRAM} -help\n")
        return 2
    by_file = flags.read_vmodule(options.vmodule)
    klog.configure(
        options.v, sys.stderr, by_file=by_file, backtrace_at=options.log_backtrace_at, form=options.log_format
    )
    for warning in options.warnings:
        log.warning("%s", warning)
    log.info("%s", flags.describe(options))
    import uvloop

    collecting.prepare()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        uvloop.run(cleanup(options) if options.cleanup else run(options))
    except LodenError as error:
        log.error("%s", error)  # the text says what to do; a traceback says nothing to an operator
        return 1
    return 0


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT. Raises LodenError where the start fails, with nothing left behind."""
    stop = asyncio.Event()
    log.info("Installing signal handlers")
    for number in STOPPING:
        asyncio.get_running_loop().add_signal_handler(number, _stop_once, stop, number)
    daemon = asyncio.create_task(Daemon(options).run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({daemon, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not daemon.done():
        systemd.notify(os.environ, STOPPING="1")
        log.info("Waiting for all goroutines to exit")  # guides and scripts look for flannel's words
        daemon.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await daemon
    log.info("Exiting cleanly...")


async def _trouble_of(store: LeaseStore) -> str:
    """Why a store cannot be asked now; empty where it answers."""
    try:
        async with asyncio.timeout(HEAD_START):
            return "" if await store.read_config() is not None else texts.config_missing(store.name)
    except TimeoutError:
        return f"{store.name} has not answered within {HEAD_START:g} s"
    except StoreError as error:
        return str(error)


@contextlib.contextmanager
def _ending_with(words: str) -> Iterator[None]:
    """What ends a start here is told behind these words of flannel's, which guides and scripts look for."""
    try:
        yield
    except LodenError as error:
        raise LodenError(f"{words}: {error}") from error


def _stop_once(stop: asyncio.Event, number: signal.Signals) -> None:
    """The first signal stops in order; a second one, of either kind, kills, as with flannel."""
    log.info("Received %s, stopping", signal.Signals(number).name)
    for each in STOPPING:
        asyncio.get_running_loop().remove_signal_handler(each)
        signal.signal(each, signal.SIG_DFL)
    stop.set()


class Daemon:
    """One node's daemon, from start to stop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._places = subnetfile.places(options.subnet_file, options.control_socket)
        self._store: LeaseStore | None = None
        self._keeper: LeaseKeeper | None = None
        self._answers = Answers(self._ready)
        self._following: Following | None = None
        self._rng = random.Random()

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(subnetfile.DaemonLock(self._places.lock))
            stack.enter_context(systemd.watched(os.environ))
            stack.callback(asyncio.create_task(collecting.run(self._events)).cancel)
            await self._listen(stack)
            self._memory = Memory(self._places.state)
            stack.push_async_callback(self._memory.close)
            with _ending_with("Failed to create SubnetManager"):
                self._store = await parts.open_store(self._options)
            stack.push_async_callback(self._store.close)
            self._answers.store = self._store.name
            log.info("Created subnet manager: %s", self._manager_words())
            claim, past = self._memory.claim(), self._memory.past(self._store.name)
            if past is not None:
                trouble = await _trouble_of(self._store)
                if trouble:
                    log.error("%s", texts.from_memory(trouble, len(past.snapshot.entries) - 1, past.left))
                else:
                    past = None
            while not await self._live(self._store, claim, past):
                past = None  # the store has another network by now

    def _manager_words(self) -> str:
        """What flannel calls etcd and the subnet file, which scripts look for, and then our store's name."""
        name = self._answers.store
        if self._options.lease_store:
            return name
        previous = subnetfile.read_previous(self._places.subnet_file)
        return f"Etcd Local Manager with Previous Subnet: {texts.subnets(previous) if previous else None} ({name})"

    async def _live(self, store: LeaseStore, claim: Claim | None, past: Past | None) -> bool:
        """Carry packets until the daemon is stopped. With `past`, begin without the store; False if it then turns out
        to have another network config, after everything was closed."""
        from dataplane.kernel.netlink import Netlink

        async with contextlib.AsyncExitStack() as stack:
            self._following, self._keeper = None, None
            self._answers.forget()
            if past is None:
                text, network = await fetch_config(store, self._read_network, rng=self._rng)
                self._memory.keep_network(store.name, text)
            else:
                _, network = self._read_network(past.config)
            netlink = await Netlink.open()
            stack.push_async_callback(netlink.close)
            surveyor = Surveyor(self._options, network, netlink)
            facing = await surveyor.first()
            with _ending_with("Error fetching backend"):
                backend = await parts.make_backend(self._options, network, facing, netlink, self._memory)
            stack.push_async_callback(backend.close)
            rest = MOST_REST if parts.give_way(backend) else 0.0
            with _ending_with("Error registering network"):
                keeper = self._keeper = await self._make_keeper(store, network, backend, claim, rest)
                self._answers.know(keeper, backend, partial(self._facing, facing), network)
                lease = await self._lease(keeper, past)
                await backend.attach(lease)
            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(keeper.run())]
                    networks = subnetfile.read_networks(self._places.subnet_file)
                    upkeep = Upkeep(self._options, network, lease.key, networks, netlink)
                    await upkeep.start()
                    following = self._follow_node(surveyor, facing, backend, keeper, network, lease)
                    running += [tasks.create_task(upkeep.run()), tasks.create_task(following.run())]
                    if past is not None and await self._is_outdated(network, store):
                        for task in running:
                            task.cancel()
                        return False
            except ExceptionGroup as group:
                raise group.exceptions[0] from group
        return True

    def _facing(self, first: Underlay) -> Underlay:
        """What faces the underlay now; `first` until that is followed."""
        return self._following.facing if self._following else first

    async def _lease(self, keeper: LeaseKeeper, past: Past | None) -> Lease:
        if past is not None:
            return keeper.resume(past.own, past.left, past.snapshot)
        former = self._memory.past(self._answers.store)
        if former is not None:
            keeper.remember(former.snapshot)
        return await keeper.acquire()

    def _follow_node(
        self,
        surveyor: Surveyor,
        facing: Underlay,
        backend: Backend,
        keeper: LeaseKeeper,
        network: NetworkConfig,
        lease: Lease,
    ) -> Following:
        """Write subnet.env, and be ready; the result keeps it and the lease right from now on."""

        def write_subnet_file() -> None:
            path, ip_masq = self._places.subnet_file, self._options.ip_masq
            subnetfile.write_subnet_file(path, network, lease.key, mtu=backend.mtu, ip_masq=ip_masq)
            log.info("Wrote subnet file to %s", path)

        following = self._following = Following(
            surveyor, facing, backend, publish=keeper.change_attrs, rewrite=write_subnet_file, rng=self._rng
        )
        following.write_file()
        if following.file_stands:
            log.info("flannel is ready")
        systemd.notify(os.environ, READY="1")
        log.info("Running backend.")
        return following

    async def _is_outdated(self, network: NetworkConfig, store: LeaseStore) -> bool:
        """Whether the store, once it answers, has another network config."""
        _, found = await fetch_config(store, self._read_network, rng=self._rng)
        if found != network:
            log.warning("The network config has changed since this daemon last ran: starting anew with it")
        return found != network

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        """Health and control answer from the first moment, also while the store is out of reach."""
        ip, port, metrics_port = self._options.healthz_ip, self._options.healthz_port, self._options.metrics_port
        measured = metrics_port or port
        for each in sorted({port, measured} - {0}):
            metrics = self._answers.metrics if each == measured else None
            health = await HealthServer.start(ip, each, self._ready, metrics)
            stack.push_async_callback(health.close)
        place, answers = Path(self._places.control_socket), self._answers
        control = await ControlServer.start(place, answers.verbs, answers.streams)
        stack.push_async_callback(control.close)

    async def _make_keeper(
        self, store: LeaseStore, network: NetworkConfig, backend: Backend, claim: Claim | None, rest: float
    ) -> LeaseKeeper:
        async def follow(events: Sequence[LeaseEvent]) -> None:
            await backend.apply(events)
            self._memory.keep_peers(lambda: (keeper.revision, keeper.peers))

        keeper = LeaseKeeper(
            store,
            network,
            await backend.prepare(),
            claim=claim,
            previous=subnetfile.read_previous(self._places.subnet_file),
            renew_margin=self._options.subnet_lease_renew_margin * 60.0,
            on_events=follow,
            on_own=self._memory.keep_lease,
            rng=self._rng,
            rest=rest,
        )
        return keeper

    def _read_network(self, text: bytes) -> tuple[bytes, NetworkConfig]:
        """Parse the net-conf; refuse what is not built yet as early as what is wrong."""
        network = netconf.parse(text, origin=f"{self._store.name if self._store else 'store'} net-conf")
        for warning in network.warnings:
            log.warning("%s", warning)
        log.info("Found network config - Backend type: %s", network.backend.type)
        return text, network

    def _events(self) -> int:
        return 0 if self._keeper is None else self._keeper.counters.events

    def _ready(self) -> bool:
        """Packets can be carried, the peers are known, and our lease is ours."""
        keeper, following = self._keeper, self._following
        if keeper is None or following is None:
            return False
        return following.file_stands and keeper.synced and keeper.healthy
