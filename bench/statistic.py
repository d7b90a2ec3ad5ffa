"""Owns the statistics: medians with their spread, and the interval of a ratio of two medians.

Free of: what the numbers are. Invariant: the same samples give the same interval, since the bootstrap's generator is
seeded with a constant.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 4000
CONFIDENCE = 0.95
NOISY = 0.3
"""A spread of more than this share of the median is said aloud."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, least and greatest of the samples."""

    median: float
    least: float
    greatest: float
    count: int

    @property
    def spread(self) -> float:
        """(greatest - least) / median; 0 where the median is 0 and nothing varies."""
        width = self.greatest - self.least
        return width / self.median if self.median else (math.inf if width else 0.0)

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of two medians, and the percentile interval of it (CONFIDENCE) over resampled rounds."""

    ratio: float
    low: float
    high: float


def summarize(samples: Sequence[float]) -> Summary:
    """Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no samples")
    return Summary(statistics.median(samples), min(samples), max(samples), len(samples))


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """median(above) / median(below), with samples paired by round.

    Whole rounds are resampled: what slows a round down slows both sides of it, and so falls out of the ratio (Efron,
    the bootstrap of paired data). Raises ValueError where the counts differ or are 0, or a denominator is 0.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} samples over {len(below)}: each round has one of each")
    if min(below) <= 0:
        raise ValueError("the denominator has a sample that is not positive")
    generator = random.Random(1)
    rounds = range(len(above))
    drawn = []
    for _ in range(RESAMPLES):
        chosen = generator.choices(rounds, k=len(above))
        drawn.append(statistics.median(above[i] for i in chosen) / statistics.median(below[i] for i in chosen))
    drawn.sort()
    tail = (1 - CONFIDENCE) / 2
    low, high = drawn[int(tail * RESAMPLES)], drawn[min(RESAMPLES - 1, int((1 - tail) * RESAMPLES))]
    return Ratio(statistics.median(above) / statistics.median(below), low, high)
