"""Owns `loden version`, and `loden --version`, which is the same."""

from __future__ import annotations

import argparse

import dataplane

TEXT = f"loden {dataplane.__version__}"


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs.add_parser("version", help="print the version").set_defaults(run=_version)


def _version(_arguments: argparse.Namespace) -> int:
    print(TEXT)
    return 0
