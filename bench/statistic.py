"""Owns the statistics: medians with their spread, and the interval of a ratio of two medians.

Free of: what the numbers are. Invariant: the same samples give the same interval, since the bootstrap's generator is
seeded with a constant.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RESAMPLES = 4000
CONFIDENCE = 0.95
COMPARED = 0.99
"""Of the interval of a change between two runs."""
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
    """Ratio of two medians, and the percentile interval of it over resampled rounds."""

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
    pairs = list(zip(above, below, strict=True))
    return _interval([pairs], lambda drawn: of_medians(drawn[0]), CONFIDENCE)


def change(old: Sequence[tuple[float, float]], new: Sequence[tuple[float, float]]) -> Ratio:
    """By how much the ratio of `new` is that of `old`; each is (above, below) by round, and the rounds of two runs have
    nothing in common. The interval is wider (COMPARED), since many figures are compared at once.

    Raises ValueError where one is empty or a value is not positive.
    """
    if not old or not new or min(min(pair) for pair in (*old, *new)) <= 0:
        raise ValueError("a change needs samples on both sides, all of them positive")
    return _interval([list(old), list(new)], lambda drawn: of_medians(drawn[1]) / of_medians(drawn[0]), COMPARED)


def of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    """Ratio of the medians of both sides."""
    return statistics.median(above for above, _ in pairs) / statistics.median(below for _, below in pairs)


def _interval(
    groups: list[list[tuple[float, float]]],
    figure: Callable[[Sequence[Sequence[tuple[float, float]]]], float],
    confidence: float,
) -> Ratio:
    """The figure of the groups, with its percentile interval over resampled rounds of each."""
    generator = random.Random(1)
    drawn = sorted(figure([generator.choices(group, k=len(group)) for group in groups]) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    low, high = drawn[int(tail * RESAMPLES)], drawn[min(RESAMPLES - 1, int((1 - tail) * RESAMPLES))]
    return Ratio(figure(groups), low, high)
