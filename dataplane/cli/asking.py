"""Owns what the verbs share that ask a running daemon: where its socket is, and the words of common arguments.

Free of: what is asked. Invariant: a daemon is found by the same rule by which it chose its place.
"""

from __future__ import annotations

import argparse
import re

from dataplane.errors import ConfigError

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def add_socket(parser: argparse.ArgumentParser) -> None:
    """--control-socket and --subnet-file, as flanneld has them."""
    parser.add_argument("--control-socket", default="", metavar="PATH", help="the daemon's, if it was given one")
    parser.add_argument("--subnet-file", default="", metavar="FILE", help="the daemon's, if it is not the default")


def socket_path(arguments: argparse.Namespace) -> str:
    from dataplane import options
    from dataplane.kernel import subnetfile

    subnet_file = arguments.subnet_file or options.DEFAULT_SUBNET_FILE
    return subnetfile.places(subnet_file, arguments.control_socket).control_socket


def seconds(text: str, flag: str) -> float:
    """`10s`, `500ms`, `2m`, `1h`, or a number of seconds. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(|ms|s|m|h)", text)
    if match is None or not (value := float(match[1]) * _UNITS[match[2]]):
        raise ConfigError(f"{flag} {text}: use a time such as 10s, 500ms or 2m")
    return value


def size(text: str, flag: str) -> int:
    """`64M`, `64Mi`, or a number of bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)(|k|M|G|Ki|Mi|Gi)B?", text)
    if match is None or not (value := int(match[1]) * _SIZES[match[2]]):
        raise ConfigError(f"{flag} {text}: use a size such as 10M or 64Mi")
    return value
