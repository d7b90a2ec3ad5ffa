"""`python -m dataplane` is the daemon, the same as the `flanneld` command."""

from __future__ import annotations

import sys

from dataplane.daemon import main

sys.exit(main())
