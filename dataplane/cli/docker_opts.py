"""Owns `mk-docker-opts`: Docker's options from subnet.env, with the options, outputs and codes of flannel's script.

Free of: Docker. Invariant: the output file is written whole, and only once everything in it is known to be right.
"""

from __future__ import annotations

import getopt
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface

from dataplane.errors import ConfigError, LodenError
from dataplane.kernel import subnetfile
from dataplane.options import DEFAULT_SUBNET_FILE

DEFAULT_OUTPUT = "/run/docker_opts.env"
DEFAULT_KEY = "DOCKER_OPTS"

USAGE = f"""\
{{program}} [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k COMBINED-KEY]

Write the options of a Docker daemon that shall use this node's subnet.
  -f  file to read (default {DEFAULT_SUBNET_FILE})
  -d  file to write (default {DEFAULT_OUTPUT})
  -i  one variable for each option, as in DOCKER_OPT_MTU="--mtu=1472"
  -c  one variable for all of them; without -i and -c both are written
  -k  name of that variable (default {DEFAULT_KEY}); what it has in the environment comes first
  -m  leave --ip-masq out
"""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    source: str = DEFAULT_SUBNET_FILE
    output: str = DEFAULT_OUTPUT
    individual: bool = True
    combined: bool = True
    key: str = DEFAULT_KEY
    ip_masq: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the result is the exit code, 1 for everything that is not a written file."""
    program = os.path.basename(sys.argv[0]) or "mk-docker-opts"  # noqa: PTH119 - a name, not a file
    try:
        wish = _read_words(sys.argv[1:] if argv is None else argv)
    except getopt.GetoptError as error:
        print(*[f"{program}: {error}\n"] * bool(error.msg), USAGE.format(program=program), sep="", file=sys.stderr)
        return 1
    try:
        values = subnetfile.read_values(wish.source)
        if not values:
            raise ConfigError(f"{wish.source} cannot be read, or says nothing: is flanneld running?")
        text = render(wish, values, os.environ)
        _check_routes(values.get("FLANNEL_SUBNET", ""))
        subnetfile.write_text(wish.output, text)
    except LodenError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def render(wish: Wish, values: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """The file's text. What the environment has under a name like those that are written goes in as well, as with
    flannel's script. Raises ConfigError for a FLANNEL_IPMASQ that is neither true nor false."""
    options = {name: value for name, value in environ.items() if name.startswith("DOCKER_OPT_")}
    if subnet := values.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    ours = values.get("FLANNEL_IPMASQ", "")
    if wish.ip_masq and ours:
        if ours not in ("true", "false"):
            raise ConfigError(f"invalid value of FLANNEL_IPMASQ in {wish.source}: {ours!r}; it is true or false")
        # who masquerades already keeps Docker from doing it again
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={'false' if ours == 'true' else 'true'}"
    if mtu := values.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    written = sorted(options.items())
    lines = [f'{name}="{option}"' for name, option in written] if wish.individual else []
    if wish.combined:
        former = environ.get(wish.key, "")
        # two blanks behind what stood there: some compare the file with the one that flannel's script writes
        words = (f"{former} " if former else "", *(option for _, option in written))
        lines.append(f'{wish.key}="{" ".join(words)}"')
    return "".join(f"{line}\n" for line in lines)


def _read_words(argv: Sequence[str]) -> Wish:
    """Raises GetoptError, without a text where the usage was asked for."""
    given, rest = getopt.getopt(list(argv), "f:d:icmk:h?")
    if rest:
        raise getopt.GetoptError(f"unexpected word {rest[0]!r}")
    words = dict(given)
    if "-h" in words or "-?" in words:
        raise getopt.GetoptError("")
    key = words.get("-k", DEFAULT_KEY)
    if re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) is None:
        raise getopt.GetoptError(f"{key!r} cannot name a variable")
    neither = "-i" not in words and "-c" not in words
    return Wish(
        words.get("-f", DEFAULT_SUBNET_FILE),
        words.get("-d", DEFAULT_OUTPUT),
        individual=neither or "-i" in words,
        combined=neither or "-c" in words,
        key=key,
        ip_masq="-m" not in words,
    )


def _check_routes(subnet: str) -> None:
    """Docker's bridge would fight with a route to just this subnet through a gateway. Raises ConfigError."""
    try:
        wanted = IPv4Interface(subnet).network
    except ValueError:
        return  # an overlay of IPv6 alone
    try:
        with open("/proc/thread-self/net/route", encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
    except OSError:
        return
    for row in rows:
        destination, gateway, mask = (int.from_bytes(bytes.fromhex(row[i]), "little") for i in (1, 2, 7))
        if gateway and (destination, mask) == (int(wanted.network_address), int(wanted.netmask)):
            raise ConfigError(f"a route to {wanted} through a gateway stands on {row[0]}: remove it first")
