"""`python -m dataplane.cli`: the `loden` command where its script is not on the PATH."""

from __future__ import annotations

import sys

from dataplane.cli import main

sys.exit(main())
