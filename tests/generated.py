"""Owns how many generated cases a test of the packet path looks at. LODEN_CASES=10 takes a tenth of what a test asks
for: where each case is dear, as below a sanitizer, the same ways are gone with fewer.

Free of what is generated. Invariant: never none.
"""

from __future__ import annotations

import os

_SHARE = int(os.environ.get("LODEN_CASES", "1"))


def cases(usual: int) -> int:
    return max(1, usual // _SHARE)
