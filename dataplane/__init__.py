"""Loden: a container overlay dataplane that replaces flanneld on a node."""

from __future__ import annotations

__version__ = "0.1.0"
