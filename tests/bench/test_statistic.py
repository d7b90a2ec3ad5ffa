"""Medians and the bootstrap interval of a ratio, against data whose answer is known."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.bench import statistic

positive = st.floats(min_value=0.01, max_value=1e6)


def test_a_summary() -> None:
    found = statistic.summarize([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.least, found.greatest, found.count) == (2.5, 1.0, 10.0, 4)
    assert found.spread == pytest.approx(3.6)
    assert found.noisy
    assert not statistic.summarize([1.0, 1.1, 1.2]).noisy
    with pytest.raises(ValueError, match="no samples"):
        statistic.summarize([])


def test_samples_that_do_not_vary_have_an_interval_of_no_width() -> None:
    found = statistic.ratio([4.0] * 5, [2.0] * 5)
    assert (found.ratio, found.low, found.high) == (2.0, 2.0, 2.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(positive, min_size=1, max_size=9), st.floats(min_value=0.1, max_value=10))
def test_what_slows_a_round_down_falls_out_of_the_ratio(below: list[float], factor: float) -> None:
    """Paired by round: a factor between the two sides is found exactly for odd counts, however much rounds differ."""
    below = below if len(below) % 2 else below[1:]
    found = statistic.ratio([value * factor for value in below], below)
    assert found.ratio == pytest.approx(factor)
    assert found.low <= found.ratio * (1 + 1e-9)
    assert found.high >= found.ratio * (1 - 1e-9)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two populations whose medians stand as 2 to 1, 30 rounds each: 95 % intervals must nearly always hold 2."""
    generator = random.Random(7)
    held = 0
    for _ in range(40):
        above = [generator.gauss(200, 20) for _ in range(30)]
        below = [generator.gauss(100, 10) for _ in range(30)]
        found = statistic.ratio(above, below)
        held += found.low <= 2.0 <= found.high
    assert held >= 34


def test_more_rounds_make_the_interval_narrower() -> None:
    generator = random.Random(3)
    widths = []
    for count in (5, 20, 80):
        found = [
            statistic.ratio(*([generator.gauss(100, 10) for _ in range(count)] for _ in range(2))) for _ in range(10)
        ]
        widths.append(statistics.mean(one.high - one.low for one in found))
    assert widths[0] > widths[1] > widths[2]


def test_the_same_samples_give_the_same_interval() -> None:
    samples = [5.0, 7.0, 6.0, 9.0, 4.0], [1.0, 2.0, 1.5, 1.7, 1.2]
    assert statistic.ratio(*samples) == statistic.ratio(*samples)


@pytest.mark.parametrize(("above", "below"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0])])
def test_what_has_no_ratio(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError):
        statistic.ratio(above, below)
